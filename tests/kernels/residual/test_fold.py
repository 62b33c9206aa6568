import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels.residual.fold import fold_layer_scale, fold_norm_affine


def tensors(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same_function_and_gradients(folded, plain, inputs):
    """In fp64, to a few roundings: the identity is exact."""
    results = []
    for function in (folded, plain):
        out = function()
        dout = torch.ones_like(out) * torch.arange(out.shape[-1])
        results.append([out, *torch.autograd.grad(out, inputs, dout)])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_layer_scale_in_the_weight_is_layer_scale(with_bias):
    u, weight, gamma, b = tensors((5, 7), (6, 7), (6,), (6,))
    bias = b if with_bias else None
    assert_same_function_and_gradients(
        lambda: F.linear(u, *fold_layer_scale(weight, bias, gamma)),
        lambda: gamma * F.linear(u, weight, bias),
        [u, weight, gamma, *([b] if with_bias else [])],
    )


def test_the_gradient_of_gamma_is_that_of_the_docstring():
    u, weight, gamma, bias = tensors((5, 7), (6, 7), (6,), (6,))
    folded = fold_layer_scale(weight, bias, gamma)
    for tensor in folded:
        tensor.retain_grad()
    F.linear(u, *folded).square().sum().backward()
    dweight, dbias = (tensor.grad for tensor in folded)
    torch.testing.assert_close(gamma.grad, (weight * dweight).sum(dim=1) + bias * dbias)
    torch.testing.assert_close(weight.grad, gamma[:, None] * dweight)
    torch.testing.assert_close(bias.grad, gamma * dbias)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("affine", ["weight-and-bias", "weight", "none"])
def test_a_norms_affine_in_the_next_linear_is_the_norms_affine(affine, with_bias):
    n, weight, w, s, b = tensors((5, 7), (6, 7), (7,), (7,), (6,))
    bias = b if with_bias else None
    w_or_none = None if affine == "none" else w
    s_or_none = s if affine == "weight-and-bias" else None
    inputs = [n, weight, *[t for t in (w_or_none, s_or_none, bias) if t is not None]]

    def plain():
        normed = n if w_or_none is None else n * w
        return F.linear(normed if s_or_none is None else normed + s, weight, bias)

    assert_same_function_and_gradients(
        lambda: F.linear(n, *fold_norm_affine(weight, bias, w_or_none, s_or_none)), plain, inputs
    )


def test_the_gradients_of_the_norm_are_those_of_the_docstring():
    n, weight, w, s, bias = tensors((5, 7), (6, 7), (7,), (7,), (6,))
    folded = fold_norm_affine(weight, bias, w, s)
    for tensor in folded:
        tensor.retain_grad()
    F.linear(n, *folded).square().sum().backward()
    dweight, dbias = (tensor.grad for tensor in folded)
    torch.testing.assert_close(w.grad, (weight * dweight).sum(dim=0))
    torch.testing.assert_close(s.grad, weight.t() @ dbias)
