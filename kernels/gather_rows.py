"""The name under which `kernels/head/gather_rows` is called from outside."""

from beit_fast.kernels.head.gather_rows import gather_rows, gather_rows_reference

__all__ = [
    "gather_rows",
    "gather_rows_reference",
]
