"""The bias as the kernels read it: padded, masked, in range; and the sum of its gradients."""

import pytest
import torch

from beit_fast.kernels.attention.bias import (
    bias_unit,
    pad_bias,
    pad_bias_reference,
    padded_dtype,
    padded_length,
    sum_partials,
)
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias_reference, relative_position_rows


def queries(N, device, dtype=torch.bfloat16, H=2, K=64):
    return torch.empty(1, N, H, K, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 64), (64, 64), (65, 128), (128, 128), (197, 256), (1025, 1152)]
)
def test_lengths_are_padded_to_whole_tiles(length, padded):
    assert padded_length(length) == padded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("G", "N", "M"), [(1, 197, 197), (3, 49, 49), (1, 5, 130)])
def test_padding_is_the_reference_bit_for_bit(G, N, M, dtype, device):
    bias = torch.randn(G, 2, N, M, device=device)
    bias[:, :, :, 1] = -torch.inf
    bias[0, 0, 0, 2] = -1e9
    q = queries(N, device, dtype)
    padded = pad_bias(bias, [], q, M, 0.125)
    assert torch.equal(padded, pad_bias_reference(bias, 0.125, padded_dtype(dtype)))
    assert padded.dtype == (torch.float16 if dtype == torch.bfloat16 else torch.float32)
    assert padded[0, 0, 0, 2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_a_bias_of_any_dtype_and_strides_is_read(dtype, device):
    bias = torch.randn(33, 2, 20, device=device, dtype=dtype).permute(1, 2, 0)
    padded = pad_bias(bias, [], queries(20, device), 33, 0.125)
    assert torch.equal(padded, pad_bias_reference(bias[None], 0.125, torch.float16))


def test_no_bias_is_one_row_that_hides_the_padding(device):
    padded = pad_bias(None, [], queries(70, device), 197, 0.125)
    assert padded.shape == (1, 2, 128, 256)
    assert padded.stride() == (0, 0, 0, 1)
    assert (padded[..., :197] == 0).all()
    assert (padded[..., 197:] == -torch.inf).all()


def test_a_table_is_padded_as_its_dense_bias_is(device):
    table = torch.randn(relative_position_rows((4, 5)), 2, device=device)
    padded = pad_bias(table, [4, 5], queries(21, device), 21, 0.125)
    dense = rel_pos_bias_reference(table, (4, 5))
    assert torch.equal(padded, pad_bias_reference(dense[None], 0.125, torch.float16))


@pytest.mark.parametrize("scale", [1 / 3, 32**-0.5, 1e-3, 1 / 64])
def test_a_bias_that_division_would_round_or_lose_is_stored_as_it_is(scale, device):
    bias = torch.randn(2, 4, 4, device=device).half()
    bias[0, 0, 0] = 1000.0
    padded = pad_bias(bias, [], queries(4, device), 4, scale)
    assert torch.equal(padded[0, :, :4, :4], bias)
    assert bias_unit(torch.float16, scale) == 1 / scale


@pytest.mark.parametrize("scale", [0.125, 0.25, 1 / 32, 1.0, 2.0])
def test_a_power_of_two_divides_the_bias_exactly(scale, device):
    bias = torch.randn(2, 4, 4, device=device).half()
    padded = pad_bias(bias, [], queries(4, device), 4, scale)
    assert torch.equal(padded[0, :, :4, :4] * scale, bias)
    assert bias_unit(torch.float16, scale) is None


def test_in_fp32_any_scale_divides_the_bias(device):
    bias = torch.randn(2, 4, 4, device=device)
    padded = pad_bias(bias, [], queries(4, device, torch.float32), 4, 0.3)
    assert torch.equal(padded[0, :, :4, :4], bias * (1 / 0.3))
    assert bias_unit(torch.float32, 0.3) is None


def test_a_table_is_stored_as_its_dense_bias_is_at_any_scale(device):
    table = torch.randn(relative_position_rows((4, 5)), 2, device=device)
    padded = pad_bias(table, [4, 5], queries(21, device), 21, 0.3)
    dense = rel_pos_bias_reference(table, (4, 5))
    assert torch.equal(padded, pad_bias(dense, [], queries(21, device), 21, 0.3))


def test_infinite_and_nan_entries_stay_visible(device):
    bias = torch.zeros(1, 1, 3, device=device)
    bias[0, 0, 0], bias[0, 0, 1] = torch.inf, torch.nan
    padded = pad_bias(bias, [], queries(1, device, H=1), 3, 0.125)
    assert padded[0, 0, 0, 0] == torch.inf
    assert padded[0, 0, 0, 1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("C", "G", "N", "M"), [(1, 1, 197, 197), (5, 3, 49, 33)])
def test_partials_are_added_in_their_order_and_rounded_once(C, G, N, M, dtype, device):
    partials = torch.full((C, G, 2, N + 7, M + 15), torch.nan, device=device)
    partials[..., :N, :M] = torch.randn(C, G, 2, N, M, device=device)
    want = torch.zeros(G, 2, N, M, device=device)
    for partial in partials:
        want += partial[..., :N, :M]
    assert torch.equal(sum_partials(partials, N, M, dtype), want.to(dtype))
