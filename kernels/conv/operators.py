"""Convolution over channels-last images with what surrounds it in a residual network, fused.

    out[b,y,x,d] = sum_ijc f(x[b, y+i-p, x+j-p, c]) weight[d,i,j,c] + bias[d] + residual[b,y,x,d]

with f the ReLU or nothing, zeros outside of the image, and then, each if asked for, a ReLU and the
maximum over 2 x 2 pixels.

Shapes    x (B, h, w, C); weight (D, k, k, C), k odd, p = (k-1)/2; bias (D,); residual as the sum;
          out (B, h, w, D), with `pool` (B, h/2, w/2, D)
Types     x, weight and residual in one floating dtype, which out has; bias fp32 (fp64 for fp64);
          the kernel takes fp16 and bf16, and sums in fp32 with one rounding at the end; fp32 is
          not rounded to TF32
Back ends triton  implicit GEMM: blocks of pixels arrive by tensor descriptors, whose zeros beyond
                  the image are the padding; the rest of the formula is in its epilogue
          cudnn   torch's cuDNN operators, ReLU fused where they can; the rest are torch's
          onednn  torch's CPU operators with ReLU and the residual fused; what the CPU has no
                  instructions for, fp16 mostly, in fp32 with one rounding at the end
          torch   any device and dtype
Backward  none: for networks that are not trained
Cost      2 B h w D k^2 C operations, each of x, residual and out moved once; fused pooling leaves a
          quarter of out, and no read of it
Source    DALL-E's encoder, arXiv:2102.12092 app. A, runs ReLU, bias, gain and addition unfused
Legend    C, D: channels in and out; h, w: pixels; P: pixels of a tile, NB x TH x TW
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels._triton import launch_obstacle, warn_once
from beit_fast.kernels.arguments import (
    cannot_run,
    check_backend,
    check_floating,
    run_or_torch,
)
from beit_fast.kernels.conv.implicit_gemm import conv_triton
from beit_fast.kernels.exact_fp32 import exact_fp32
from beit_fast.kernels.registration import implement

BACKENDS = ("triton", "cudnn", "onednn", "torch")
# oneDNN's operators are torch's, but private: a build without them runs on its public ones.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_convolution_pointwise"
)
_ONEDNN_DTYPES = {torch.float32}  # as they are
if _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _ONEDNN_DTYPES.add(torch.bfloat16)
_HAS_CUDNN = torch.backends.cudnn.is_available()


def conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    relu_input: bool = False,
    relu: bool = False,
    pool: bool = False,
) -> Tensor:
    """The formula above."""
    x, weight = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    x = F.relu(x) if relu_input else x
    out = F.conv2d(x, weight, bias.to(x.dtype), padding=weight.shape[-1] // 2)
    out = out if residual is None else out + residual.permute(0, 3, 1, 2)
    out = F.relu(out) if relu else out
    return (F.max_pool2d(out, 2) if pool else out).permute(0, 2, 3, 1)


def conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu_input: bool,
    relu: bool,
    backend: str,
) -> Tensor:
    """`conv_reference` by a library that torch is built with; the residual is used up."""
    dtype = x.dtype
    if backend == "onednn" and dtype not in _ONEDNN_DTYPES:  # in fp32, and rounded once
        x, weight = x.float(), weight.float()
        wide = None if residual is None else residual.float()
        out = conv_torch(x, weight, bias, wide, relu_input, relu, backend)
        return out.to(dtype) if residual is None else residual.copy_(out)
    x_BChw, weight_DCkk = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    x_BChw = F.relu(x_BChw) if relu_input else x_BChw
    padding, ones = [weight.shape[1] // 2] * 2, [1, 1]
    sum_BDhw = None if residual is None else residual.permute(0, 3, 1, 2)
    bias = bias.to(x.dtype)
    if backend == "onednn" and residual is None:
        out = torch.ops.mkldnn._convolution_pointwise(
            x_BChw, weight_DCkk, bias, padding, ones, ones, 1, "relu" if relu else "none", [], ""
        )
    elif backend == "onednn":
        # Beyond the in-place form there is one that is no faster than an addition afterwards.
        out = torch.ops.mkldnn._convolution_pointwise_.binary(
            sum_BDhw, x_BChw, weight_DCkk, bias, padding, ones, ones, 1, "add", None,
            "relu" if relu else None, [], "",
        )  # fmt: skip
    elif backend == "cudnn" and residual is None and relu:
        out = torch.cudnn_convolution_relu(x_BChw, weight_DCkk, bias, ones, padding, ones, 1)
    else:
        out = F.conv2d(x_BChw, weight_DCkk, bias, padding=padding)
        out = out if residual is None else sum_BDhw.add_(out)
        out = out.relu_() if relu else out
    return out.permute(0, 2, 3, 1)


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, {}, bool relu_input, bool relu"
torch.library.define(
    "beit_fast::conv",
    f"({_ARGUMENTS.format('Tensor? residual')}, bool pool, str backend) -> Tensor",
)
torch.library.define(
    "beit_fast::conv_add_", f"({_ARGUMENTS.format('Tensor(a!) out')}, str backend) -> ()"
)


def _conv(x, weight, bias, residual, relu_input, relu, pool, backend):
    out = _empty_output(x, weight, pool)
    if out.numel() == 0:
        return out
    x, weight = x.contiguous(), weight.contiguous()

    def by_torch(chosen: str) -> Tensor:
        kept = None if residual is None else residual.clone(memory_format=torch.contiguous_format)
        with torch.autocast(x.device.type, enabled=False), exact_fp32():
            out = conv_torch(x, weight, bias, kept, relu_input, relu, chosen)
            return (_pool(out) if pool else out).contiguous()

    def by_kernel() -> Tensor:
        added = None if residual is None else residual.contiguous()
        conv_triton(x, weight, bias, added, relu_input, relu, out)
        return out

    if backend != "triton":
        return by_torch(backend)
    return run_or_torch("conv", by_kernel, lambda: by_torch("torch"))


def _conv_add_(x, weight, bias, out, relu_input, relu, backend):
    if out.numel() == 0:
        return
    x, weight = x.contiguous(), weight.contiguous()

    def by_torch(chosen: str) -> None:
        with torch.autocast(x.device.type, enabled=False), exact_fp32():
            conv_torch(x, weight, bias, out, relu_input, relu, chosen)

    def by_kernel() -> None:
        conv_triton(x, weight, bias, out, relu_input, relu, out)

    if backend == "triton":
        run_or_torch("conv", by_kernel, lambda: by_torch("torch"))
    else:
        by_torch(backend)


implement("conv", _conv)
implement("conv_add_", _conv_add_)


@torch.library.register_fake("beit_fast::conv")
def _(x, weight, bias, residual, relu_input, relu, pool, backend):
    return _empty_output(x, weight, pool)


@torch.library.register_fake("beit_fast::conv_add_")
def _(x, weight, bias, out, relu_input, relu, backend):
    return None


def _empty_output(x: Tensor, weight: Tensor, pool: bool) -> Tensor:
    B, h, w, _ = x.shape
    return x.new_empty((B, h // 2, w // 2, len(weight)) if pool else (B, h, w, len(weight)))


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    relu_input: bool = False,
    relu: bool = False,
    pool: bool = False,
    overwrite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The convolution above, of stride 1 and with the image's size, then halved by `pool`.

    x (B, h, w, C), weight (D, k, k, C), residual (B, h, w, D) or None, all of one dtype; bias
    (D,). With `overwrite` the residual's memory, which is then contiguous, may be used for the
    result. `backend` one of BACKENDS, or what `conv_backend` answers. Carries no gradient.
    Raises ValueError where shapes or types do not fit, or the named back end cannot take them.
    """
    _check(x, weight, bias, residual, pool)
    chosen = conv_backend(x, weight, backend)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    residual = None if residual is None else residual.detach()
    fuses_pool = pool and chosen == "triton"
    if residual is None or not overwrite or fuses_pool or not residual.is_contiguous():
        return torch.ops.beit_fast.conv(x, weight, bias, residual, relu_input, relu, pool, chosen)
    torch.ops.beit_fast.conv_add_(x, weight, bias, residual, relu_input, relu, chosen)
    return _pool(residual).contiguous() if pool else residual


