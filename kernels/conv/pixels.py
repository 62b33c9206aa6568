"""The first convolution of a network, straight from the pixels of an image.

    out[b,y,x,d] = sum_ijc (scale pixels[b, y+i-p, x+j-p, c]) weight[d,i,j,c] + bias[d]

where what lies outside of the image counts as `fill`. A map of the pixels before the convolution,
a u + e, is folded into weight and bias and stays exact at the border, where the network pads the
mapped image with zeros: weight a, bias + e sum(weight), and fill = -e/a, which maps to zero.

Shapes    pixels (B, h, w, 3); weight (D, k, k, 3), k odd, p = (k-1)/2; bias (D,);
          out (B, h, w, D)
Types     pixels uint8 or floating; weight in any floating dtype, which scaled pixels and fill are
          rounded to and out has; bias fp32 (fp64 for fp64); the kernel takes fp16 and bf16 weights
          and sums in fp32. Numbers 0 .. 255 are exact in both
Back ends triton and torch (by oneDNN or cuDNN, after a padded copy)
Backward  none: for networks that are not trained
Cost      2 B h w D k^2 3 operations; out is all that moves: the k^2 3 numbers of each pixel are
          gathered from the image where they are needed
Source    DALL-E's first convolution, 7 x 7 on 3 channels: 147 numbers, padded to 160
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels._triton import cdiv, gpu_of, launch, launch_obstacle, tl, triton
from beit_fast.kernels.arguments import check_backend, check_floating, run_or_torch, triton_or_torch
from beit_fast.kernels.exact_fp32 import exact_fp32
from beit_fast.kernels.registration import implement

BACKENDS = ("triton", "torch")
_STEP = 32  # of the sum over k^2 3


def conv_pixels_reference(
    pixels: Tensor, weight: Tensor, bias: Tensor, *, scale: float = 1.0, fill: float = 0.0
) -> Tensor:
    """The formula above."""
    p = weight.shape[1] // 2
    padded = F.pad(pixels.to(weight.dtype) * scale, (0, 0, p, p, p, p), value=fill)
    out = F.conv2d(padded.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias.to(weight.dtype))
    return out.permute(0, 2, 3, 1)


@triton.jit
def _conv_pixels_kernel(
    pixels_ptr,  # (B, h, w, 3)
    weight_ptr,  # (D, STEPS BLOCK_K), zero beyond k k 3
    bias_ptr,  # (D,)
    out_ptr,  # (B, h, w, D), written
    num_pixels,  # B h w
    h,
    w,
    D_EIGHTH,  # D / 8: what is multiplied by 8 is known to be aligned
    scale,  # fp32
    fill,  # fp32
    SIDE: tl.constexpr,  # k
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    D = D_EIGHTH * 8
    tiles_d = tl.cdiv(D, BLOCK_D)
    p = (tl.program_id(0) // tiles_d).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    here = p < num_pixels
    x = (p % w).to(tl.int32)
    y = (p // w % h).to(tl.int32)
    centre_ptr = pixels_ptr + p * 3
    # Outputs that are not there read the last one's weights, and are not written.
    weight_rows_ptr = weight_ptr + (tl.minimum(d, D - 1) * STEPS * BLOCK_K)[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for step in range(STEPS):
        place = step * BLOCK_K + k
        dy = place // (3 * SIDE) - SIDE // 2
        dx = place % (3 * SIDE) // 3 - SIDE // 2
        at_y, at_x = y[:, None] + dy[None, :], x[:, None] + dx[None, :]
        inside = (at_y >= 0) & (at_y < h) & (at_x >= 0) & (at_x < w) & here[:, None]
        inside &= (place < SIDE * SIDE * 3)[None, :]
        offset = (dy * w + dx) * 3 + place % 3
        values = tl.load(centre_ptr[:, None] + offset[None, :], mask=inside, other=0)
        values = tl.where(inside, values.to(tl.float32) * scale, fill)
        weights = tl.load(weight_rows_ptr + step * BLOCK_K)
        acc = tl.dot(values.to(weights.dtype), weights, acc)
    acc += tl.load(bias_ptr + d, mask=d < D, other=0.0)[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    written = here[:, None] & (d < D)[None, :]
    tl.store(out_ptr + (p * D)[:, None] + d[None, :], out, mask=written)


def conv_pixels_triton(
    pixels: Tensor, weight: Tensor, bias: Tensor, scale: float, fill: float
) -> Tensor:
    """`conv_pixels_reference` by the kernel: contiguous pixels, D a multiple of 8."""
    B, h, w, _ = pixels.shape
    D, side = len(weight), weight.shape[1]
    steps = cdiv(side * side * 3, _STEP)
    rows_DK = weight.reshape(D, -1)
    rows_DK = F.pad(rows_DK, (0, steps * _STEP - rows_DK.shape[1]))
    out = weight.new_empty((B, h, w, D))
    widest = 256 if gpu_of(pixels).capability[0] == 9 else 128  # elsewhere 256 spill
    block_d = min(widest, max(16, triton.next_power_of_2(D)))
    launch(
        _conv_pixels_kernel,
        (cdiv(B * h * w, 64) * cdiv(D, block_d),),
        on=pixels,
        num_warps=4,
        pixels_ptr=pixels,
        weight_ptr=rows_DK,
        bias_ptr=bias,
        out_ptr=out,
        num_pixels=B * h * w,
        h=h,
        w=w,
        D_EIGHTH=D // 8,
        scale=scale,
        fill=fill,
        SIDE=side,
        STEPS=steps,
        BLOCK_P=64,
        BLOCK_D=block_d,
        BLOCK_K=_STEP,
    )
    return out


def conv_pixels_torch(
    pixels: Tensor, weight: Tensor, bias: Tensor, scale: float, fill: float
) -> Tensor:
    """`conv_pixels_reference` in torch; the padded copy has three channels of some hundred."""
    B, h, w, _ = pixels.shape
    p = weight.shape[1] // 2
    padded = weight.new_full((B, h + 2 * p, w + 2 * p, 3), fill)
    padded[:, p : p + h, p : p + w] = (
        pixels
        if scale == 1
        else pixels.to(torch.promote_types(weight.dtype, torch.float32)) * scale
    )
    padded_B3hw, weight_D3kk = padded.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    with torch.autocast(pixels.device.type, enabled=False), exact_fp32():
        if pixels.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16):
            # In fp32 with one rounding at the end, as the kernel does.
            out = F.conv2d(padded_B3hw.float(), weight_D3kk.float(), bias).to(weight.dtype)
        else:
            out = F.conv2d(padded_B3hw, weight_D3kk, bias.to(weight.dtype))
    return out.permute(0, 2, 3, 1).contiguous()


torch.library.define(
    "beit_fast::conv_pixels",
    "(Tensor pixels, Tensor weight, Tensor bias, float scale, float fill, str backend) -> Tensor",
)


def _conv_pixels(pixels, weight, bias, scale, fill, backend):
    out = weight.new_empty((*pixels.shape[:3], len(weight)))
    if out.numel() == 0:
        return out
    arguments = (pixels.contiguous(), weight.contiguous(), bias, scale, fill)
    if backend == "torch":
        return conv_pixels_torch(*arguments)
    return run_or_torch(
        "conv_pixels",
        lambda: conv_pixels_triton(*arguments),
        lambda: conv_pixels_torch(*arguments),
    )


implement("conv_pixels", _conv_pixels)


@torch.library.register_fake("beit_fast::conv_pixels")
def _(pixels, weight, bias, scale, fill, backend):
    return weight.new_empty((*pixels.shape[:3], len(weight)))


def conv_pixels(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: float = 1.0,
    fill: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The convolution above, (B, h, w, 3) -> (B, h, w, D) in the weight's dtype.

    pixels uint8 or floating; weight (D, k, k, 3) with an odd k; bias (D,). `backend` one of
    BACKENDS, or what `conv_pixels_backend` answers. Carries no gradient.
    Raises ValueError where shapes or types do not fit, or the named back end cannot take them.
    """
    side = weight.shape[1] if weight.ndim == 4 else 0
    if pixels.ndim != 4 or pixels.shape[3] != 3 or weight.shape[1:] != (side, side, 3):
        raise ValueError(
            f"pixels are {tuple(pixels.shape)}, the weight {tuple(weight.shape)}: pass "
            "channels-last pixels (B, h, w, 3) and weight (D, k, k, 3) with an odd k"
        )
    if side % 2 == 0 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"the weight is {tuple(weight.shape)} and the bias {tuple(bias.shape)}: pass an odd k "
            f"and a bias ({len(weight)},)"
        )
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(f"pixels are {pixels.dtype}: pass uint8 or floats")
    check_floating(weight=weight, bias=bias)
    chosen = conv_pixels_backend(pixels, weight, backend)
    return torch.ops.beit_fast.conv_pixels(
        pixels.detach(), weight.detach(), bias.detach(), scale, fill, chosen
    )


def conv_pixels_backend(pixels: Tensor, weight: Tensor, backend: str | None = None) -> str:
    """What `conv_pixels` runs on for these: the one place that decides, as `conv_backend` does."""
    check_backend(backend, BACKENDS)
    if backend == "torch" or (backend is None and pixels.device.type == "cpu"):
        return "torch"
    obstacle = launch_obstacle(pixels, weight.dtype, operator="conv_pixels")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        obstacle = f"the kernel takes float16 and bfloat16 weights, not {weight.dtype}"
    elif len(weight) % 8:
        obstacle = f"the kernel gives channels in multiples of 8, not {len(weight)}"
    if backend is None and weight.dtype not in (torch.float16, torch.bfloat16):
        return "torch"  # other types have no kernel to miss
    return triton_or_torch("conv_pixels", backend, obstacle)
