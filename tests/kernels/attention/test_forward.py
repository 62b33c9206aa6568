"""The forward kernels against fp64, at every edge of their tiles, and what their table promises."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from beit_fast.kernels._triton import A100, B200, H100, pretend, record
from beit_fast.kernels.attention.bias import (
    bias_unit,
    pad_bias_reference,
    padded_dtype,
    padded_length,
)
from beit_fast.kernels.attention.configs import (
    FlashForward,
    WholeForward,
    forward_config,
    head_parts,
    tail_width,
)
from beit_fast.kernels.attention.forward import attention_forward
from beit_fast.kernels.philox import keep_mask_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLASH = FlashForward(64, 64, num_warps=4, num_stages=2)


@dataclass
class Case:
    q: Tensor  # (B, N, H, K)
    k: Tensor  # (B, M, H, K)
    v: Tensor
    bias: Tensor  # padded (G, H, >= N, >= M)
    scale: float
    dropout_p: float = 0.0
    rng: Tensor | None = None


def make(
    N: int, M: int | None = None, K: int = 64, dtype: torch.dtype = BF16,
    *, B: int = 1, H: int = 2, G: int = 1, std: float = 1.0, size: float = 1.0, device=None,
) -> Case:  # fmt: skip
    """Random queries, keys and values, packed in one tensor where N = M."""
    if M is None or M == N:
        M = N
        q, k, v = (size * torch.randn(B, N, 3, H, K)).to(device, dtype).unbind(2)
    else:
        q = (size * torch.randn(B, N, H, K)).to(device, dtype)
        k, v = (size * torch.randn(B, M, 2, H, K)).to(device, dtype).unbind(2)
    bias = std * torch.randn(G, H, N, M)
    return Case(q, k, v, pad(bias, K**-0.5, dtype).to(device), K**-0.5)


def pad(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return pad_bias_reference(bias, scale, padded_dtype(dtype))


def run(case: Case, config=None, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """out and lse, which begin as NaN inside larger tensors that must stay NaN."""
    B, N, H, K = case.q.shape
    around = case.q.new_full((B, N + 2, H, K + 8), math.nan)
    lse = case.q.new_full((B * H * N + 2,), math.nan, dtype=FP32)
    out, inner = around[:, 1:-1, :, :K], lse[1:-1].view(B, H, N)
    attention_forward(
        case.q, case.k, case.v, case.bias, scale=case.scale, dropout_p=case.dropout_p,
        rng=case.rng, tf32=tf32, out=out, lse=inner, config=config,
    )  # fmt: skip
    written = torch.zeros_like(around, dtype=torch.bool)
    written[:, 1:-1, :, :K] = True
    assert around[~written].isnan().all()
    assert lse[[0, -1]].isnan().all()
    return out, inner


def reference(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse by PyTorch: matrix products from `dtype`, softmax in fp32 or fp64."""
    wide = torch.promote_types(dtype, FP32)
    B, N, H, _ = case.q.shape
    M = case.k.shape[1]
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (case.q, case.k, case.v))
    images = torch.arange(B, device=q.device) % len(case.bias)
    bias = case.bias[images, :, :N, :M].to(wide) * (bias_unit(case.q.dtype, case.scale) or 1)
    logits = case.scale * (q.to(wide) @ k.to(wide).mT + bias)
    sees_nothing = (logits == -math.inf).all(-1)
    weights = logits.masked_fill(sees_nothing[..., None], 0).softmax(-1) * ~sees_nothing[..., None]
    if case.dropout_p:
        streams = torch.arange(B * H, device=q.device)
        keep = keep_mask_reference(case.rng, case.dropout_p, N, M, streams).view_as(weights)
        weights = weights * keep / (1 - case.dropout_p)
    out = (weights.to(dtype).to(wide) @ v.to(wide)).to(dtype).transpose(1, 2)
    lse = (logits.logsumexp(-1) / math.log(2)).masked_fill(sees_nothing, math.inf)
    return out, lse