def conv_backend(x: Tensor, weight: Tensor, backend: str | None = None) -> str:
    """What `conv` runs on for these: the one place that decides.

    Without a name the kernel on CUDA, oneDNN on CPUs; where one of them cannot, cuDNN or torch,
    which is said once for each reason. A name that cannot run raises ValueError.
    The kernel is the default for its traffic, on paper 136 MB an image in DALL-E's encoder against
    435 unfused. On a GPU that is not measured: `bench/tokenizer.py speed` decides where one is.
    """
    check_backend(backend, BACKENDS)
    device = x.device.type
    wanted = backend or ("onednn" if device == "cpu" else "triton")
    obstacle = conv_obstacle(wanted, x, weight)
    if obstacle is None:
        return wanted
    if backend is not None:
        raise cannot_run(backend, obstacle)
    fallback = "cudnn" if conv_obstacle("cudnn", x, weight) is None else "torch"
    if x.dtype != torch.float64 and (device != "cuda" or x.dtype != torch.float32):
        warn_once(f"conv runs on {fallback}, slower than {wanted}: {obstacle}")
    return fallback


def conv_obstacle(backend: str, x: Tensor, weight: Tensor) -> str | None:
    """Why a back end cannot run the convolution, or None."""
    device = x.device.type
    if backend == "torch":
        return None
    if backend == "onednn":
        if device != "cpu" or not _HAS_ONEDNN:
            return f"torch has no oneDNN for {device} tensors"
        return "oneDNN has no convolution of float64" if x.dtype == torch.float64 else None
    if backend == "cudnn":
        return None if device == "cuda" and _HAS_CUDNN else f"cuDNN takes no {device} tensors"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {x.dtype}"
    if x.shape[-1] % 8 or len(weight) % 8:
        return f"the kernel takes channels in multiples of 8, not {x.shape[-1]} to {len(weight)}"
    return launch_obstacle(x, x.dtype, operator="conv")


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, pool: bool) -> None:
    side = weight.shape[1] if weight.ndim == 4 else 0
    if x.ndim != 4 or side % 2 == 0 or weight.shape[1:] != (side, side, x.shape[-1]):
        raise ValueError(
            f"x is {tuple(x.shape)}, the weight {tuple(weight.shape)}: pass channels-last x "
            "(B, h, w, C) and weight (D, k, k, C) with an odd k"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias is {tuple(bias.shape)}: pass ({len(weight)},)")
    check_floating(bias=bias)
    if residual is not None and residual.shape != (*x.shape[:3], len(weight)):
        raise ValueError(
            f"the residual is {tuple(residual.shape)}: pass {(*x.shape[:3], len(weight))}"
        )
    dtypes = {t.dtype for t in (x, weight, residual) if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        raise ValueError(
            f"x, weight and residual are {', '.join(sorted(map(str, dtypes)))}: pass one floating "
            "dtype"
        )
    if pool and (x.shape[1] % 2 or x.shape[2] % 2):
        raise ValueError(
            f"x is {x.shape[1]} x {x.shape[2]}: pooling by 2 x 2 needs even sides, or pass "
            "pool=False"
        )
