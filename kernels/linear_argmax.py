"""The name under which `kernels/head/linear_argmax` is called from outside."""

from beit_fast.kernels.head.linear_argmax import linear_argmax, linear_argmax_reference

__all__ = [
    "linear_argmax",
    "linear_argmax_reference",
]
