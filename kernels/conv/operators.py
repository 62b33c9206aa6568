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

from beit_fast.kernels._triton import (
    HAS_TRITON,
    Gpu,
    cdiv,
    check_floating,
    gpu_of,
    launch,
    launch_obstacle,
    tl,
    triton,
    warn_once,
)
from beit_fast.kernels.exact_fp32 import exact_fp32

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

BACKENDS = ("triton", "cudnn", "onednn", "torch")
_PIXELS = 128  # of a tile
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


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relu(tile):
    if tile.dtype == tl.bfloat16:  # integers in the interpreter
        wide = tile.to(tl.float32)
        tile = _maximum(wide, tl.zeros_like(wide)).to(tl.bfloat16)
    else:
        tile = _maximum(tile, tl.zeros_like(tile))
    return tile


@triton.jit
def _best_of_quads(
    acc,  # (NB TH TW, BLOCK_D)
    NB: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
):
    """Maxima of 2 x 2 pixels, (NB TH/2 TW/2, BLOCK_D)."""
    BLOCK_D: tl.constexpr = acc.shape[1]
    quads = tl.reshape(acc, (NB * TH // 2, 2, TW // 2, 2, BLOCK_D))
    # Halves rather than `tl.reduce`, which the interpreter takes element by element.
    left, right = tl.split(tl.permute(quads, (0, 2, 4, 1, 3)))
    upper, lower = tl.split(_maximum(left, right))
    return tl.reshape(_maximum(upper, lower), (NB * TH * TW // 4, BLOCK_D))


@triton.jit
def _conv_kernel(
    x_desc,  # (B, h, w, C), blocks of (NB, TH, TW, BLOCK_C)
    weight_desc,  # (D, k k, C), blocks of (BLOCK_D, 1, BLOCK_C)
    bias_ptr,  # (D,)
    residual_desc,  # (B, h, w, D), blocks of (NB, TH, TW, BLOCK_D), or None
    out_desc,  # (B, h, w, D), written; with POOL (B, h/2, w/2, D) and half of TH and TW
    tiles_y,
    tiles_x,
    C,
    D,
    SIDE: tl.constexpr,  # k
    RELU_INPUT: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    NB: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Neighbouring programs read the same pixels, for other outputs.
    tiles_d = tl.cdiv(D, BLOCK_D)
    d0 = tl.program_id(0) % tiles_d * BLOCK_D
    tile = tl.program_id(0) // tiles_d
    x0 = tile % tiles_x * TW
    y0 = tile // tiles_x % tiles_y * TH
    b0 = tile // (tiles_x * tiles_y) * NB

    P: tl.constexpr = NB * TH * TW
    acc = tl.zeros((P, BLOCK_D), tl.float32)
    steps_c = tl.cdiv(C, BLOCK_C)
    for step in range(SIDE * SIDE * steps_c):
        place = step // steps_c
        c0 = (step - place * steps_c) * BLOCK_C
        y = y0 + place // SIDE - SIDE // 2
        x = x0 + place % SIDE - SIDE // 2
        pixels = tl.reshape(x_desc.load([b0, y, x, c0]), (P, BLOCK_C))
        weights = tl.reshape(weight_desc.load([d0, place, c0]), (BLOCK_D, BLOCK_C))
        if RELU_INPUT:
            pixels = _relu(pixels)
        acc = tl.dot(pixels, tl.trans(weights), acc)

    d = d0 + tl.arange(0, BLOCK_D)
    acc += tl.load(bias_ptr + d, mask=d < D, other=0.0)[None, :]
    if residual_desc is not None:
        acc += tl.reshape(residual_desc.load([b0, y0, x0, d0]), (P, BLOCK_D)).to(tl.float32)
    if RELU:
        acc = _relu(acc)
    if POOL:
        best = _best_of_quads(acc, NB, TH, TW).to(out_desc.dtype)
        best = tl.reshape(best, (NB, TH // 2, TW // 2, BLOCK_D))
        out_desc.store([b0, y0 // 2, x0 // 2, d0], best)
    else:
        out = tl.reshape(acc.to(out_desc.dtype), (NB, TH, TW, BLOCK_D))
        out_desc.store([b0, y0, x0, d0], out)


@triton.jit
def _conv_addressed_kernel(
    x_ptr,  # (B, h, w, C)
    weight_ptr,  # (D, k k, C)
    bias_ptr,  # (D,)
    residual_ptr,  # (B, h, w, D) or None
    out_ptr,  # (B, h, w, D), written; with POOL (B, h/2, w/2, D)
    B,
    h,
    w,
    tiles_y,
    tiles_x,
    C_EIGHTH,  # C / 8: what is multiplied by 8 is known to be aligned
    D_EIGHTH,
    SIDE: tl.constexpr,  # k
    RELU_INPUT: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    NB: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # `_conv_kernel` by addresses and masks, for GPUs without a copy engine.
    C, D = C_EIGHTH * 8, D_EIGHTH * 8
    tiles_d = tl.cdiv(D, BLOCK_D)
    d0 = tl.program_id(0) % tiles_d * BLOCK_D
    tile = tl.program_id(0) // tiles_d
    x0 = tile % tiles_x * TW
    y0 = tile // tiles_x % tiles_y * TH
    b0 = tile // (tiles_x * tiles_y) * NB

    P: tl.constexpr = NB * TH * TW
    p = tl.arange(0, P)
    b, y, x = b0 + p // (TH * TW), y0 + p // TW % TH, x0 + p % TW
    d = d0 + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    pixel = (b.to(tl.int64) * h + y) * w + x
    here = (b < B) & (y < h) & (x < w)
    x_rows_ptr = x_ptr + (pixel * C)[:, None] + c[None, :]
    # Outputs that are not there read the last one's weights, and are not written.
    weight_rows_ptr = weight_ptr + (tl.minimum(d, D - 1).to(tl.int64) * SIDE * SIDE * C)[None, :]
    acc = tl.zeros((P, BLOCK_D), tl.float32)
    steps_c = tl.cdiv(C, BLOCK_C)
    for step in range(SIDE * SIDE * steps_c):
        place = step // steps_c
        c0 = (step - place * steps_c) * BLOCK_C
        dy, dx = place // SIDE - SIDE // 2, place % SIDE - SIDE // 2
        inside = (b < B) & (y + dy >= 0) & (y + dy < h) & (x + dx >= 0) & (x + dx < w)
        left = c < C - c0
        pixels = tl.load(
            x_rows_ptr + ((dy * w + dx) * C + c0), mask=inside[:, None] & left[None, :], other=0.0
        )
        weights = tl.load(
            weight_rows_ptr + (place * C + c0) + c[:, None], mask=left[:, None], other=0.0
        )
        if RELU_INPUT:
            pixels = _relu(pixels)
        acc = tl.dot(pixels, weights, acc)

    acc += tl.load(bias_ptr + d, mask=d < D, other=0.0)[None, :]
    if residual_ptr is not None:
        written = here[:, None] & (d < D)[None, :]
        residual_rows_ptr = residual_ptr + (pixel * D)[:, None] + d[None, :]
        acc += tl.load(residual_rows_ptr, mask=written, other=0.0).to(tl.float32)
    if RELU:
        acc = _relu(acc)
    if POOL:
        acc = _best_of_quads(acc, NB, TH, TW)
        p = tl.arange(0, P // 4)
        y, x = y0 // 2 + p // (TW // 2) % (TH // 2), x0 // 2 + p % (TW // 2)
        b = b0 + p // (TH * TW // 4)
        here = (b < B) & (y < h // 2) & (x < w // 2)
        pixel = (b.to(tl.int64) * (h // 2) + y) * (w // 2) + x
    out_rows_ptr = out_ptr + (pixel * D)[:, None] + d[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_rows_ptr, out, mask=here[:, None] & (d < D)[None, :])


def conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu_input: bool,
    relu: bool,
    out: Tensor,
) -> None:
    """`conv_reference` into `out`, which may be the residual, and is smaller where it is pooled.

    Contiguous fp16 or bf16, channels in multiples of 8.
    """
    B, h, w, C = x.shape
    D, side = len(weight), weight.shape[1]
    pool = out.shape[1] < h
    gpu = gpu_of(x)
    block_c, block_d, options = _config(C, D, side, gpu)
    NB, TH, TW = tile_of(B, h, w)
    shared = {
        "bias_ptr": bias,
        "tiles_y": cdiv(h, TH),
        "tiles_x": cdiv(w, TW),
        "SIDE": side,
        "RELU_INPUT": relu_input,
        "RELU": relu,
        "POOL": pool,
        "NB": NB,
        "TH": TH,
        "TW": TW,
        "BLOCK_D": block_d,
        "BLOCK_C": block_c,
        **options,
    }
    grid = (cdiv(B, NB) * shared["tiles_y"] * shared["tiles_x"] * cdiv(D, block_d),)
    if gpu.capability < (9, 0):
        tensors = {"x_ptr": x, "weight_ptr": weight, "residual_ptr": residual, "out_ptr": out}
        sizes = {"B": B, "h": h, "w": w, "C_EIGHTH": C // 8, "D_EIGHTH": D // 8}
        launch(_conv_addressed_kernel, grid, on=x, **tensors, **sizes, **shared)
        return
    block = [NB, TH, TW, block_d]
    launch(
        _conv_kernel,
        grid,
        on=x,
        x_desc=_describe(x, [NB, TH, TW, block_c]),
        weight_desc=_describe(weight.view(D, side * side, C), [block_d, 1, block_c]),
        residual_desc=None if residual is None else _describe(residual, block),
        out_desc=_describe(out, [NB, TH // 2, TW // 2, block_d] if pool else block),
        C=C,
        D=D,
        **shared,
    )


def tile_of(B: int, h: int, w: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile of 128 pixels: the least beyond the images' edges.

    Of equals the one that is nearest to a square, whose neighbourhood is the smallest. A grid of
    14 x 14 gives 2 x 2 pixels of 32 images, without waste where there are as many.
    """
    sides = [(th, tw) for th in (2, 4, 8, 16) for tw in (2, 4, 8, 16) if th * tw <= _PIXELS]

    def cost(sides: tuple[int, int]) -> tuple[int, int]:
        th, tw = sides
        padded = cdiv(h, th) * th * cdiv(w, tw) * tw * cdiv(B, _PIXELS // (th * tw))
        return padded * _PIXELS // (th * tw), (th + 2) * (tw + 2) * _PIXELS // (th * tw)

    th, tw = min(sides, key=cost)
    return _PIXELS // (th * tw), th, tw


def _config(C: int, D: int, side: int, gpu: Gpu) -> tuple[int, int, dict[str, int]]:
    """(BLOCK_C, BLOCK_D, options) for the widths of DALL-E's encoder; none of it is measured.

    Widest outputs move least into shared memory for each product. A 1x1 convolution has few steps
    and a long epilogue: two programs on a multiprocessor hide one behind the other. Where products
    read registers the tiles must fit those, and 99 KiB, which is all that most such GPUs have.
    """
    block_c = 64 if C > 32 else 32 if C > 16 else 16
    if not gpu.multiplies_from_shared:
        block_d = min(128, max(16, triton.next_power_of_2(D)))
        warps = 8 if block_d == 128 else 4
        return min(block_c, 32), block_d, {"num_warps": warps, "num_stages": 4}
    widest = 256 if side > 1 and D >= 256 else 128
    block_d = min(widest, max(16, triton.next_power_of_2(D)))
    warps = 8 if block_d == 256 or (side == 1 and block_d == 128) else 4
    return block_c, block_d, {"num_warps": warps, "num_stages": 4}


def _describe(tensor: Tensor, block: list[int]) -> "TensorDescriptor":
    """Blocks of a contiguous tensor; beyond its edges they read zeros and write nothing."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


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
    if backend == "triton":
        residual = None if residual is None else residual.contiguous()
        conv_triton(x, weight, bias, residual, relu_input, relu, out)
        return out
    residual = None if residual is None else residual.clone(memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False), exact_fp32():
        out = conv_torch(x, weight, bias, residual, relu_input, relu, backend)
        return (_pool(out) if pool else out).contiguous()


def _conv_add_(x, weight, bias, out, relu_input, relu, backend):
    if out.numel() == 0:
        return
    x, weight = x.contiguous(), weight.contiguous()
    if backend == "triton":
        conv_triton(x, weight, bias, out, relu_input, relu, out)
        return
    with torch.autocast(x.device.type, enabled=False), exact_fp32():
        conv_torch(x, weight, bias, out, relu_input, relu, backend)


# As a decorator `impl` would leave None behind in place of the function.
torch.library.impl("beit_fast::conv", ("CPU", "CUDA"), _conv)
torch.library.impl("beit_fast::conv_add_", ("CPU", "CUDA"), _conv_add_)


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
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend is {backend!r}: pass one of {', '.join(BACKENDS)}, or None")
    device = x.device.type
    wanted = backend or ("onednn" if device == "cpu" else "triton")
    obstacle = conv_obstacle(wanted, x, weight)
    if obstacle is None:
        return wanted
    if backend is not None:
        raise ValueError(f"backend={backend!r} cannot run here: {obstacle}; pass backend=None")
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
    return launch_obstacle(x, x.dtype)


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
