"""Strides as kernels are given them: by name, in units that say how rows are aligned."""

import torch

from beit_fast.kernels._triton import tl
from beit_fast.kernels.attention.strides import strides_in_units, strides_of


def test_strides_are_zero_where_there_is_no_tensor():
    assert strides_of("dq", None, "n") == {"dq_stride_b": 0, "dq_stride_n": 0, "dq_stride_h": 0}
    k = torch.empty(2, 5, 3, 4)
    assert strides_of("k", k, "m") == {"k_stride_b": 60, "k_stride_m": 12, "k_stride_h": 4}


def test_units_are_what_all_strides_have_in_common_and_at_most_eight_elements():
    q = torch.empty(2, 5, 3, 64).transpose(1, 2).contiguous().transpose(1, 2)
    strides, unit, offset = strides_in_units(q=q, dq=None)
    assert (unit, offset) == (8, tl.int32)
    assert [8 * strides[f"q_stride_{dim}"] for dim in "bnh"] == [960, 64, 320]
    assert {strides[f"dq_stride_{dim}"] for dim in "bnh"} == {0}
    odd = torch.empty(2, 5, 3, 65)[..., :64]
    assert strides_in_units(q=q, odd=odd)[1] == 1


def test_a_dimension_of_one_element_may_have_any_stride():
    lonely = torch.empty(64).as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    assert strides_in_units(q=lonely) == (
        dict.fromkeys(("q_stride_b", "q_stride_n", "q_stride_h"), 0),
        8,
        tl.int32,
    )


def test_rows_that_lie_far_apart_have_offsets_of_64_bits():
    far = 2**31 // 128
    near, apart = (
        torch.empty(1, device="meta").as_strided((1, 2, 1, 1), (1, n, 1, 1)) for n in (far - 8, far)
    )
    assert strides_in_units(q=near)[2] == tl.int32
    assert strides_in_units(q=apart)[2] == tl.int64