def assert_exact(case: Case, config=None) -> None:
    """Errors against fp64 within twice those of PyTorch in the same dtype, plus one rounding."""
    exact_out, exact_lse = reference(case, torch.float64)
    their_out, their_lse = reference(case, case.q.dtype)
    out, lse = run(case, config)
    for our, their, exact in ((out, their_out, exact_out), (lse, their_lse, exact_lse)):
        assert torch.equal(our.isinf(), exact.isinf())
        finite = exact.isfinite()
        our, their, exact = our[finite], their[finite], exact[finite]
        rounding = torch.finfo(our.dtype).eps * exact.abs().max() if exact.numel() else 0.0
        allowed = 2 * (their - exact).abs().max() + rounding if exact.numel() else 0.0
        error = (our - exact).abs().max() if exact.numel() else 0.0
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
        assert (our - exact).norm() <= 1.5 * (their - exact).norm() + rounding


def whole(M: int) -> WholeForward:
    config = forward_config(H100, BF16, 1, M, 64, dropout=False)
    assert isinstance(config, WholeForward)
    return config


SIZES = [
    (1, None, 64), (5, None, 64), (49, None, 32), (50, None, 32), (64, None, 64), (65, None, 64),
    (80, None, 64), (128, None, 48), (144, None, 32), (192, None, 16), (197, None, 64),
    (208, None, 64), (209, None, 32), (256, None, 64),
    (197, 50, 64), (50, 197, 64), (129, 1, 64), (1, 256, 64), (5, 65, 80), (65, 145, 96),
]  # fmt: skip


@pytest.mark.parametrize("kernel", ["whole", "flash"])
@pytest.mark.parametrize(("N", "M", "K"), SIZES)
def test_both_kernels_are_as_exact_as_pytorch(N, M, K, kernel, device):
    case = make(N, M, K, H=1, device=device)
    assert_exact(case, whole(M or N) if kernel == "whole" else FLASH)


@pytest.mark.parametrize("gpu", [A100, H100, B200], ids=["sm80", "sm90", "sm100"])
@pytest.mark.parametrize(
    ("N", "M", "K", "dtype"),
    [
        (64, None, 128, BF16), (197, None, 64, FP16), (256, None, 80, BF16), (257, None, 64, BF16),
        (257, None, 88, BF16), (300, None, 64, BF16), (130, 320, 40, FP16), (70, 257, 128, BF16),
    ],
)  # fmt: skip
def test_the_choice_for_each_gpu_is_as_exact_as_pytorch(N, M, K, dtype, gpu, device):
    case = make(N, M, K, dtype, H=1, device=device)
    with pretend(gpu):
        assert_exact(case)


@pytest.mark.parametrize(
    ("N", "M", "K"), [(1, None, 1), (49, None, 32), (65, None, 64), (50, 67, 80), (33, None, 128)]
)
def test_fp32_is_as_exact_as_pytorch(N, M, K, device):
    assert_exact(make(N, M, K, FP32, H=1, device=device))


def test_197_tokens_stay_within_the_rounding_of_the_weights(device):
    """From the bias as it is trained, not as it is padded: bf16 padding would give 3.4e-3."""
    scale = 64**-0.5
    bias = torch.randn(1, 2, 197, 197)
    case = replace(make(197, device=device), bias=pad(bias, scale, BF16).to(device))
    exact = replace(case, bias=(bias.double() / scale).to(device))
    out, lse = run(case)
    exact_out, exact_lse = reference(exact, torch.float64)
    assert (out - exact_out).norm() <= 2.4e-3 * exact_out.norm()
    assert (lse - exact_lse).abs().max() <= 1e-3


@pytest.mark.parametrize(
    "config",
    [whole(197), whole(256), FLASH, FlashForward(128, 32, 8, 2, part=32)],
    ids=["whole-197", "whole-256", "flash", "flash-128x32"],
)
def test_hidden_pairs_get_no_weight_and_rows_of_them_no_output(config, device):
    case = make(150, 197, 32, B=2, device=device)
    hidden = torch.rand(case.bias.shape, device=device) < 0.5
    hidden[:, :, 7] = True  # nothing to see in any group of keys
    hidden[:, :, 64:70, :128] = True  # nothing in the first
    hidden[:, :, 149, 128:] = True  # nothing in the later ones
    hidden[:, 1, 100:150] = True
    case.bias.masked_fill_(hidden, -math.inf)
    assert_exact(case, config)
    out, lse = run(case, config)
    assert (out[:, 7] == 0).all()
    assert (lse[:, :, 7] == math.inf).all()
    assert (out[:, 100:, 1] == 0).all()


