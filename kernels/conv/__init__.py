"""The tokenizer's convolutions, with ReLU, residual and pooling fused, channels last.

operators.py has the ones of its body, on the kernels of implicit_gemm.py; pixels.py the first one,
from uint8 pixels.
"""

from beit_fast.kernels.conv.operators import conv, conv_backend, conv_reference
from beit_fast.kernels.conv.pixels import conv_pixels, conv_pixels_backend, conv_pixels_reference

__all__ = [
    "conv",
    "conv_backend",
    "conv_pixels",
    "conv_pixels_backend",
    "conv_pixels_reference",
    "conv_reference",
]
