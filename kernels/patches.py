"""The name under which `kernels/input/patches` is called from outside."""

from beit_fast.kernels.input.patches import normalized_patches, normalized_patches_reference

__all__ = [
    "normalized_patches",
    "normalized_patches_reference",
]
