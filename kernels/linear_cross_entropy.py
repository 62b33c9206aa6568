"""The name under which `kernels/head/linear_cross_entropy` is called from outside."""

from beit_fast.kernels.head.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)

__all__ = [
    "masked_linear_cross_entropy",
    "masked_linear_cross_entropy_reference",
]