@pytest.mark.parametrize("config", [whole(197), FLASH], ids=["whole", "flash"])
def test_nothing_beyond_the_keys_is_read_into_the_result(config, device):
    case = make(197, device=device)
    B, N, H, K = case.q.shape
    around = [torch.full((B, N + 300, H, K + 64), math.nan, dtype=BF16, device=device)] * 3
    views = [t[:, :N, :, :K].copy_(s) for t, s in zip(around, (case.q,) * 3, strict=True)]
    case = replace(case, q=views[0], k=views[1], v=views[2])
    case.bias[:, :, N:, N:] = math.nan  # padding in both directions, which no query may see
    assert run(case, config)[0].isfinite().all()
    assert_exact(case, config)


@pytest.mark.parametrize("config", [whole(64), FLASH], ids=["whole", "flash"])
def test_image_b_has_the_bias_of_group_b_modulo_g(config, device):
    case = make(49, K=32, B=6, G=3, device=device)
    assert_exact(case, config)
    first, second = run(case, config)[0], run(replace(case, bias=case.bias[:1]), config)[0]
    assert torch.equal(first[::3], second[::3])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("config", [whole(197), FLASH], ids=["whole", "flash"])
def test_a_bias_of_one_row_serves_all_rows_heads_and_groups(config, device):
    case = make(197, device=device)
    row = case.bias[0, 0, :1].clone()
    spread = row.expand(1, 2, *case.bias.shape[2:])
    assert spread.stride()[:3] == (0, 0, 0)
    spread_out, spread_lse = run(replace(case, bias=spread), config)
    out, lse = run(replace(case, bias=spread.contiguous()), config)
    assert torch.equal(spread_out, out)
    assert torch.equal(spread_lse, lse)


