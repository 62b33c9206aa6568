"""The kernels of `conv`: implicit GEMM on tiles of 128 pixels, and what launches them.

One reads blocks of pixels by tensor descriptors, whose zeros beyond the image are the padding; its
like for GPUs without a copy engine reads by addresses and masks. ReLU, residual and pooling are in
the epilogue. Formula, shapes and types: `operators.py`.
"""

from torch import Tensor

from beit_fast.kernels._triton import Gpu, TensorDescriptor, cdiv, gpu_of, launch, tl, triton

_PIXELS = 128  # of a tile


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


def _describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Blocks of a contiguous tensor; beyond its edges they read zeros and write nothing."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
