"""What comes in: strides, what is out of range or not finite, and what is refused."""

import functools

import pytest
import torch

from beit_fast.kernels.head import linear_cross_entropy
from beit_fast.kernels.head.linear_cross_entropy import masked_linear_cross_entropy
from masked_head import B, D, N, V, backends, head

pytestmark = pytest.mark.usefixtures("nan_where_memory_is_fresh")


@backends
@pytest.mark.parametrize("layout", ["no-cls", "transposed"])
def test_strided_inputs_are_read_where_they_are(backend, layout):
    x = (
        torch.randn(B, N + 1, D)[:, 1:]
        if layout == "no-cls"
        else torch.randn(N, D, B).permute(2, 0, 1)
    )
    index, target = torch.tensor([4, 25, 4]), torch.tensor([1, 2, 3])
    weights, results = head(), []
    for tensor in (x, x.contiguous()):
        leaf = tensor.detach().requires_grad_()
        loss, _ = masked_linear_cross_entropy(leaf, index, target, *weights, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_memory_after_x_is_never_read():
    storage = torch.full((B * N * D + 4096,), torch.nan)
    x = storage[: B * N * D].view(B, N, D).normal_()
    index = torch.tensor([B * N - 1, 0, -1])
    target = torch.tensor([V - 1, 0, V])
    loss, _ = masked_linear_cross_entropy(x, index, target, *head(), backend="triton")
    assert loss.isfinite()


WRONG = {
    "index-high": ([1, B * N], [0, 0], rf"index\[1\] is {B * N}, and x has {B * N} rows"),
    "index-low": ([1, -2], [0, 0], r"index\[1\] is -2"),
    "target-high": ([1, 2], [0, V], rf"target\[1\] is {V}, and the weight has {V} rows"),
    "target-low": ([1, 2], [-1, 0], r"target\[0\] is -1"),
}


@pytest.mark.parametrize(("index", "target", "message"), WRONG.values(), ids=WRONG)
def test_what_is_out_of_range_is_refused_on_a_cpu_and_on_request(index, target, message):
    inputs = (torch.randn(B, N, D), torch.tensor(index), torch.tensor(target), *head())
    with pytest.raises(ValueError, match=message):
        masked_linear_cross_entropy(*(t.cpu() for t in inputs))
    with pytest.raises(ValueError, match=message):
        masked_linear_cross_entropy(*inputs, backend="triton", check_values=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, interpreting
@pytest.mark.parametrize(("index", "target", "message"), WRONG.values(), ids=WRONG)
def test_what_is_out_of_range_makes_the_loss_nan_on_a_device(index, target, message):
    del message
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index, target = torch.tensor(index), torch.tensor(target)
    for reduction in ("mean", "none"):
        loss, num_correct = masked_linear_cross_entropy(
            leaves[0], index, target, *leaves[1:], reduction=reduction, backend="triton"
        )
        assert loss.isnan().any()
        assert loss.isnan().sum() == 1  # of "none" the row alone
        assert num_correct <= 1
        assert torch.autograd.grad(loss.sum(), leaves[1])[0].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, interpreting
@backends
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_logits_that_are_not_finite_are_reported(backend, value):
    x, weights = torch.randn(B, N, D), head()
    x[0, 4, 2] = value
    index, target = torch.tensor([3, 4]), torch.tensor([1, 2])
    loss, num_correct = masked_linear_cross_entropy(
        x, index, target, *weights, reduction="none", backend=backend
    )
    assert loss.isfinite().tolist() == [True, False]
    assert num_correct <= 1


def test_what_has_no_kernel_is_refused_by_name():
    inputs = [torch.randn(B, N, D), torch.tensor([4]), torch.tensor([1]), *head()]
    inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    with pytest.raises(ValueError, match="pass backend=None"):
        masked_linear_cross_entropy(*inputs, backend="triton")
    assert "8192 channels" in linear_cross_entropy.triton_obstacle(
        torch.zeros(1, 1, 8200), torch.float32
    )


def test_shapes_that_do_not_fit_are_refused_by_name():
    x, index, target = torch.randn(B, N, D), torch.tensor([4]), torch.tensor([1])
    weight = torch.randn(V, D)
    call = functools.partial(masked_linear_cross_entropy, x)
    with pytest.raises(ValueError, match="weight \\(V, D\\)"):
        call(index, target, weight.t())
    with pytest.raises(ValueError, match="int32 or int64"):
        call(index.bool(), target, weight)
    with pytest.raises(ValueError, match="integer for each row"):
        call(index, target[:0], weight)
    with pytest.raises(ValueError, match="integer for each row"):
        call(index, target.float(), weight)
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
        call(index, target, weight, reduction="max")
    with pytest.raises(ValueError, match="bias is \\(16,\\): pass \\(50,\\)"):
        call(index, target, weight, torch.zeros(D))
    with pytest.raises(ValueError, match="norm_bias came without"):
        call(index, target, weight, None, None, torch.zeros(D))
    with pytest.raises(ValueError, match="one of triton, torch, reference"):
        call(index, target, weight, backend="cpu")
    with pytest.raises(ValueError, match="chunk_rows is 0"):
        call(index, target, weight, chunk_rows=0)
