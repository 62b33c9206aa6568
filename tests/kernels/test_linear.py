import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels import linear as module
from beit_fast.kernels.linear import linear, linear_reference

SHAPES = {
    "B2-N197-base": ((2, 197, 768), 96),
    "rows": ((5, 16), 7),
    "four-axes": ((2, 3, 4, 5), 6),
    "one-row": ((1, 1, 24), 8),
    "one-output": ((3, 9, 8), 1),
    "one-input": ((3, 9, 1), 8),
    "no-rows": ((0, 9, 8), 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("shape", "width"), SHAPES.values(), ids=SHAPES)
def test_as_exact_as_the_reference(assert_as_exact_as_reference, shape, width, with_bias, dtype):
    tensors = [torch.randn(shape), torch.randn(width, shape[-1])]
    if with_bias:
        tensors.append(torch.randn(width))
    assert_as_exact_as_reference(linear, linear_reference, tensors, dtype)


@pytest.mark.parametrize(
    "strided",
    [
        {"x": lambda: torch.randn(16, 9, 3).permute(2, 1, 0)},
        {"x": lambda: torch.randn(3, 18, 32)[:, ::2, ::2]},
        {"weight": lambda: torch.randn(16, 7).t()},
        {"dout": lambda: torch.ones(1).expand(3, 9, 7)},
        {"dout": lambda: torch.randn(7, 9, 3).permute(2, 1, 0)},
        {"x": lambda: torch.randn(1, 1, 16).expand(3, 9, 16)},
    ],
    ids=["x-turned", "x-sliced", "weight-turned", "dout-constant", "dout-turned", "x-expanded"],
)
def test_any_strides_give_what_contiguous_tensors_give(strided):
    shapes = {"x": (3, 9, 16), "weight": (7, 16), "dout": (3, 9, 7)}
    x, weight, dout = (
        strided[name]() if name in strided else torch.randn(shape) for name, shape in shapes.items()
    )
    bias = torch.randn(7)
    results = []
    for tensors, gradient in (
        ((x, weight, bias), dout),
        ((x.contiguous(), weight.contiguous(), bias), dout.contiguous()),
    ):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = linear(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, gradient)))
    for strided, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous)


def test_onednn_multiplies_in_fp32_and_torch_otherwise(monkeypatch):
    taken = []
    original = module._product
    monkeypatch.setattr(module, "_product", lambda *a: taken.append(1) or original(*a))
    x, weight = torch.randn(2, 9, 8, device="cpu"), torch.randn(4, 8, device="cpu")
    linear(x, weight)
    assert len(taken) == torch.backends.mkldnn.is_available()
    taken.clear()
    linear(x.double(), weight.double())
    linear(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.compile(linear, fullgraph=True, backend="eager")(x, weight)
    assert not taken


def test_a_build_without_the_operator_runs_on_torch_s_own(monkeypatch):
    monkeypatch.setattr(module, "_has_onednn", lambda: False)
    monkeypatch.setattr(module, "_product", None)
    x, weight, bias = torch.randn(2, 9, 8), torch.randn(4, 8), torch.randn(4)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_only_an_input_that_wants_its_gradient_costs_a_product(monkeypatch):
    products = []
    original = module._product
    monkeypatch.setattr(module, "_product", lambda *a: products.append(1) or original(*a))
    x = torch.randn(2, 9, 8, device="cpu")
    weight = torch.randn(4, 8, requires_grad=True, device="cpu")
    linear(x, weight).sum().backward()
    frozen = len(products)
    linear(x.requires_grad_(), weight).sum().backward()
    available = int(torch.backends.mkldnn.is_available())
    assert (frozen, len(products) - frozen) == (available, 2 * available)


def test_shapes_that_do_not_fit_are_refused_by_name():
    for x, weight in (
        (torch.zeros(2, 3, 8), torch.zeros(8, 4)),
        (torch.zeros(8), torch.zeros(4, 8)),
        (torch.zeros(3, 8), torch.zeros(4, 8, 1)),
    ):
        with pytest.raises(ValueError, match="weight \\(F, D\\)"):
            linear(x, weight)
