"""The launches that `machine_code.py` compiles: each kernel at the shapes that decide its code.

A case calls a launcher with meta tensors, which have shapes and no memory.
"""

from collections.abc import Callable

import torch

from beit_fast.kernels.attention.backward import attention_backward
from beit_fast.kernels.attention.bias import pad_bias, padded_dtype, padded_length, sum_partials
from beit_fast.kernels.attention.forward import attention_forward
from beit_fast.kernels.attention.rel_pos_bias import reduce_to_table
from beit_fast.kernels.conv.implicit_gemm import conv_triton
from beit_fast.kernels.conv.pixels import conv_pixels_triton
from beit_fast.kernels.head.gather_norm import gather_norm
from beit_fast.kernels.head.linear_argmax import linear_argmax_triton
from beit_fast.kernels.head.scatter_norm import scatter_norm_backward
from beit_fast.kernels.head.softmax_cross_entropy import cross_entropy_
from beit_fast.kernels.input.mask_embed_kernels import mask_embed_backward, mask_embed_forward
from beit_fast.kernels.input.patches import normalized_patches_triton
from beit_fast.kernels.input.ragged_views_triton import ragged_views_triton
from beit_fast.kernels.residual.backward import scale_residual_backward
from beit_fast.kernels.residual.forward import scale_residual_forward

DEVICE = "meta"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES: dict[str, Callable[[], object]] = {}


