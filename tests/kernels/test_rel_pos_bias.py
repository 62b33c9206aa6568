import pytest
import torch

from beit_fast.kernels.rel_pos_bias import (
    rel_pos_bias,
    rel_pos_bias_reference,
    relative_position_index,
    relative_position_rows,
)


def test_index_of_a_2x2_grid_is_the_worked_example():
    assert relative_position_index((2, 2)).tolist() == [
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]


def test_index_of_a_14x14_grid_has_the_original_values():
    index = relative_position_index((14, 14))
    assert index.dtype == torch.int64
    expected = {
        (1, 1): 364, (1, 2): 363, (2, 1): 365, (1, 15): 337, (15, 1): 391,
        (1, 196): 0, (196, 1): 728, (0, 0): 731, (0, 5): 729, (5, 0): 730,
    }  # fmt: skip
    assert {pair: index[pair].item() for pair in expected} == expected


@pytest.mark.parametrize(
    ("side", "rows"), [(14, 732), (24, 2212), (30, 3484), (32, 3972), (40, 6244)]
)
def test_tables_have_as_many_rows_as_published_ones(side, rows):
    assert relative_position_rows((side, side)) == rows


@pytest.mark.parametrize("grid", [(2, 3), (3, 1), (1, 1)], ids=["2x3", "3x1", "1x1"])
def test_index_of_any_grid_counts_offsets_row_by_row(grid):
    Gh, Gw = grid
    index = relative_position_index(grid)
    image = torch.arange((2 * Gh - 1) * (2 * Gw - 1)).view(2 * Gh - 1, 2 * Gw - 1)
    for i in range(Gh * Gw):
        for j in range(Gh * Gw):
            drow, dcol = i // Gw - j // Gw, i % Gw - j % Gw
            assert index[1 + i, 1 + j] == image[drow + Gh - 1, dcol + Gw - 1]
    assert index.max() == relative_position_rows(grid) - 1


@pytest.mark.parametrize("grid", [(14, 14), (2, 5), (1, 1)], ids=["14x14", "2x5", "1x1"])
def test_bias_equals_the_reference_bit_for_bit(grid):
    table = torch.randn(relative_position_rows(grid), 3, requires_grad=True)
    index = relative_position_index(grid)
    bias, expected = rel_pos_bias(table, index), rel_pos_bias_reference(table, index)
    assert bias.is_contiguous()
    assert torch.equal(bias, expected)


def test_gradient_is_as_exact_as_the_reference(assert_as_exact_as_reference):
    index = relative_position_index((14, 14))
    table = torch.randn(732, 3)
    assert_as_exact_as_reference(
        lambda t: rel_pos_bias(t, index),
        lambda t: rel_pos_bias_reference(t, index),
        [table],
        torch.float32,
    )


def test_each_table_row_receives_the_sum_over_the_pairs_that_read_it():
    index = relative_position_index((3, 2))
    table = torch.zeros(relative_position_rows((3, 2)), 2, requires_grad=True)
    rel_pos_bias(table, index).sum().backward()
    assert torch.equal(table.grad[:, 0], index.flatten().bincount().float())


def test_other_shapes_are_refused_by_name():
    index = relative_position_index((2, 2))
    for table, wrong in (
        (torch.zeros(12), index),
        (torch.zeros(12, 2), index[0]),
        (torch.zeros(12, 2), index.float()),
    ):
        with pytest.raises(ValueError, match="pass a table \\(R, H\\)"):
            rel_pos_bias(table, wrong)
