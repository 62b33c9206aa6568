"""The name under which `kernels/input/mask_embed` is called from outside."""

from beit_fast.kernels.input.mask_embed import mask_embed, mask_embed_reference

__all__ = [
    "mask_embed",
    "mask_embed_reference",
]
