"""The loss and its gradients against the reference, and values known by hand."""

import math

import pytest
import torch

from beit_fast.kernels.head.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)
from masked_head import B, D, N, V, backends, head

pytestmark = pytest.mark.usefixtures("nan_where_memory_is_fresh")

INDICES = {
    "padded": [3, 29, 7, 12, -1, -1],
    "ascending": [3, 7, 7, 12, 29, -1],
    "padding-between": [-1, 3, -1, 29, -1],
    "duplicates": [5, 8, 5, 5, 8],
    "one": [0],
    "every-row": list(range(B * N)),
    "none-real": [-1, -1],
    "empty": [],
}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_as_exact_as_the_reference(assert_as_exact_as_reference, backend, index, dtype):
    index = torch.tensor(index, dtype=torch.int32)
    target = torch.randint(V, index.shape)

    def run(function, **options):
        return lambda x, *weights: function(x, index, target, *weights, **options)

    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy, backend=backend, chunk_rows=4),
        run(masked_linear_cross_entropy_reference),
        [torch.randn(B, N, D), *head()],
        dtype,
    )


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.05},
    "both": {"label_smoothing": 0.1, "z_loss": 0.05, "reduction": "sum"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "none-smoothing": {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01},
    "eps": {"norm_eps": 1},
}


@backends
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_mean_what_they_mean_to_the_reference(
    assert_as_exact_as_reference, backend, options
):
    index = torch.tensor([3, 29, -1, 3])
    target = torch.randint(V, (4,))

    def run(function, **more):
        return lambda x, *weights: function(x, index, target, *weights, **options, **more)

    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy, backend=backend, chunk_rows=2),
        run(masked_linear_cross_entropy_reference),
        [torch.randn(B, N, D), *head()],
        torch.float32,
    )
    inputs = (torch.randn(B, N, D), index, target, *head())
    plain, _ = masked_linear_cross_entropy(*inputs, backend=backend)
    other, _ = masked_linear_cross_entropy(*inputs, **options, backend=backend)
    assert plain.shape != other.shape or plain != other


# V: below, at and above a tile, odd, more than one tile of 8192. D: below a load, with a tail, a
# warp's, two warps' and a whole CTA's row.
SHAPES = [(7, 8), (128, 24), (129, 40), (1000, 264), (8200, 16), (21, 768), (16, 1032), (70, 8192)]


@pytest.mark.parametrize(("V", "D"), SHAPES, ids=[f"V{V}-D{D}" for V, D in SHAPES])
def test_kernels_take_any_number_of_classes_and_channels(assert_as_exact_as_reference, V, D):
    index = torch.tensor([3, 29, -1, 7, 3, 12], dtype=torch.int32)
    target = torch.randint(V, index.shape)

    def run(function, **options):
        options["label_smoothing"] = 0.1
        return lambda x, *weights: function(x, index, target, *weights, **options)

    tensors = [torch.randn(B, N, D), *head(V, D)]
    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy, backend="triton", chunk_rows=4),
        run(masked_linear_cross_entropy_reference),
        tensors,
        torch.float32,
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_inputs_agree_with_the_reference(assert_as_exact_as_reference, seed):
    torch.manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), device="cpu"))

    B, N, D, V = draw(1, 4), draw(1, 12), 8 * draw(1, 40), draw(2, 300)
    index = torch.randint(-1, B * N, (draw(1, 40),))
    target = torch.randint(V, index.shape)
    vectors = head(V, D)[1:]
    present = [bool(draw(0, 3)) for _ in range(3)]
    present[2] &= present[1]
    tensors = [torch.randn(B, N, D), torch.randn(V, D) / D**0.5]
    tensors += [v if there else None for v, there in zip(vectors, present, strict=True)]
    options = {
        "reduction": ("mean", "sum", "none")[draw(0, 2)],
        "label_smoothing": draw(0, 1) / 10,
        "z_loss": draw(0, 1) / 100,
    }

    def run(function, **more):
        return lambda x, *weights: function(x, index, target, *weights, **options, **more)

    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy, backend="triton", chunk_rows=draw(1, 41)),
        run(masked_linear_cross_entropy_reference),
        tensors,
        (torch.float32, torch.bfloat16)[draw(0, 1)],
    )


