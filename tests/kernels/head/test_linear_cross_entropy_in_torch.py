"""The loss in torch: autocast, the compiler, counted operations, no wait for the host."""

import functools

import pytest
import torch

from beit_fast.kernels._triton import record
from beit_fast.kernels.head import linear_cross_entropy
from beit_fast.kernels.head.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)
from masked_head import DEVICE, B, D, N, V, backends, head

pytestmark = pytest.mark.usefixtures("nan_where_memory_is_fresh")


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_runs_on_a_gpu_needs_no_value_on_the_host(reduction):
    # The same, inside the operators: their launches are recorded instead of run.
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, device="meta", dtype=dtype)

    index = meta(40, dtype=torch.int32)
    inputs = (meta(B, N, D), index, index, meta(V, D), meta(V), meta(D), meta(D))
    options = (1e-6, 0.1, 0.1, reduction, torch.bfloat16, 16, False, "triton")
    needs = [True] * 5
    with record() as launches:
        loss, _, *kept = linear_cross_entropy._forward(*inputs, *options, needs)
        x, index, *others = inputs
        linear_cross_entropy._backward(
            loss, *kept, x, index, *others, *options, torch.bfloat16, torch.bfloat16, needs
        )
    names = {launch.kernel.fn.__name__ for launch in launches}
    assert len(names) == 5, names


@backends
def test_softmax_is_fp32_under_autocast(backend):
    x, index, target = torch.randn(B, N, D), torch.tensor([4, 25]), torch.tensor([1, 2])
    weights = head()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, _ = masked_linear_cross_entropy(x, index, target, *weights, backend=backend)
    assert loss.dtype == torch.float32
    expected, _ = masked_linear_cross_entropy(x, index, target, *weights)
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast_the_error_is_that_of_the_eager_head(backend, dtype):
    """Of the loss at most the same, of gradients at most twice it, against fp64."""
    num_rows, V, D = 64, 500, 64
    x, index = torch.randn(1, num_rows, D), torch.arange(num_rows)
    tensors, target = [x, *head(V, D)], torch.randint(V, (num_rows,))

    def run(function, dtype, **options):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        loss, _ = function(leaves[0], index, target, *leaves[1:], **options)
        return loss.detach().double(), torch.autograd.grad(loss, leaves)

    exact_loss, exact = run(masked_linear_cross_entropy_reference, torch.float64)
    with torch.autocast(DEVICE, dtype):
        their_loss, theirs = run(masked_linear_cross_entropy_reference, torch.float32)
        our_loss, ours = run(
            masked_linear_cross_entropy, torch.float32, backend=backend, chunk_rows=24
        )
    rounding = torch.finfo(torch.float32).eps * exact_loss
    assert (our_loss - exact_loss).abs() <= (their_loss - exact_loss).abs() + 4 * rounding
    for our, their, want in zip(ours, theirs, exact, strict=True):
        assert (our - want).abs().max() <= 2 * (their - want).abs().max()


@backends
def test_half_precision_keeps_the_gradients_of_many_rows(backend):
    # Divided by the rows before it is rounded to fp16, 1 / 8192 would be off by 2 %.
    num_rows, V, D = 100, 8192, 8
    x, index = torch.ones(1, num_rows, D), torch.arange(num_rows)
    weight = torch.zeros(V, D, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        loss, _ = masked_linear_cross_entropy(x, index, index % 5, weight, backend=backend)
    (dweight,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(dweight[5:], torch.full((V - 5, D), 1 / V), rtol=1e-3, atol=0)


@backends
def test_compiles_in_one_graph(backend):
    function = functools.partial(masked_linear_cross_entropy, label_smoothing=0.1, backend=backend)
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index, target = torch.tensor([4, -1]), torch.tensor([1, 0])

    def step(x, *weights):
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(x * 1, index, target, *weights)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, step):
        loss, num_correct = run(*leaves)
        results.append((loss, num_correct, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators_keep_what_they_promise_the_compiler(backend, reduction, monkeypatch):
    monkeypatch.undo()  # opcheck compares memory that no one is to read
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index, target = torch.tensor([4, 25, -1]), torch.tensor([1, 2, 3])
    options = (1e-6, 0.1, 0.01, reduction, torch.float32, 2, False, backend)
    needs = [True] * 5
    inputs = (leaves[0], index, target, *leaves[1:])
    torch.library.opcheck(
        torch.ops.beit_fast.masked_linear_cross_entropy.default, (*inputs, *options, needs)
    )
    x, index, *others = (t.detach() for t in inputs)
    if reduction != "none":
        others[:3] = [None] * 3
    loss, _, *kept = (
        t.detach()
        for t in torch.ops.beit_fast.masked_linear_cross_entropy(*inputs, *options, needs)
    )
    torch.library.opcheck(
        torch.ops.beit_fast.masked_linear_cross_entropy_backward.default,
        (loss, *kept, x, index, *others, *options, torch.float32, torch.float32, needs),
    )


@backends
def test_counts_the_operations_of_its_products(backend):
    from torch.utils.flop_counter import FlopCounterMode

    x, (weight, *vectors) = torch.randn(B, N, D, requires_grad=True), head()
    index = torch.tensor([4, 25, -1])
    with FlopCounterMode(display=False) as counter:
        loss, _ = masked_linear_cross_entropy(x, index, index, weight, *vectors, backend=backend)
        loss.backward()
    assert counter.get_total_flops() == 2 * 2 * 3 * V * D
