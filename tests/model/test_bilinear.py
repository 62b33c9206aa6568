"""Products in the place of torch's resizing and pooling, against these."""

import pytest
import torch
import torch.nn.functional as F

from beit_fast.model.bilinear import Pool, by_products, enlarging, pooling, resize, resize_backward

SIZES = [((6, 4), (12, 8)), ((5, 7), (13, 22)), ((1, 2), (4, 6)), ((9, 9), (4, 3))]


def maps(size, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)


def equal_with_gradients(ours, torchs, x):
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-13)
    dout = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(out, x, dout)[0] for out in (ours, torchs))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    return dout, wanted


@pytest.mark.parametrize(("size", "other"), SIZES)
def test_products_resize_as_torch_does(size, other):
    x = maps(size)
    wanted = F.interpolate(x, size=other, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize(x, other), wanted)
    dout, dx = equal_with_gradients(by_products(x, enlarging(x, other)), wanted, x)
    torch.testing.assert_close(resize_backward(dout, size), dx)
    turned = [line.t() for line in enlarging(x, other)]
    torch.testing.assert_close(by_products(dout, turned), dx, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 6), (16, 20), (5, 7), (1, 2)])
@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_products_pool_as_torch_does(side, size):
    x = maps(size)
    wanted = F.adaptive_avg_pool2d(x, side)
    torch.testing.assert_close(Pool(side)(x), wanted)
    equal_with_gradients(by_products(x, pooling(x, side)), wanted, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lines", [lambda x: enlarging(x, (22, 14)), lambda x: pooling(x, 3)])
def test_products_keep_the_dtype_and_lose_little_under_autocast(dtype, lines):
    exact = maps((11, 7)).detach()
    x = exact.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = by_products(x, lines(x))
    assert out.dtype == dtype
    wanted = by_products(x.double(), lines(x.double()))
    bound = 2 * torch.finfo(dtype).eps  # an even factor's weights are exact; two roundings
    assert (out.double() - wanted).abs().max() <= bound * wanted.abs().max()


def test_products_are_one_graph_under_autocast():
    x = maps((6, 4), torch.bfloat16)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return by_products(x, enlarging(x, (12, 8)))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_on_a_gpu_have_the_same_bits_every_time():
    x = torch.randn(2, 64, 40, 40, device="cuda", requires_grad=True)
    for function in (lambda x: resize(x, (160, 160)), Pool(3), Pool(6)):
        out = function(x)
        dout = torch.randn_like(out)
        first, *others = (torch.autograd.grad(function(x), x, dout)[0] for _ in range(5))
        assert all(torch.equal(first, other) for other in others)