@backends
def test_without_a_norm_the_rows_enter_the_product_as_they_are(backend):
    x, weight = torch.randn(B, N, D, requires_grad=True), torch.randn(V, D)
    index, target = torch.tensor([13]), torch.tensor([4])
    loss, _ = masked_linear_cross_entropy(x, index, target, weight, backend=backend)
    torch.testing.assert_close(loss, -(weight @ x[1, 3]).log_softmax(0)[4])
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.flatten(0, 1).any(dim=1).nonzero().flatten().tolist() == [13]


@backends
def test_equal_logits_cost_ln_v(backend):
    loss, _ = masked_linear_cross_entropy(
        torch.randn(B, N, D), torch.tensor([1, 2, -1]), torch.tensor([7, 8, 9]), torch.zeros(V, D),
        backend=backend,
    )  # fmt: skip
    assert loss.item() == pytest.approx(math.log(V))


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("index", [[-1, -1], []], ids=["all-padding", "empty"])
def test_without_a_real_row_loss_and_gradients_are_zero(backend, index, reduction):
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index = torch.tensor(index, dtype=torch.int32)
    loss, num_correct = masked_linear_cross_entropy(
        leaves[0], index, torch.zeros(len(index), dtype=torch.int64), *leaves[1:],
        reduction=reduction, backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert num_correct.item() == 0
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@backends
@pytest.mark.parametrize("index", [[-1, -1], []], ids=["all-padding", "empty"])
def test_an_empty_batch_costs_nothing(backend, index):
    leaves = [t.requires_grad_() for t in (torch.randn(0, N, D), *head())]
    index = torch.tensor(index, dtype=torch.int32)
    loss, _ = masked_linear_cross_entropy(leaves[0], index, index, *leaves[1:], backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@backends
def test_padding_changes_neither_loss_nor_gradients_whatever_its_target(backend):
    x, (weight, bias, *norm) = torch.randn(B, N, D, requires_grad=True), head()
    weight.requires_grad_()
    index, target = torch.tensor([4, 11]), torch.tensor([1, 2])
    padded_index = torch.tensor([4, -1, 11, -1, -1])
    padded_target = torch.tensor([1, V + 3, 2, -7, 0])
    results = []
    for i, t in ((index, target), (padded_index, padded_target)):
        loss, num_correct = masked_linear_cross_entropy(
            x, i, t, weight, bias, *norm, backend=backend
        )
        results.append((loss, *torch.autograd.grad(loss, (x, weight)), num_correct))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(plain, padded)


@backends
def test_only_listed_rows_are_read_and_get_a_gradient(backend):
    x = torch.full((B, N, D), torch.nan)
    x.view(-1, D)[[4, 25]] = torch.randn(2, D)
    x.requires_grad_()
    index = torch.tensor([4, 25, -1], dtype=torch.int32)
    loss, _ = masked_linear_cross_entropy(
        x, index, torch.tensor([1, 2, 3]), *head(), backend=backend
    )
    loss.backward()
    assert x.grad.flatten(0, 1).any(dim=1).nonzero().flatten().tolist() == [4, 25]


@backends
def test_counts_the_rows_whose_largest_logit_is_the_target(backend):
    weight = 10 * torch.eye(V, D)
    x = torch.zeros(1, 4, D)
    x[0, torch.arange(4), torch.tensor([3, 5, 7, 9])] = 1
    index, target = torch.tensor([0, 1, 2, -1]), torch.tensor([3, 5, 8, 9])
    _, num_correct = masked_linear_cross_entropy(x, index, target, weight, backend=backend)
    assert num_correct.item() == 2
    assert num_correct.dtype == torch.int64


@backends
@pytest.mark.parametrize("V", [50, 9000])
def test_among_equal_logits_the_lowest_is_the_prediction(backend, V):
    weight = torch.zeros(V, D)
    weight[[5, 6, V - 1], 0] = 1
    x, index = torch.ones(1, 3, D), torch.arange(3)
    target = torch.tensor([5, 6, V - 1])
    _, num_correct = masked_linear_cross_entropy(x, index, target, weight, backend=backend)
    assert num_correct.item() == 1


@backends
def test_a_class_that_is_ruled_out_costs_nothing(backend):
    bias = torch.zeros(V)
    bias[V - 9 :] = -torch.inf
    x, weight = torch.zeros(B, N, D, requires_grad=True), torch.randn(V, D)
    loss, _ = masked_linear_cross_entropy(
        x, torch.tensor([3]), torch.tensor([1]), weight, bias, backend=backend
    )
    assert loss.item() == pytest.approx(math.log(V - 9))
    assert torch.autograd.grad(loss, x)[0].isfinite().all()
