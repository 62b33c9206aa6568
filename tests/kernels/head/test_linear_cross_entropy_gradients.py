"""The gradients of the loss: together, alone, summed, repeated."""

import pytest
import torch

from beit_fast.kernels.head.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)
from masked_head import B, D, N, V, backends, head

pytestmark = pytest.mark.usefixtures("nan_where_memory_is_fresh")


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_multiplied_with_the_losss(backend, reduction):
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index, target = torch.tensor([4, 25, 4, -1]), torch.tensor([1, 2, 3, 4])
    loss, _ = masked_linear_cross_entropy(
        leaves[0], index, target, *leaves[1:], reduction=reduction, backend=backend
    )
    theirs, _ = masked_linear_cross_entropy_reference(
        leaves[0], index, target, *leaves[1:], reduction=reduction
    )
    dloss = torch.randn(theirs.shape)
    for _ in range(2):  # a graph that is kept gives the same again
        ours = torch.autograd.grad(loss, leaves, dloss, retain_graph=True)
    for our, their in zip(ours, torch.autograd.grad(theirs, leaves, dloss), strict=True):
        torch.testing.assert_close(our, their)


@backends
def test_gradients_of_two_batches_add_up(backend):
    weights = [t.requires_grad_() for t in head()]
    index, target = torch.tensor([4, 25]), torch.tensor([1, 2])
    total = [torch.zeros_like(w) for w in weights]
    for _ in range(2):
        loss, _ = masked_linear_cross_entropy(
            torch.randn(B, N, D), index, target, *weights, backend=backend
        )
        for sum_, gradient in zip(total, torch.autograd.grad(loss, weights, retain_graph=True),
                                  strict=True):  # fmt: skip
            sum_ += gradient
        loss.backward()
    for weight, sum_ in zip(weights, total, strict=True):
        torch.testing.assert_close(weight.grad, sum_)


@backends
@pytest.mark.parametrize(
    "wanted", range(5), ids=["x", "weight", "bias", "norm_weight", "norm_bias"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_can_be_had_alone(backend, wanted, reduction):
    tensors = [torch.randn(B, N, D), *head()]
    index, target = torch.tensor([4, 25, 4, -1]), torch.tensor([1, 2, 3, 4])

    def gradients(leaves):
        loss, _ = masked_linear_cross_entropy(
            tensors[0], index, target, *tensors[1:], reduction=reduction, backend=backend
        )
        return torch.autograd.grad(loss.sum(), leaves)

    tensors[wanted].requires_grad_()
    (alone,) = gradients([tensors[wanted]])
    for tensor in tensors:
        tensor.requires_grad_()
    assert torch.equal(alone, gradients(tensors)[wanted])


@backends
def test_the_same_input_gives_the_same_bits(backend):
    index = torch.tensor([4, 25, 4, -1, 7, 4, 25])
    target = torch.randint(V, index.shape)
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    runs = []
    for _ in range(2):
        loss, _ = masked_linear_cross_entropy(
            leaves[0], index, target, *leaves[1:], chunk_rows=3, backend=backend
        )
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_duplicates_add_up_in_any_order_of_the_index(order):
    rows = torch.tensor([2, 2, 2, 2, 9, 17, 17, 29] * 40)  # more than one program's rows
    rows = {
        "ascending": rows.sort().values,
        "descending": rows.sort(descending=True).values,
        "shuffled": rows[torch.randperm(len(rows))],
    }[order]
    index, target = torch.cat((rows, torch.tensor([-1]))), torch.randint(V, (len(rows) + 1,))
    x, weights = torch.randn(B, N, D, requires_grad=True), head()
    gradients = []
    for backend in ("triton", "torch"):
        loss, _ = masked_linear_cross_entropy(x, index, target, *weights, backend=backend)
        gradients.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*gradients)


@backends
def test_a_head_trains_as_with_the_reference(backend):
    """Twenty steps of SGD on all its parameters, and on what it reads."""
    start = [torch.randn(B, N, D), *head()]
    index = torch.tensor([1, 4, 13, 25, 28, -1])
    target = torch.randint(V, index.shape)
    histories = []
    for who in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in start]
        optimizer = torch.optim.SGD(leaves, lr=0.3)
        losses = []
        for _ in range(20):
            loss, _ = masked_linear_cross_entropy(
                leaves[0], index, target, *leaves[1:], backend=who
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))
    assert histories[0][-1] < 0.7 * histories[0][0]
    torch.testing.assert_close(*histories)
