import pytest
import torch

from beit_fast.kernels.attention.rel_pos_bias import (
    expand_table,
    reduce_to_table,
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


GRIDS = pytest.mark.parametrize("grid", [(6, 4), (2, 5), (1, 1)], ids=["6x4", "2x5", "1x1"])


@GRIDS
def test_bias_equals_the_reference_bit_for_bit(grid, device):
    table = torch.randn(relative_position_rows(grid), 3, device=device, requires_grad=True)
    bias = rel_pos_bias(table, grid)
    assert bias.is_contiguous()
    assert torch.equal(bias, rel_pos_bias_reference(table, grid))


def test_gradient_is_as_exact_as_the_reference(assert_as_exact_as_reference):
    assert_as_exact_as_reference(
        lambda t: rel_pos_bias(t, (14, 14)),
        lambda t: rel_pos_bias_reference(t, (14, 14)),
        [torch.randn(732, 3)],
        torch.float32,
    )


@GRIDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernel_expands_bit_for_bit(grid, dtype, device):
    table = torch.randn(2, relative_position_rows(grid), device=device, dtype=dtype).t()
    assert torch.equal(expand_table(table, grid), rel_pos_bias_reference(table, grid))


@GRIDS
def test_the_kernel_pads_with_masked_keys_and_harmless_queries(grid, device):
    N = grid[0] * grid[1] + 1
    table = torch.randn(relative_position_rows(grid), 2, device=device)
    padded = expand_table(table, grid, padded=64, dtype=torch.float16, factor=8.0)
    want = (8 * rel_pos_bias_reference(table, grid)).half()
    assert torch.equal(padded[:, :N, :N], want)
    assert (padded[:, :, N:] == -torch.inf).all()
    assert (padded[:, N:, :N] == 0).all()


def test_the_kernel_clamps_what_is_finite_and_shows_what_is_not(device):
    table = torch.zeros(12, 1, device=device)
    table[11], table[10], table[9] = 1e9, torch.inf, torch.nan
    padded = expand_table(table, (2, 2), dtype=torch.float16)
    assert padded[0, 0, 0] == torch.finfo(torch.float16).max
    assert (padded[0, 1:, 0] == torch.inf).all()
    assert padded[0, 0, 1:].isnan().all()


@GRIDS
@pytest.mark.parametrize("summands", [1, 3])
def test_the_kernel_sums_each_entry_as_exactly_as_the_reference(grid, summands, device):
    N = grid[0] * grid[1] + 1
    dbias = torch.full((summands, 2, N + 3, N + 5), torch.nan, device=device)
    dbias[:, :, :N, :N] = torch.randn(summands, 2, N, N, device=device)
    dtable = reduce_to_table(dbias, grid, torch.float32)
    dense = dbias[:, :, :N, :N].double()
    index = relative_position_index(grid).flatten().to(device)
    want = dense.new_zeros(2, relative_position_rows(grid))
    want.index_add_(1, index, dense.sum(dim=0).flatten(1))
    theirs = want.new_zeros(want.shape, dtype=torch.float32)
    theirs.index_add_(1, index, dense.float().sum(dim=0).flatten(1))
    allowed = 2 * (theirs - want).abs().max() + torch.finfo(torch.float32).eps * want.abs().max()
    assert (dtable.t() - want).abs().max() <= allowed
    assert torch.equal(dtable, reduce_to_table(dbias, grid, torch.float32))


def test_each_table_row_receives_the_sum_over_the_pairs_that_read_it():
    table = torch.zeros(relative_position_rows((3, 2)), 2, requires_grad=True)
    rel_pos_bias(table, (3, 2)).sum().backward()
    counts = relative_position_index((3, 2)).flatten().bincount()
    assert torch.equal(table.grad[:, 0], counts.float())


def test_the_operators_keep_what_they_promise_the_compiler():
    table = torch.randn(relative_position_rows((2, 3)), 2, requires_grad=True)
    torch.library.opcheck(torch.ops.beit_fast.rel_pos_bias.default, (table, [2, 3]))
    torch.library.opcheck(
        torch.ops.beit_fast.rel_pos_bias_backward.default,
        (torch.randn(2, 7, 7), [2, 3], torch.float32),
    )


def test_compiles_in_one_graph_with_the_same_gradient():
    table = torch.randn(relative_position_rows((2, 3)), 2, requires_grad=True)
    compiled = torch.compile(
        lambda t: rel_pos_bias(t, (2, 3)).square(), fullgraph=True, backend="aot_eager"
    )
    (theirs,) = torch.autograd.grad(rel_pos_bias_reference(table, (2, 3)).square().sum(), table)
    (ours,) = torch.autograd.grad(compiled(table).sum(), table)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(12,), (11, 2), (4, 12, 2)], ids=str)
def test_a_table_of_another_grid_is_refused_with_the_remedies(shape):
    with pytest.raises(ValueError, match=r"a grid of 2 x 2 patches is \(12, H\): resize it"):
        rel_pos_bias(torch.zeros(shape), (2, 2))
