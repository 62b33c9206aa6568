"""What operators of torch.library share, beside the schema that each one defines itself."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def implement(operator: str, function: Callable) -> None:
    """Make it what the operator runs on CPUs and on CUDA.

    As a decorator torch's own would leave None behind in place of the function.
    """
    torch.library.impl(f"beit_fast::{operator}", ("CPU", "CUDA"), function)


def or_empty(like: Tensor, tensors: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """The tensors, and an empty one for each that is not wanted: operators return no None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)
