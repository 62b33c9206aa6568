"""The name under which `kernels/residual` is called from outside."""

from beit_fast.kernels.residual import (
    KeptSamples,
    draw_kept_samples,
    layer_norm,
    layer_norm_reference,
    num_kept,
    scale_residual,
    scale_residual_norm,
    scale_residual_norm_reference,
    scale_residual_reference,
)

__all__ = [
    "KeptSamples",
    "draw_kept_samples",
    "layer_norm",
    "layer_norm_reference",
    "num_kept",
    "scale_residual",
    "scale_residual_norm",
    "scale_residual_norm_reference",
    "scale_residual_reference",
]
