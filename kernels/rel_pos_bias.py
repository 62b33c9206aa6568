"""The name under which `kernels/attention/rel_pos_bias` is called from outside."""

from beit_fast.kernels.attention.rel_pos_bias import (
    rel_pos_bias,
    rel_pos_bias_reference,
    relative_position_index,
    relative_position_rows,
)

__all__ = [
    "rel_pos_bias",
    "rel_pos_bias_reference",
    "relative_position_index",
    "relative_position_rows",
]
