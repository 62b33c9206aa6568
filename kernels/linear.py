"""A linear layer, by the faster of the matrix libraries that torch is built with.

    out[...,f] = sum_d x[...,d] weight[f,d] + bias[f]

Shapes    x (..., D); weight (F, D); bias (F,) or None; out (..., F)
Types     as torch.nn.functional.linear, autocast included
Backward  dx = dout weight;  dweight = dout^T x;  dbias = sum dout
Cost      one product forward, two backward: bound by arithmetic, 9/10 of a step on a CPU
Source    oneDNN's inner product, as torch.compile uses it on CPUs (torch `mkldnn_fusion.py`)
Legend    F counts outputs here
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.arguments import check_product

NOT_TRACED = (
    "torch.jit.trace, torch.jit.script and torch.onnx.export(dynamo=False) cannot look into these "
    "kernels: use torch.export.export, or torch.onnx.export(..., dynamo=True); "
    "beit_fast.restore(model) takes the kernels out of an accelerated model"
)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's own."""
    return F.linear(x, weight, bias)


class _LinearOneDnn(torch.autograd.Function):
    """out and dx in oneDNN, where torch takes MKL for fp32: a tenth less time on AMD processors.

    At 788 x 768 x 3072, one core of an AMD EPYC: out 36 ms against 40, dx 34 against 37. dweight
    is as fast in MKL (37 ms), and needs less scratch memory there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad
        dout_MF, x_MD = dout.flatten(0, -2), x.flatten(0, -2)
        dx = None
        if needs_dx:  # by an operator that autograd sees through, where it is asked to
            dx = dout @ weight if torch.is_grad_enabled() else _product(dout, weight.t())
        dweight = dout_MF.t() @ x_MD if needs_dweight else None
        return dx, dweight, dout_MF.sum(dim=0) if needs_dbias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, (..., F): torch.nn.functional.linear, quicker in fp32 on CPUs.

    x (..., D), at least two axes; weight (F, D); bias (F,) or None. On the CPU in fp32, outside
    autocast and torch.compile, oneDNN multiplies; all else is torch's own.
    Raises ValueError where shapes or dtypes do not fit, and under torch.jit.trace.
    """
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise ValueError(NOT_TRACED)
    if x.ndim < 2 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)}, the weight {tuple(weight.shape)}: pass x (..., D) and "
            "weight (F, D)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias is {tuple(bias.shape)}: pass ({weight.shape[0]},), or None")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        check_product(x=x, weight=weight, bias=bias)
    if _takes_onednn(x, weight, bias):
        return _LinearOneDnn.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn()
    )


@functools.cache
def _has_onednn() -> bool:
    # The operator is torch's, but private: a build without it still runs, on torch's own linear.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
