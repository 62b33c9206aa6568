"""The backward for windows against fp64 autograd, and what its launcher promises."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from beit_fast.kernels._triton import Gpu, pretend, record
from beit_fast.kernels.attention_backward_window import window_backward, window_fits
from beit_fast.kernels.attention_bias import pad_bias_reference, padded_length


@dataclass
class Case:
    q: Tensor  # (B, N, H, K)
    k: Tensor  # (B, M, H, K)
    v: Tensor
    dout: Tensor
    bias: Tensor  # padded
    scale: float
    out: Tensor = None
    lse: Tensor = None


NAMES = ("dq", "dk", "dv", "dbias")


def gradients(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """(dq, dk, dv, dbias), out, lse in base 2: PyTorch with matrix products in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    B, N, M, G = len(case.q), case.q.shape[1], case.k.shape[1], len(case.bias)
    raw = case.bias[:, :, :N, :M].to(wide)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (case.q, case.k, case.v)]
    leaves.append((raw * case.scale).requires_grad_())
    q, k, v, bias = leaves
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = (q @ k.mT).to(wide) * case.scale + bias[torch.arange(B, device=q.device) % G]
    masked = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(masked, 0.0).softmax(-1) * ~masked
    out = (weights.to(dtype) @ v).transpose(1, 2)
    out.backward(case.dout.to(dtype))
    lse = logits.logsumexp(-1).masked_fill(masked[..., 0], torch.inf) / torch.log(
        torch.tensor(2.0, dtype=wide)
    )
    return [leaf.grad.to(torch.float64) for leaf in leaves], out.detach(), lse.detach()


