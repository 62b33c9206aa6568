"""The backward for windows against fp64 autograd, and what its launcher promises."""

import functools
import math

import pytest
import torch

from backward_cases import Case, assert_exact, dbias_of, gradients, make, run_backward
from beit_fast.kernels._triton import Gpu, pretend, record
from beit_fast.kernels.attention.backward_window import window_backward, window_fits

run = functools.partial(run_backward, window_backward)


pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


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


def test_nothing_wanted_launches_nothing(device):
    with record() as launches:
        run(make(1, 49, device=device), trains_bias=False, wanted="")
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
