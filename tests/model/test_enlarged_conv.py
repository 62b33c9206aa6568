"""Products before enlargement, against maps that are enlarged, joined and convolved."""

import pytest
import torch

from beit_fast.model.enlarged_conv import conv_of_enlarged, conv_of_enlarged_reference

CHANNELS = (5, 6, 7, 8)


def inputs(sizes, dtype=torch.float64):
    torch.manual_seed(0)
    maps = [torch.randn(2, C, *s, dtype=dtype) for C, s in zip(CHANNELS, sizes, strict=True)]
    weight = torch.randn(4, sum(CHANNELS), 3, 3, dtype=dtype) / sum(CHANNELS) ** 0.5 / 3
    maps = [each.contiguous(memory_format=torch.channels_last) for each in maps]
    return [tensor.requires_grad_() for tensor in (*maps, weight)]


@pytest.mark.parametrize(
    "sizes",
    [
        [(24, 16), (12, 8), (6, 4), (3, 2)],
        [(14, 22), (7, 11), (4, 6), (2, 3)],
        [(9, 9), (8, 8), (3, 3), (1, 1)],
        [(4, 4), (4, 4), (6, 3), (1, 2)],  # the same size, and a larger one
    ],
)
def test_values_and_gradients_are_those_of_enlarged_maps(sizes):
    tensors = inputs(sizes)
    *maps, weight = tensors
    out, expected = conv_of_enlarged(maps, weight), conv_of_enlarged_reference(maps, weight)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert out.stride(1) == 1
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, dout)
    wanted = torch.autograd.grad(expected, tensors, dout)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_half_the_bits_lose_at_most_twice_what_torch_loses(autocast):
    exact = inputs([(24, 16), (12, 8), (6, 4), (3, 2)])
    dtypes = [torch.bfloat16] * 4 + [torch.float32 if autocast else torch.bfloat16]
    exact = [tensor.detach().bfloat16().double().requires_grad_() for tensor in exact]
    errors = []
    for convolve in (conv_of_enlarged, conv_of_enlarged_reference):
        pairs = zip(exact, dtypes, strict=True)
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor, dtype in pairs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = convolve(tensors[:-1], tensors[-1])
        assert out.dtype == torch.bfloat16
        wanted = conv_of_enlarged_reference(exact[:-1], exact[-1])
        gradients = torch.autograd.grad(out.float().square().sum(), tensors)
        exact_gradients = torch.autograd.grad(wanted.square().sum(), exact)
        pairs = zip((out, *gradients), (wanted, *exact_gradients), strict=True)
        errors.append([(a.double() - b).norm() / b.norm() for a, b in pairs])
    for ours, torchs in zip(*errors, strict=True):
        assert ours <= 2 * torchs