@pytest.mark.parametrize("config", [whole(129), FLASH], ids=["whole", "flash"])
def test_any_strides_give_the_same_bits(config, device):
    case = make(70, 129, 40, B=2, device=device)

    def odd(tensor: Tensor) -> Tensor:
        """The same values, heads outermost, every stride odd, at an odd address."""
        B, N, H, K = tensor.shape
        room = torch.full((H * B * N * (K + 1) * 3 + 99,), math.nan, dtype=BF16, device=device)
        strides = ((K + 1) * N, K + 1, (K + 1) * N * B + 2 - B * N % 2, 1)
        return room.as_strided(tensor.shape, strides, 1).copy_(tensor)

    moved = replace(case, q=odd(case.q), k=odd(case.k), v=odd(case.v))
    for ours, theirs in zip(run(moved, config), run(case, config), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", [whole(66), FLASH], ids=["whole", "flash"])
def test_rows_and_images_more_than_2_to_the_31_elements_apart(config, device):
    case = make(66, B=2, K=16, H=1, device=device)
    far_n, far_b = 2**25 + 2**20, 2**31 + 2**20  # 63 rows of a tile are more than 2^31 apart
    # Memory that is never touched is never given: the interpreter needs a few pages.
    room = torch.empty(66 * far_n, dtype=BF16, device=device)
    far = {
        "q": room.as_strided(case.q.shape, (2**16, far_n, 32, 1), 0),
        "k": room.as_strided(case.k.shape, (far_b, 64, 32, 1), 2**18),
        "v": room.as_strided(case.v.shape, (2**16, 64, 32, 1), 2**20),
    }
    far = {name: tensor.copy_(getattr(case, name)) for name, tensor in far.items()}
    for ours, theirs in zip(run(replace(case, **far), config), run(case, config), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", [whole(65), FLASH], ids=["whole", "flash"])
@pytest.mark.parametrize("scale", [1e-4, 1 / 64, 0.3, 2.0])
def test_any_scale_is_exact(config, scale, device):
    case = make(65, K=32, size=scale**-0.25, device=device)
    bias = pad(torch.randn(1, 2, 65, 65), scale, BF16).to(device)
    assert_exact(replace(case, bias=bias, scale=scale), config)


@pytest.mark.parametrize("config", [whole(197), FLASH], ids=["whole", "flash"])
def test_huge_logits_stay_finite_and_exact(config, device):
    case = make(197, std=4.0, size=10.0, device=device)
    case.bias[:, :, 3, 5] = torch.finfo(FP16).max
    case.bias[:, :, 4, :197] = -torch.finfo(FP16).max
    assert_exact(case, config)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("M", [100, 65, 3])
def test_dropout_drops_exactly_what_the_reference_drops(M, dtype, device):
    """With unit vectors for values, the output is the weights themselves."""
    case = make(66, M, 128, dtype, B=2, device=device)
    unit = torch.eye(M, 128, device=device, dtype=dtype)[None, :, None].expand(case.v.shape)
    rng = torch.tensor([2**62 + 5, -(2**40) - 3], device=device)
    case = replace(case, v=unit, dropout_p=0.3, rng=rng)
    weights = run(case)[0][..., :M].transpose(1, 2)
    streams = torch.arange(4, device=device)
    keep = keep_mask_reference(rng, 0.3, 66, M, streams).view(2, 2, 66, M)
    assert torch.equal(weights != 0, keep)
    assert 0.2 < 1 - keep.double().mean() < 0.4


@pytest.mark.parametrize(("N", "M"), [(197, None), (64, 130)])
def test_dropout_is_as_exact_as_pytorch_and_leaves_lse_alone(N, M, device):
    case = make(N, M, device=device)
    rng = torch.tensor([7, 9], device=device)
    dropped = replace(case, dropout_p=0.2, rng=rng)
    assert_exact(dropped)
    config = forward_config(H100, BF16, N, M or N, 64, dropout=True)
    assert torch.equal(run(dropped, config)[1], run(case, config)[1])


@pytest.mark.parametrize("config", [whole(197), FLASH], ids=["whole", "flash"])
def test_each_image_gives_the_same_bits_whatever_the_batch(config, device):
    case = make(197, B=3, H=1, K=32, device=device)
    order = [2, 0, 1]
    shuffled = replace(case, q=case.q[order], k=case.k[order], v=case.v[order])
    for first, again, other in zip(
        run(case, config), run(case, config), run(shuffled, config), strict=True
    ):
        assert torch.equal(first, again)
        assert torch.equal(first[order], other)


def test_tf32_is_asked_for_only_where_it_is_allowed():
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        with record() as launches:
            run_recorded(make(65, dtype=FP32), tf32=allowed)
        assert [launch.arguments["PRECISION"] for launch in launches] == [precision]


def run_recorded(case: Case, **options) -> None:
    out, lse = torch.empty_like(case.q), torch.empty(0)
    attention_forward(
        case.q, case.k, case.v, case.bias, scale=1.0, dropout_p=0.0, rng=None, out=out, lse=lse,
        **options,
    )  # fmt: skip


def test_fp32_with_tf32_tiles_is_correct(device):
    config = forward_config(H100, FP32, 70, 70, 80, dropout=False, tf32=True)
    assert_exact(make(70, None, 80, FP32, H=1, device=device), config)


@pytest.mark.parametrize("gpu", [A100, H100, B200], ids=["sm80", "sm90", "sm100"])
def test_the_table_never_chooses_a_kernel_where_it_is_wrong(gpu):
    sizes = [*range(1, 66), 79, 80, 81, 127, 128, 129, 144, 145, 192, 193, 197, 208, 209, 255, 256,
             257, 300, 577, 1025, 4096]  # fmt: skip
    for M in sizes:
        for K in range(1, 129):
            for dtype, dropout, tf32 in (
                (BF16, False, False), (FP16, True, False), (FP32, False, False),
                (FP32, False, True), (FP32, True, False),
            ):  # fmt: skip
                config = forward_config(gpu, dtype, M, M, K, dropout, tf32)
                if isinstance(config, WholeForward):
                    assert dtype != FP32
                    assert not dropout
                    last = sum(config.first) + sum(config.second)
                else:
                    last = M // config.block_m * config.block_m + tail_width(M, config.block_m)
                    # Triton 3.6 on sm_100 takes TF32 for an fp32 product of 64 rows or more.
                    assert dtype != FP32 or tf32 or config.block_n < 64
                assert M <= last <= padded_length(M)
                assert config.block_n <= max(64, padded_length(M))


@pytest.mark.parametrize("part", [32, 64])
def test_the_parts_of_a_head_follow_one_another_and_cover_it(part):
    for K in range(1, 129):
        end = 0
        for begin, width in head_parts(K, part):
            assert begin == end
            assert width in (16, 32, 64)
            assert width <= part
            end += width
        assert K <= end < K + 16


def test_196_patches_and_a_class_token_take_the_kernel_made_for_them():
    config = forward_config(H100, BF16, 197, 197, 64, dropout=False)
    assert config == WholeForward((128,), (64, 16), maxnreg=168)
