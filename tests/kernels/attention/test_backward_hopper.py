"""The backward for Hopper against fp64 autograd, and what its launcher promises."""

import functools
import math

import pytest
import torch

from backward_cases import Case, assert_exact, dbias_of, gradients, make, run_backward
from beit_fast.kernels._triton import A100, H100, Gpu, pretend, record
from beit_fast.kernels.attention.backward_hopper import hopper_backward, hopper_fits
from beit_fast.kernels.attention.bias import padded_length

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="tensor descriptors as these kernels use them need Hopper",
    ),
    pytest.mark.usefixtures("new_memory_is_nan"),
]


run = functools.partial(run_backward, hopper_backward)


@pytest.mark.parametrize(
    ("B", "N", "M", "H", "K", "dtype", "std"),
    [
        pytest.param(2, 197, 197, 2, 64, torch.bfloat16, 1.0, id="base-at-224"),
        pytest.param(1, 197, 197, 1, 64, torch.bfloat16, 4.0, id="large-bias"),
        pytest.param(1, 197, 197, 1, 64, torch.float16, 1.0, id="fp16"),
        pytest.param(2, 144, 144, 2, 32, torch.bfloat16, 1.0, id="window-12-K32"),
        pytest.param(2, 65, 65, 1, 64, torch.bfloat16, 1.0, id="one-row-in-the-tail"),
        pytest.param(1, 128, 128, 1, 64, torch.bfloat16, 1.0, id="no-tail"),
        pytest.param(1, 208, 208, 1, 64, torch.bfloat16, 1.0, id="longest"),
        pytest.param(1, 112, 112, 1, 64, torch.bfloat16, 1.0, id="rest-of-48"),
        pytest.param(1, 90, 160, 1, 64, torch.bfloat16, 1.0, id="tails-of-32-M-above-N"),
        pytest.param(1, 200, 66, 1, 64, torch.bfloat16, 1.0, id="M-below-N"),
    ],
)
def test_gradients_are_as_exact_as_eager_pytorch(B, N, M, H, K, dtype, std, device):
    case = make(B, N, M, H=H, K=K, dtype=dtype, std=std, device=device)
    assert hopper_fits(case.q, case.k, case.v, case.out, case.dout)
    assert_exact(case, run(case))


def test_masked_pairs_and_fully_masked_rows_of_groups(device):
    case = make(3, 72, G=2, H=2, mask=True, device=device)
    results = run(case)
    assert_exact(case, results)
    assert results[0][:, 36].eq(0).all()
    assert dbias_of(results[3], case)[:, :, 36].eq(0).all()


def test_a_broadcast_bias_of_stride_zero(device):
    case = make(2, 80, H=2, bias=False, device=device)
    assert case.bias.stride()[:3] == (0, 0, 0)
    assert_exact(case, run(case))
    assert_exact(case, run(case, trains_bias=False))


def test_frozen_bias_has_no_partials_and_the_same_gradients(device):
    case = make(2, 144, G=2, mask=True, packed=False, device=device)
    results = run(case, trains_bias=False, packed=False)
    assert results[3] is None
    assert_exact(case, results)


@pytest.mark.parametrize("trains_bias", [True, False])
def test_what_is_not_wanted_changes_nothing_else(trains_bias, device):
    case = make(1, 81, device=device)
    everything = run(case, trains_bias)
    for wanted in ("q", "k", "v", "kv", ""):
        for want, got in zip(everything, run(case, trains_bias, wanted), strict=True):
            assert got is None or torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_nothing_wanted_launches_nothing():
    case = meta_case(1, 197)
    with record() as launches:
        run(case, trains_bias=False, wanted="")
    assert launches == []


def test_chunks_that_do_not_divide_the_batch_are_all_written(device):
    case = make(9, 65, G=2, device=device)  # groups of five images and of four
    with pretend(Gpu((9, 0), 6, 50 << 20)):
        results = run(case)
    assert len(results[3]) == 3
    assert_exact(case, results)


@pytest.mark.parametrize("trains_bias", [True, False])
def test_a_constant_on_a_row_changes_nothing(trains_bias, device):
    """Not even on the last row, which is what a kernel may take for the rows beyond it."""
    case = make(1, 70, std=0.0, device=device)
    shifted = make(1, 70, std=0.0, device=device)
    shifted.bias[..., 69, :] -= 2048.0  # logits of -256
    shifted.lse[..., 69] -= 256 / math.log(2)
    for want, got in zip(run(case, trains_bias), run(shifted, trains_bias), strict=True):
        torch.testing.assert_close(got, want, rtol=0.01, atol=1e-3, equal_nan=True)


def test_two_runs_agree_in_every_bit(device):
    case = make(2, 100, device=device)
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


def test_dbias_is_more_exact_than_scores_rounded_before_the_batch_sum(device):
    case = make(16, 65, device=device)
    wants, _, _ = gradients(case, torch.float64)
    rounded = torch.zeros_like(wants[3])
    for b in range(len(case.q)):
        image = Case(
            *(t[b : b + 1] for t in (case.q, case.k, case.v, case.dout)), case.bias, case.scale
        )
        rounded += gradients(image, torch.float64)[0][3].bfloat16()
    error = (dbias_of(run(case, wanted="")[3], case) - wants[3]).square().mean().sqrt()
    assert error < 0.75 * (rounded - wants[3]).square().mean().sqrt()


def test_fits_what_descriptors_and_registers_hold():
    def fits(N=197, M=None, K=64, dtype=torch.bfloat16, view=lambda t: t):
        q = view(torch.empty(2, N, 2, K, dtype=dtype))
        k = torch.empty(2, M or N, 2, K, dtype=dtype)
        return hopper_fits(q, k, k, q, q)

    with pretend(H100):
        assert fits()
        assert fits(N=65, M=208)
        assert not fits(N=64)
        assert not fits(M=209)
        assert not fits(K=128)
        assert not fits(dtype=torch.float32)
        misaligned = torch.empty(2 * 197 * 2 * 64 + 1, dtype=torch.bfloat16)[1:]
        assert not fits(view=lambda t: misaligned.view(t.shape))
        assert not fits(view=lambda t: torch.empty(2, 197, 2, 65, dtype=t.dtype)[..., :64])
        assert not fits(view=lambda t: t[:1].expand(2, -1, -1, -1))
        assert fits(view=lambda t: torch.empty(2, 197, 3, 2, 64, dtype=t.dtype)[:, :, 1])
    with pretend(A100):
        assert not fits()


def meta_case(B: int, N: int, H: int = 12) -> Case:
    q, k, v = torch.empty(B, N, 3, H, 64, dtype=torch.bfloat16, device="meta").unbind(2)
    bias = torch.empty(1, H, *[padded_length(N)] * 2, dtype=torch.float16, device="meta")
    lse = torch.empty(B, H, N, device="meta")
    return Case(q, k, v, torch.empty_like(q), bias, 0.125, torch.empty_like(q), lse)


@pytest.mark.parametrize("N", [128, 144, 197])
@pytest.mark.parametrize("H", [12, 16])
def test_extra_memory_stays_below_20_mb_at_batch_256(H, N):
    case = meta_case(256, N, H)
    with pretend(H100), record() as launches:
        partials = run(case)[3]
    stats = launches[0].arguments["stats_ptr"]
    assert sum(t.numel() * t.element_size() for t in (partials, stats)) <= 20e6
