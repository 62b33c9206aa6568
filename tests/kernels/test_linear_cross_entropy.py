import functools
import math

import pytest
import torch

from beit_fast.kernels.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)

B, N, D, V = 3, 10, 16, 50


def head():
    """weight, bias, norm_weight, norm_bias."""
    return torch.randn(V, D), torch.randn(V), torch.randn(D), torch.randn(D)


INDICES = {
    "padded": [3, 29, 7, 12, -1, -1],
    "padding-between": [-1, 3, -1, 29, -1],
    "duplicates": [5, 5, 5, 8],
    "one": [0],
    "every-row": list(range(B * N)),
    "none-real": [-1, -1],
    "empty": [],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_as_exact_as_the_reference(assert_as_exact_as_reference, index, dtype):
    index = torch.tensor(index, dtype=torch.int32)
    target = torch.randint(V, index.shape)

    def run(function):
        return lambda x, *weights: function(x, index, target, *weights)

    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy),
        run(masked_linear_cross_entropy_reference),
        [torch.randn(B, N, D), *head()],
        dtype,
    )


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"reduction": "sum"}, {"norm_eps": 1}]
)
def test_options_mean_what_they_mean_to_the_reference(assert_as_exact_as_reference, options):
    index = torch.tensor([3, 29, -1])
    target = torch.randint(V, (3,))

    def run(function):
        return lambda x, *weights: function(x, index, target, *weights, **options)

    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy),
        run(masked_linear_cross_entropy_reference),
        [torch.randn(B, N, D), *head()],
        torch.float32,
    )
    plain, _ = masked_linear_cross_entropy(torch.ones(B, N, D), index, target, *head())
    other, _ = masked_linear_cross_entropy(torch.ones(B, N, D), index, target, *head(), **options)
    assert plain != other


def test_without_a_norm_the_rows_enter_the_product_as_they_are():
    x, weight = torch.randn(B, N, D), torch.randn(V, D)
    loss, _ = masked_linear_cross_entropy(x, torch.tensor([13]), torch.tensor([4]), weight)
    torch.testing.assert_close(loss, -(weight @ x[1, 3]).log_softmax(0)[4])


def test_equal_logits_cost_ln_v():
    loss, _ = masked_linear_cross_entropy(
        torch.randn(B, N, D), torch.tensor([1, 2, -1]), torch.tensor([7, 8, 9]), torch.zeros(V, D)
    )
    assert loss.item() == pytest.approx(math.log(V))


@pytest.mark.parametrize("index", [[-1, -1], []], ids=["all-padding", "empty"])
def test_without_a_real_row_loss_and_gradients_are_zero(index):
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index = torch.tensor(index, dtype=torch.int32)
    loss, num_correct = masked_linear_cross_entropy(
        leaves[0], index, torch.zeros(len(index), dtype=torch.int64), *leaves[1:]
    )
    loss.backward()
    assert loss.item() == 0
    assert num_correct.item() == 0
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_padding_changes_neither_loss_nor_gradients_whatever_its_target():
    x, (weight, bias, *norm) = torch.randn(B, N, D, requires_grad=True), head()
    weight.requires_grad_()
    index, target = torch.tensor([4, 11]), torch.tensor([1, 2])
    padded_index = torch.tensor([4, -1, 11, -1, -1])
    padded_target = torch.tensor([1, V + 3, 2, -7, 0])
    results = []
    for i, t in ((index, target), (padded_index, padded_target)):
        loss, num_correct = masked_linear_cross_entropy(x, i, t, weight, bias, *norm)
        results.append((loss, *torch.autograd.grad(loss, (x, weight)), num_correct))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(plain, padded)


def test_only_listed_rows_get_a_gradient():
    x = torch.randn(B, N, D, requires_grad=True)
    index = torch.tensor([4, 25, -1], dtype=torch.int32)
    loss, _ = masked_linear_cross_entropy(x, index, torch.tensor([1, 2, 3]), *head())
    loss.backward()
    assert x.grad.flatten(0, 1).any(dim=1).nonzero().flatten().tolist() == [4, 25]


def test_counts_the_rows_whose_largest_logit_is_the_target():
    weight = 10 * torch.eye(V, D)
    x = torch.zeros(1, 4, D)
    x[0, torch.arange(4), torch.tensor([3, 5, 7, 9])] = 1
    index, target = torch.tensor([0, 1, 2, -1]), torch.tensor([3, 5, 8, 9])
    _, num_correct = masked_linear_cross_entropy(x, index, target, weight)
    assert num_correct.item() == 2
    assert num_correct.dtype == torch.int64


def test_needs_no_value_on_the_host():
    # The meta device has shapes and no values: nonzero, boolean indexing and .item() raise there.
    def meta(*shape, **options):
        return torch.empty(*shape, device="meta", **options)

    loss, num_correct = masked_linear_cross_entropy(
        meta(B, N, D, requires_grad=True), meta(6, dtype=torch.int32),
        meta(6, dtype=torch.int64), meta(V, D, requires_grad=True), meta(V), meta(D), meta(D),
    )  # fmt: skip
    loss.backward()
    assert loss.shape == num_correct.shape == ()


def test_softmax_is_fp32_under_autocast():
    x, index, target = torch.randn(B, N, D), torch.tensor([4, 25]), torch.tensor([1, 2])
    weights = head()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = masked_linear_cross_entropy(x, index, target, *weights)
    assert loss.dtype == torch.float32
    expected, _ = masked_linear_cross_entropy(x, index, target, *weights)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


def test_compiles_in_one_graph():
    function = functools.partial(masked_linear_cross_entropy, label_smoothing=0.1)
    arguments = (
        torch.randn(B, N, D), torch.tensor([4, -1]), torch.tensor([1, 0]), *head()
    )  # fmt: skip
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*arguments), function(*arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_shapes_that_do_not_fit_are_refused_by_name():
    x, index, target = torch.randn(B, N, D), torch.tensor([4]), torch.tensor([1])
    weight = torch.randn(V, D)
    with pytest.raises(ValueError, match="weight \\(V, D\\)"):
        masked_linear_cross_entropy(x, index, target, weight.t())
    with pytest.raises(ValueError, match="int32 or int64"):
        masked_linear_cross_entropy(x, index.bool(), target, weight)
    with pytest.raises(ValueError, match="pass one for each row"):
        masked_linear_cross_entropy(x, index, target[:0], weight)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        masked_linear_cross_entropy(x, index, target, weight, reduction="none")
