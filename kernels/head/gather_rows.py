"""Listed rows of a tensor as a compact matrix, so that what follows computes no others.

    out[i] = x[index[i]]
    dx[r]  = sum of dout[i] over index[i] = r,  0 where no i lists r

`gather_norm` without its norm, as an operator with a gradient.

Shapes    x (B, N, D), its rows counted over B N; index (I,); out (I, D)
Types     out and dx have x's dtype; rows listed more than once are added in fp32
Padding   index -1: out is 0, and nothing goes back
Backward  one pass over dx, deterministic; neither x nor out is kept. Differentiable again
Cost      forward moves 2 I D elements, backward I D + B N D: bound by memory
"""

import torch
from torch import Tensor

from beit_fast.kernels._triton import launch_obstacle
from beit_fast.kernels.arguments import (
    check_backend,
    check_floating,
    check_index,
    check_index_values,
    run_or_torch,
    triton_or_torch,
)
from beit_fast.kernels.head.gather_norm import (
    WIDEST,
    gather_norm,
    gather_norm_reference,
    gather_norm_torch,
)
from beit_fast.kernels.head.scatter_norm import scatter_norm_backward, scatter_norm_backward_torch
from beit_fast.kernels.registration import implement

BACKENDS = ("triton", "torch")
_LOST = "slower and not deterministic"


def gather_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    """The first formula above for an index within range, -1 included."""
    return gather_norm_reference(x, index)


# `backend` is "triton" or "torch"; `shape` is x's.
torch.library.define(
    "beit_fast::gather_rows", "(Tensor x, Tensor index, str backend) -> Tensor out"
)
torch.library.define(
    "beit_fast::gather_rows_backward",
    "(Tensor dout, Tensor index, SymInt[] shape, str backend) -> Tensor dx",
)


def _forward(x: Tensor, index: Tensor, backend: str) -> Tensor:
    if x.device.type == "cpu" and backend == "torch":
        check_index_values(index, x.shape[0] * x.shape[1])
    arguments = (x, index, None, None, 0.0, x.dtype)
    if backend == "torch":
        return gather_norm_torch(*arguments)[0]
    return run_or_torch(
        "gather_rows",
        lambda: gather_norm(*arguments),
        lambda: gather_norm_torch(*arguments),
        lost=_LOST,
    )[0]


def _backward(dout: Tensor, index: Tensor, shape: list[int], backend: str) -> Tensor:
    like_x = dout.new_empty((1, 1, shape[2])).expand(shape)  # without a norm no value is read
    ones = torch.ones(1, dtype=torch.promote_types(dout.dtype, torch.float32), device=dout.device)
    wanted = {"needs_x": True, "needs_weight": False, "needs_bias": False}
    arguments = (dout, index, ones, like_x, dout.new_empty(2, 0), None)
    if backend == "torch":
        return scatter_norm_backward_torch(*arguments, **wanted)[0]
    return run_or_torch(
        "gather_rows",
        lambda: scatter_norm_backward(*arguments, **wanted),
        lambda: scatter_norm_backward_torch(*arguments, **wanted),
        lost=_LOST,
    )[0]


implement("gather_rows", _forward)
implement("gather_rows_backward", _backward)


@torch.library.register_fake("beit_fast::gather_rows")
def _(x, index, backend):
    return x.new_empty((index.shape[0], x.shape[2]))


@torch.library.register_fake("beit_fast::gather_rows_backward")
def _(dout, index, shape, backend):
    return dout.new_empty(shape)


def _save(ctx, inputs, output) -> None:
    x, index, ctx.backend = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(index)


def _differentiate(ctx, dout: Tensor):
    (index,) = ctx.saved_tensors
    arguments = (dout.contiguous(), index, ctx.shape, ctx.backend)
    return torch.ops.beit_fast.gather_rows_backward(*arguments), None, None


def _save_backward(ctx, inputs, output) -> None:
    _, index, _, ctx.backend = inputs
    ctx.save_for_backward(index)


def _differentiate_backward(ctx, ddx: Tensor):
    # dx is linear in dout: the gradient of dout is what forward does to that of dx.
    (index,) = ctx.saved_tensors
    return torch.ops.beit_fast.gather_rows(ddx, index, ctx.backend), None, None, None


torch.library.register_autograd("beit_fast::gather_rows", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "beit_fast::gather_rows_backward", _differentiate_backward, setup_context=_save_backward
)


def gather_rows(x: Tensor, index: Tensor, *, backend: str | None = None) -> Tensor:
    """The rows of x (B, N, D) that `index` lists, (I, D): static shapes, and no wait for a GPU.

    index int32 or int64 (I,) into the B N rows, in any order, repeats included; -1 gives zeros.
    `backend` is "triton", the default on CUDA, or "torch", elsewhere. Out of range an index raises
    ValueError on a CPU, and gives NaN on a GPU.
    Raises ValueError where shapes do not fit.

    >>> gather_rows(torch.arange(4.0).view(2, 1, 2), torch.tensor([1, -1]))
    tensor([[2., 3.],
            [0., 0.]])
    """
    if x.ndim != 3:
        raise ValueError(f"x is {tuple(x.shape)}: pass (B, N, D)")
    check_floating(x=x)
    check_index(index)
    return torch.ops.beit_fast.gather_rows(x, index.contiguous(), _resolve(x, backend))


def _resolve(x: Tensor, backend: str | None) -> str:
    check_backend(backend, BACKENDS)
    if backend == "torch" or (backend is None and x.device.type != "cuda"):
        return "torch"
    obstacle = launch_obstacle(x, x.dtype, operator="gather_rows")
    if x.shape[2] > WIDEST:
        obstacle = f"the kernels take up to {WIDEST} channels, not {x.shape[2]}"
    return triton_or_torch("gather_rows", backend, obstacle, _LOST)
