"""The name under which `kernels/input/ragged_views` is called from outside."""

from beit_fast.kernels.input.ragged_views import ragged_views
from beit_fast.kernels.input.ragged_views_reference import ragged_views_reference

__all__ = [
    "ragged_views",
    "ragged_views_reference",
]