def make(
    B, N, M=None, *, H=1, K=64, G=1, dtype=torch.bfloat16, std=1.0, mask=False, bias=True,
    packed=True, device="cpu",
) -> Case:  # fmt: skip
    """Random inputs with out and lse from fp64; `mask` puts -inf into the bias and masks a row."""
    M = M or N
    generator = torch.Generator().manual_seed(N * M + B)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    scale = K**-0.5
    if packed and M == N:
        q, k, v = normal(B, N, 3, H, K).to(dtype).unbind(2)
    else:
        q, k, v = (normal(B, length, H, K).to(dtype) for length in (N, M, M))
    dense = std * normal(G, H, N, M)
    if mask:
        dense[normal(G, H, N, M) > 1] = -torch.inf
        dense[:, :, N // 2] = -torch.inf
    padded = pad_bias_reference(dense, scale, torch.float16)
    if not bias:
        row = torch.zeros(padded_length(M), dtype=torch.float16, device=device)
        row[M:] = -torch.inf
        padded = row.expand(G, H, padded_length(N), padded_length(M))
    case = Case(q, k, v, normal(B, N, H, K).to(dtype), padded, scale)
    _, out, lse = gradients(case, torch.float64)
    case.out, case.lse = out.to(dtype), lse.float().contiguous()
    return case


def run(case: Case, trains_bias=True, wanted="qkv", packed=True) -> list[Tensor | None]:
    """(dq, dk, dv, partials) from the launcher; whatever it leaves unwritten is NaN."""
    B, N, H, K = case.q.shape
    M = case.k.shape[1]
    if packed and M == N:
        grads = list(case.q.new_full((B, N, 3, H, K), torch.nan).unbind(2))
    else:
        grads = [case.q.new_full((B, length, H, K), torch.nan) for length in (N, M, M)]
    dq, dk, dv = (grad if name in wanted else None for name, grad in zip("qkv", grads, strict=True))
    partials = window_backward(
        case.dout, case.q, case.k, case.v, case.bias, case.out, case.lse,
        scale=case.scale, dq=dq, dk=dk, dv=dv, trains_bias=trains_bias,
    )  # fmt: skip
    return [dq, dk, dv, partials]


def dbias_of(partials: Tensor, case: Case) -> Tensor:
    return partials[..., : case.q.shape[1], : case.k.shape[1]].double().sum(0)


def assert_exact(case: Case, results: list[Tensor | None]) -> None:
    """Error against fp64 <= 2 x eager PyTorch's in the same dtype, plus one rounding."""
    dtype = case.q.dtype
    wants, _, _ = gradients(case, torch.float64)
    theirs, _, _ = gradients(case, dtype)
    ours = [*results[:3], None if results[3] is None else dbias_of(results[3], case)]
    for name, want, their, our in zip(NAMES, wants, theirs, ours, strict=True):
        if our is None:
            continue
        eps = torch.finfo(dtype if name != "dbias" else torch.float32).eps
        allowed = 2 * (their - want).abs().amax() + eps * want.abs().amax()
        error = (our.double() - want).abs().amax()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture(autouse=True)
def _poison():
    """Fill what the launcher allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("B", "N", "M", "H", "K", "dtype", "std"),
    [
        pytest.param(3, 49, 49, 2, 32, torch.bfloat16, 1.0, id="swin"),
        pytest.param(2, 49, 49, 2, 64, torch.bfloat16, 4.0, id="large-bias"),
        pytest.param(2, 49, 49, 1, 64, torch.float16, 1.0, id="fp16"),
        pytest.param(2, 64, 64, 2, 64, torch.bfloat16, 1.0, id="whole-tile"),
        pytest.param(2, 63, 63, 1, 32, torch.bfloat16, 1.0, id="one-short-of-the-tile"),
        pytest.param(3, 16, 16, 2, 32, torch.bfloat16, 1.0, id="N16"),
        pytest.param(2, 1, 64, 2, 64, torch.bfloat16, 1.0, id="one-query"),
        pytest.param(2, 7, 64, 2, 64, torch.bfloat16, 1.0, id="M-above-N"),
        pytest.param(2, 64, 7, 1, 32, torch.bfloat16, 1.0, id="M-below-N"),
    ],
)
def test_gradients_are_as_exact_as_eager_pytorch(B, N, M, H, K, dtype, std, device):
    case = make(B, N, M, H=H, K=K, dtype=dtype, std=std, device=device)
    assert window_fits(case.q, case.k, case.v, case.out, case.dout)
    assert_exact(case, run(case))


def test_one_token_has_weight_one(device):
    case = make(2, 1, H=2, device=device)
    dq, dk, dv, partials = run(case)
    assert torch.equal(dv, case.dout)
    for vanishes in (dq, dk, dbias_of(partials, case)):
        assert vanishes.abs().amax() < 1e-5


def test_masked_pairs_and_fully_masked_rows_of_groups(device):
    case = make(7, 49, G=3, H=2, K=32, mask=True, device=device)
    results = run(case)
    assert_exact(case, results)
    assert results[0][:, 24].eq(0).all()
    assert dbias_of(results[3], case)[:, :, 24].eq(0).all()


def test_a_broadcast_bias_of_stride_zero(device):
    case = make(2, 30, H=2, bias=False, device=device)
    assert case.bias.stride()[:3] == (0, 0, 0)
    assert_exact(case, run(case))


def test_frozen_bias_has_no_partials_and_the_same_gradients(device):
    case = make(4, 49, G=2, mask=True, device=device)
    trained, frozen = run(case), run(case, trains_bias=False, packed=False)
    assert frozen[3] is None
    for want, got in zip(trained[:3], frozen[:3], strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("trains_bias", [True, False])
def test_what_is_not_wanted_changes_nothing_else(trains_bias, device):
    case = make(2, 49, K=32, device=device)
    everything = run(case, trains_bias)
    for wanted in ("q", "k", "v", "kv", ""):
        for want, got in zip(everything, run(case, trains_bias, wanted), strict=True):
            assert got is None or torch.equal(got, want)


def test_nothing_wanted_launches_nothing():
    with record() as launches:
        run(make(1, 49), trains_bias=False, wanted="")
    assert launches == []


def test_a_constant_on_a_row_changes_nothing(device):
    case, shifted = make(1, 40, std=0.0, device=device), make(1, 40, std=0.0, device=device)
    shifted.bias[:, :, 39] -= 2048.0  # logits of -256
    shifted.lse[..., 39] -= 256 / math.log(2)
    for want, got in zip(run(case), run(shifted), strict=True):
        torch.testing.assert_close(got, want, rtol=0.01, atol=1e-3)


def test_chunks_that_do_not_divide_the_batch_are_all_written(device):
    case = make(11, 20, G=2, K=32, device=device)
    with pretend(Gpu((9, 0), 2, 50 << 20)):  # six slots: three chunks of six and of five images
        results = run(case)
    assert len(results[3]) == 3
    assert_exact(case, results)


def test_two_runs_agree_in_every_bit(device):
    case = make(3, 49, device=device)
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first, second)


def test_dbias_is_more_exact_than_scores_rounded_before_the_batch_sum(device):
    case = make(32, 49, K=32, device=device)
    wants, _, _ = gradients(case, torch.float64)
    rounded = torch.zeros_like(wants[3])
    for b in range(len(case.q)):
        image = Case(
            *(t[b : b + 1] for t in (case.q, case.k, case.v, case.dout)), case.bias, case.scale
        )
        rounded += gradients(image, torch.float64)[0][3].bfloat16()
    error = (dbias_of(run(case, wanted="")[3], case) - wants[3]).square().mean().sqrt()
    assert error < 0.75 * (rounded - wants[3]).square().mean().sqrt()


def test_fits_one_tile_of_two_head_widths():
    def fits(N=49, M=None, K=32, dtype=torch.bfloat16):
        q, k = (torch.empty(2, length, 2, K, dtype=dtype) for length in (N, M or N))
        return window_fits(q, k, k, q, q)

    assert fits()
    assert fits(N=64, M=1, K=64, dtype=torch.float16)
    assert not fits(N=65)
    assert not fits(M=65)
    assert not fits(K=48)
    assert not fits(dtype=torch.float32)
    q = torch.empty(2, 49, 2, 64, dtype=torch.bfloat16)[..., ::2]
    assert not window_fits(q, q, q, q, q)
