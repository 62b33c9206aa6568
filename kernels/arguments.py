"""What operators ask of their arguments: each check names what came and what to pass.

    check_floating(x=x, weight=weight)

Checks of shapes stay with the operator, whose shapes they are.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from beit_fast.kernels._triton import TRITON_DTYPES, KernelError, _failed, warn_once

T = TypeVar("T")

INDEX_DTYPES = (torch.int32, torch.int64)


def check_floating(**tensors: Tensor | None) -> None:
    """Raise ValueError that names a tensor which is not of floats: torch would make do with it."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: pass floats")


def check_product(**tensors: Tensor | None) -> None:
    """Raise ValueError unless these are of one dtype, or autocast brings them to one."""
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    dtypes = {tensor.dtype for tensor in there.values()}
    if len(dtypes) == 1:
        return
    is_cast = autocast_dtype(next(iter(there.values())).device) is not None
    if not is_cast or not dtypes <= set(TRITON_DTYPES):
        raise ValueError(
            f"{', '.join(f'{name} is {tensor.dtype}' for name, tensor in there.items())}: cast "
            "them to one dtype, or run under torch.autocast, which takes float32, bfloat16 and "
            "float16"
        )


def check_index(index: Tensor, rows: str = "rows of x with B and N flattened") -> None:
    """Raise ValueError unless it is one, of what `rows` says."""
    if index.ndim != 1 or index.dtype not in INDEX_DTYPES:
        raise ValueError(
            f"the index is {index.dtype} {tuple(index.shape)}: pass int32 or int64 (I,), {rows}, "
            "-1 for padding"
        )


def check_index_values(index: Tensor, num_rows: int, rows: str = "x has {} rows") -> None:
    """Raise ValueError for the first row that is not one of `num_rows`; waits for a GPU."""
    wrong = (index < -1) | (index >= num_rows)
    if wrong.any():
        i = wrong.nonzero()[0].item()
        raise ValueError(
            f"index[{i}] is {index[i].item()}, and {rows.format(num_rows)}: pass 0 .. "
            f"{num_rows - 1}, or -1 for padding"
        )


def check_rng(rng: Tensor, device: torch.device) -> None:
    """Raise ValueError unless it is a seed and an offset there."""
    if rng.shape != (2,) or rng.dtype != torch.int64 or rng.device != device:
        raise ValueError(
            f"rng is {rng.dtype} {tuple(rng.shape)} on {rng.device}: pass int64 (2,), seed and "
            f"offset, on {device}, as philox.draw_rng gives"
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of floats there, or None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def check_backend(backend: str | None, backends: tuple[str, ...]) -> None:
    """Raise ValueError unless it is one of them, or None."""
    if backend not in (None, *backends):
        raise ValueError(f"backend is {backend!r}: pass one of {', '.join(backends)}, or None")


def cannot_run(backend: str, obstacle: str) -> ValueError:
    """The refusal of a back end that was asked for by name."""
    return ValueError(f"backend={backend!r} cannot run here: {obstacle}; pass backend=None")


def triton_or_torch(
    operator: str, backend: str | None, obstacle: str | None, lost: str = "slower"
) -> str:
    """The kernels, or torch where something is in their way, which is said once for each reason.

    Raises ValueError where `backend`, the caller's wish, is "triton" and cannot be.
    """
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise cannot_run(backend, obstacle)
    warn_once(f"{operator} runs on torch, {lost}: {obstacle}", stacklevel=5)
    return "torch"


def run_or_torch(
    operator: str,
    on_kernels: Callable[[], T],
    on_torch: Callable[[], T],
    *,
    backend: str | None = None,
    lost: str = "slower",
) -> T:
    """What the kernels give; where one of them cannot be compiled what torch gives, in this process
    from then on, which is said once.

    Only what has written nothing of its inputs may run again. Raises KernelError inside the capture
    of a CUDA graph, which holds what was launched before, and ValueError where `backend`, the
    caller's wish, is "triton".
    """
    if operator in _failed and backend != "triton":
        return on_torch()
    try:
        return on_kernels()
    except KernelError as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise
        triton_or_torch(operator, backend, str(error), lost)
        _failed[operator] = str(error)
        return on_torch()