def scale_residual(
    D: int,
    stream: torch.dtype,
    *,
    drops: bool = False,
    compact: bool = False,
    folded: bool = False,
    norm: bool = True,
) -> None:
    """Forward and backward at batch 256 and 197 tokens, with all gradients; bf16 branches.

    `drops`: element dropout and drop path by Philox; `compact`: branch and norm of 243 samples;
    `folded`: gamma and the norm's affine are in the weights.
    """
    B, N = 256, 197
    C = 243 if compact else B
    x, out = (torch.empty(B, N, D, dtype=stream, device=DEVICE) for _ in range(2))
    branch, ln = (torch.empty(C, N, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    mean = torch.empty(C, N, device=DEVICE)
    vector = torch.empty(D, device=DEVICE)
    gamma = affine = None if folded else vector
    slots = torch.empty(B, dtype=torch.int32, device=DEVICE) if compact else None
    keep = None if compact or drops else torch.empty(B, device=DEVICE)
    rng = torch.empty(2, dtype=torch.int64, device=DEVICE)
    options = {"scale": 1.0, "dropout_p": 0.1 * drops, "drop_path_p": 0.1 * drops, "rng": rng}
    statistics = (mean, mean) if norm else (None, None)
    scale_residual_forward(
        x, branch, vector, gamma, keep, slots, affine, affine, slots,
        eps=1e-6, out=out, ln=ln if norm else None, mean=statistics[0], rstd=statistics[1],
        **options,
    )  # fmt: skip
    scale_residual_backward(
        x, ln if norm else None, out if norm else None, *statistics, affine, slots,
        None if folded else branch, vector, gamma, keep, slots,
        shape=(B, N, D), dx=out if norm else None, dbranch=branch, dbias=vector, dgamma=gamma,
        dnorm_weight=affine if norm else None, dnorm_bias=affine if norm else None, **options,
    )  # fmt: skip


CASES |= {
    "residual-D768-bf16": lambda: scale_residual(768, BF16),
    "residual-D768-fp32": lambda: scale_residual(768, FP32),
    "residual-D1024-bf16": lambda: scale_residual(1024, BF16),
    "residual-D1024-fp32": lambda: scale_residual(1024, FP32),
    "residual-D768-bf16-drops": lambda: scale_residual(768, BF16, drops=True),
    "residual-D768-bf16-compact": lambda: scale_residual(768, BF16, compact=True),
    "residual-D768-fp32-folded": lambda: scale_residual(768, FP32, folded=True),
    "residual-D768-bf16-no-norm": lambda: scale_residual(768, BF16, norm=False),
    "residual-D192-bf16": lambda: scale_residual(192, BF16),
    "residual-D384-bf16": lambda: scale_residual(384, BF16),
    "residual-D1280-bf16": lambda: scale_residual(1280, BF16),
    "residual-D1408-bf16": lambda: scale_residual(1408, BF16),
    "residual-D8192-bf16": lambda: scale_residual(8192, BF16),
}


def attention(
    B: int,
    N: int,
    H: int = 12,
    K: int = 64,
    M: int | None = None,
    G: int = 1,
    dtype: torch.dtype = BF16,
    dropout_p: float = 0.0,
    trains_bias: bool = True,
) -> None:
    """Forward and backward of attention, packed where queries and keys are the same tokens."""
    options = {"scale": K**-0.5, "dropout_p": dropout_p, "tf32": False}
    options["rng"] = torch.empty(2, dtype=torch.int64, device=DEVICE) if dropout_p else None
    if M is None:
        qkv, dqkv = (torch.empty(B, N, 3, H, K, dtype=dtype, device=DEVICE) for _ in range(2))
        (q, k, v), (dq, dk, dv) = qkv.unbind(2), dqkv.unbind(2)
        M = N
    else:
        q, dq = (torch.empty(B, N, H, K, dtype=dtype, device=DEVICE) for _ in range(2))
        k, v, dk, dv = (torch.empty(B, M, H, K, dtype=dtype, device=DEVICE) for _ in range(4))
    out, dout = (torch.empty(B, N, H, K, dtype=dtype, device=DEVICE) for _ in range(2))
    lse = torch.empty(B, H, N, device=DEVICE)
    shape = (G, H, padded_length(N), padded_length(M))
    bias = torch.empty(shape, dtype=padded_dtype(dtype), device=DEVICE)
    attention_forward(q, k, v, bias, out=out, lse=lse, **options)
    gradients = {"dq": dq, "dk": dk, "dv": dv, "trains_bias": trains_bias}
    attention_backward(dout, q, k, v, bias, out, lse, **gradients, **options)


def attention_bias() -> None:
    """Around the kernels: padding, the table there and back, the sum of partials."""
    q = torch.empty(256, 197, 12, 64, dtype=torch.bfloat16, device=DEVICE)
    table = torch.empty(732, 12, device=DEVICE)
    pad_bias(table, [14, 14], q, 197, 0.125)
    pad_bias(torch.empty(12, 197, 197, device=DEVICE), [], q, 197, 0.125)
    partials = torch.empty(11, 1, 12, 256, 256, device=DEVICE)
    sum_partials(partials, 197, 197, torch.float32)
    reduce_to_table(partials[:, 0], (14, 14), torch.float32)


CASES |= {
    "attention-N197": lambda: attention(256, 197),
    "attention-N197-frozen": lambda: attention(256, 197, trains_bias=False),
    "attention-N197-fp16": lambda: attention(256, 197, dtype=FP16),
    "attention-N197-fp32": lambda: attention(64, 197, dtype=FP32),
    "attention-N197-dropout": lambda: attention(256, 197, dropout_p=0.1),
    "attention-N197-K128": lambda: attention(256, 197, H=6, K=128),
    "attention-N49-K32": lambda: attention(8192, 49, H=3, K=32),
    "attention-N49-K32-masks": lambda: attention(8192, 49, H=3, K=32, G=64),
    "attention-N64": lambda: attention(4096, 64),
    "attention-N64-frozen": lambda: attention(4096, 64, trains_bias=False),
    "attention-N128": lambda: attention(1024, 128),
    "attention-N144": lambda: attention(1024, 144),
    "attention-N256": lambda: attention(256, 256),
    "attention-N577": lambda: attention(64, 577),
    "attention-N1025": lambda: attention(64, 1025, H=16),
    "attention-N257-K80": lambda: attention(64, 257, H=16, K=80),
    "attention-N257-K96": lambda: attention(64, 257, H=16, K=96),
    "attention-N257-K128": lambda: attention(64, 257, H=16, K=128),
    "attention-N50-M300": lambda: attention(64, 50, M=300),
    "attention-N200-M64": lambda: attention(64, 200, M=64),
    "attention-bias": attention_bias,
}


def cross_entropy(
    D: int, V: int, stream: torch.dtype, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> None:
    """The head at batch 256, forward and backward with all gradients; products in bf16."""
    rows, N = 256 * 75, 197
    x = torch.empty(256, N, D, dtype=stream, device=DEVICE)
    index = torch.empty(rows, dtype=torch.int32, device=DEVICE)
    target = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    norm = torch.empty(D, device=DEVICE)
    factor = torch.empty(1, device=DEVICE)
    rows_ID, stats = gather_norm(x, index, norm, norm, 1e-6, BF16)
    logits = torch.empty(1024, -(-V // 16) * 16, dtype=BF16, device=DEVICE)[:, :V]
    vector = torch.empty(1024, device=DEVICE)
    cross_entropy_(
        logits, index[:1024], target[:1024], smoothing, z_loss,
        loss=vector, correct=vector.int(), with_gradient=True,
        dbias=torch.empty(8, V, device=DEVICE), accumulates=True,
    )  # fmt: skip
    scatter_norm_backward(
        rows_ID, index, factor, x, stats, norm, needs_x=True, needs_weight=True, needs_bias=True
    )


CASES |= {
    "cross_entropy-D768-bf16": lambda: cross_entropy(768, 8192, BF16),
    "cross_entropy-D768-fp32": lambda: cross_entropy(768, 8192, FP32),
    "cross_entropy-D1024-V21841-smoothing": lambda: cross_entropy(
        1024, 21841, BF16, smoothing=0.1, z_loss=1e-4
    ),
    "cross_entropy-D8192-V1024": lambda: cross_entropy(8192, 1024, BF16),
}


def argmax(dtype: torch.dtype, precision: str) -> None:
    """The tokenizer's scores at the masked patches of batch 256."""
    features = torch.empty(256 * 196, 2048, dtype=dtype, device=DEVICE)
    weight, bias = torch.empty(8192, 2048, device=DEVICE), torch.empty(8192, device=DEVICE)
    index = torch.empty(256 * 75, dtype=torch.int32, device=DEVICE)
    linear_argmax_triton(features, weight, bias, index, precision)


CASES |= {
    "argmax-fp16": lambda: argmax(torch.float16, "fp16"),
    "argmax-fp16-fp16x2": lambda: argmax(torch.float16, "fp16x2"),
    "argmax-fp16-tf32x3": lambda: argmax(torch.float16, "tf32x3"),
    "argmax-fp32-tf32": lambda: argmax(FP32, "tf32"),
    "argmax-fp32-tf32x3": lambda: argmax(FP32, "tf32x3"),
    "argmax-fp32-fp32": lambda: argmax(FP32, "fp32"),
}


def patches(side: int, dtype: torch.dtype, *, listed: bool = False) -> None:
    """uint8 images of 224 px, batch 256, to all patches or to the visible ones."""
    images = torch.empty(256, 224, 224, 3, dtype=torch.uint8, device=DEVICE)
    index = torch.empty(256 * 121, dtype=torch.int32, device=DEVICE) if listed else None
    half = (0.5, 0.5, 0.5)
    normalized_patches_triton(images, (side, side), half, half, index, dtype)


def mask_embed(D: int, stream: torch.dtype, *, positions: bool) -> None:
    """Forward and backward at batch 256 and 197 tokens, with all gradients; bf16 patches."""
    x = torch.empty(256, 196, D, dtype=BF16, device=DEVICE)
    mask = torch.empty(256, 196, dtype=torch.bool, device=DEVICE)
    vector = torch.empty(D, device=DEVICE)
    pos = torch.empty(197, D, device=DEVICE) if positions else None
    out = mask_embed_forward(x, vector, vector, mask, pos, stream)
    mask_embed_backward(out, mask, BF16, [True, True, True, positions])


def ragged_views() -> None:
    """Both filters, to 224 px, of 256 images of 375 x 500; rows first and columns first."""
    B, area = 256, 375 * 500
    pixels = torch.empty(B * 3 * area, dtype=torch.uint8, device=DEVICE)
    sizes = torch.tensor([[375, 500]], device="cpu").expand(B, 2)
    boxes = torch.tensor([[20, 30, 270, 300], [20, 30, 330, 240]], device="cpu").repeat(B // 2, 1)
    steps = torch.tensor([[1, 2, 3]], device="cpu")
    ragged_views_triton(
        pixels,
        torch.arange(B, device="cpu") * 3 * area,
        sizes,
        boxes,
        torch.zeros(B, dtype=torch.bool, device="cpu"),
        torch.ones(B, dtype=torch.bool, device="cpu"),
        steps.expand(B, -1),
        torch.ones_like(steps, dtype=FP32).expand(B, -1),
        [("bicubic", (224, 224)), ("lanczos", (224, 224))],
    )


CASES |= {
    "ragged_views": ragged_views,
    "patches-16-bf16": lambda: patches(16, BF16),
    "patches-16-fp32-listed": lambda: patches(16, FP32, listed=True),
    "patches-14-bf16": lambda: patches(14, BF16),
    "mask_embed-D768-bf16": lambda: mask_embed(768, BF16, positions=False),
    "mask_embed-D768-fp32-positions": lambda: mask_embed(768, FP32, positions=True),
}


def conv(
    side: int,
    C: int,
    D: int,
    k: int,
    dtype: torch.dtype = FP16,
    *,
    residual: bool = False,
    relu_input: bool = False,
    relu: bool = False,
    pool: bool = False,
) -> None:
    """A convolution of DALL-E's encoder at batch 256."""
    x = torch.empty(256, side, side, C, dtype=dtype, device=DEVICE)
    weight = torch.empty(D, k, k, C, dtype=dtype, device=DEVICE)
    added = torch.empty(256, side, side, D, dtype=dtype, device=DEVICE) if residual else None
    bias = torch.empty(D, device=DEVICE)
    out = torch.empty(256, side >> pool, side >> pool, D, dtype=dtype, device=DEVICE)
    conv_triton(x, weight, bias, added, relu_input, relu, out)


def conv_pixels(dtype: torch.dtype) -> None:
    """The first convolution of DALL-E's encoder at batch 256."""
    pixels = torch.empty(256, 112, 112, 3, dtype=torch.uint8, device=DEVICE)
    weight = torch.empty(256, 7, 7, 3, dtype=dtype, device=DEVICE)
    conv_pixels_triton(pixels, weight, torch.empty(256, device=DEVICE), 1.0, -31.875)


CASES |= {
    "conv-pixels-fp16": lambda: conv_pixels(FP16),
    "conv-pixels-bf16": lambda: conv_pixels(BF16),
    "conv-C256-D64-k3-relu_input": lambda: conv(112, 256, 64, 3, relu_input=True, relu=True),
    "conv-C64-D64-k3": lambda: conv(112, 64, 64, 3, relu=True),
    "conv-C64-D256-k1-residual": lambda: conv(112, 64, 256, 1, residual=True),
    "conv-C64-D256-k1-residual-pool": lambda: conv(112, 64, 256, 1, residual=True, pool=True),
    "conv-C128-D128-k3": lambda: conv(56, 128, 128, 3, relu=True),
    "conv-C1024-D512-k3-relu_input": lambda: conv(14, 1024, 512, 3, relu_input=True, relu=True),
    "conv-C512-D512-k3": lambda: conv(14, 512, 512, 3, relu=True),
    "conv-C512-D512-k3-bf16": lambda: conv(14, 512, 512, 3, BF16, relu=True, relu_input=True),
    "conv-C1024-D2048-k1": lambda: conv(14, 1024, 2048, 1),
    "conv-C24-D48-k3": lambda: conv(32, 24, 48, 3, relu=True),
}
