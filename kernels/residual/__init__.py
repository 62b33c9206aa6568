"""x + keep * gamma * branch, and the LayerNorm that follows, in one pass.

What is called from outside stands here. reference.py is its specification, functional.py checks and
chooses, operators.py has the operator of torch, forward.py and backward.py its kernels, cpu.py what
torch does without them; drop_path.py draws which samples skip a branch, fold.py makes LayerScale
and the norm's affine part of the neighbouring weights.
"""

from beit_fast.kernels.residual.drop_path import KeptSamples, draw_kept_samples, num_kept
from beit_fast.kernels.residual.fold import fold_layer_scale, fold_norm_affine
from beit_fast.kernels.residual.functional import layer_norm, scale_residual, scale_residual_norm
from beit_fast.kernels.residual.reference import (
    layer_norm_reference,
    scale_residual_norm_reference,
    scale_residual_reference,
)

__all__ = [
    "KeptSamples",
    "draw_kept_samples",
    "fold_layer_scale",
    "fold_norm_affine",
    "layer_norm",
    "layer_norm_reference",
    "num_kept",
    "scale_residual",
    "scale_residual_norm",
    "scale_residual_norm_reference",
    "scale_residual_reference",
]
