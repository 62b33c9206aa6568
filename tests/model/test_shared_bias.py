"""The bias that all layers share is padded for the kernels once a step, there and back."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from beit_fast.kernels.attention import attention
from beit_fast.kernels.attention import bias as attention_bias
from beit_fast.kernels.attention.backends import use_backend
from beit_fast.model.heads import BeitForMaskedImageModeling

IMAGES, DEPTH = (2, 3, 16, 16), 3


@pytest.fixture
def pads(monkeypatch):
    """The kernels that pad a bias, launched so far."""
    launched, launch = [], attention_bias.launch

    def counted(kernel, *arguments, **options):
        if kernel is attention_bias._pad_bias_kernel:
            launched.append(kernel)
        return launch(kernel, *arguments, **options)

    monkeypatch.setattr(attention_bias, "launch", counted)
    return launched


def step(model, **options):
    """The loss of a training step, compiled if there are options, and all gradients."""

    def loss(images, mask, index, tokens):
        return model.loss(images, mask, index, tokens)[0]

    if options:
        loss = torch.compile(loss, fullgraph=True, **options)
    images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
    mask, index = torch.arange(8).view(2, 4) % 3 == 0, torch.arange(4).int()
    inputs = images, mask, index, torch.zeros(2, 4, dtype=torch.int64)
    value = loss(*(x.to(next(model.parameters()).device) for x in inputs))
    return value.detach(), *torch.autograd.grad(value, list(model.parameters()))


@pytest.fixture
def model(tiny, randomize, device):
    model = BeitForMaskedImageModeling(tiny(img_size=16, num_heads=2, depth=DEPTH))
    return randomize(model).to(device)


def test_a_step_pads_the_shared_bias_once_and_differentiates_it_as_the_reference(model, pads):
    with use_backend("reference"):
        want = step(model)
    with use_backend("triton"):
        ours = step(model)
    assert len(pads) == 1
    for our, their in zip(ours, want, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of that back end
def test_a_compiled_step_pads_the_shared_bias_once(model, pads):
    with use_backend("triton"):
        want = step(model)
        pads.clear()
        # The partition is Inductor's, which makes equal calls of an operator one.
        ours = step(model, backend="aot_eager_decomp_partition")
    assert len(pads) == 1
    for our, their in zip(ours, want, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("enable", [True, "selective"])
def test_what_is_recomputed_has_the_same_gradients(model, enable):
    with use_backend("triton"):
        want = step(model)
        model.set_grad_checkpointing(enable)
        ours = step(model)
    for our, their in zip(ours, want, strict=True):
        assert torch.equal(our, their)


def test_layers_that_their_user_recomputes_have_the_same_gradients(model):
    with use_backend("triton"):
        want = step(model)
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        ours = step(model)
    for our, their in zip(ours, want, strict=True):
        assert torch.equal(our, their)


def test_a_bias_of_one_call_keeps_no_padded_copy_until_backward(pads, device):
    with device:
        q, bias = torch.randn(1, 4, 2, 16), torch.zeros(2, 4, 4, requires_grad=True)
    out = attention(q, q, q, bias, backend="triton")
    assert out.grad_fn.padded is None
    out.sum().backward()
    assert len(pads) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_bias_that_a_hook_writes_is_read_as_written(model, device, mode):
    def hide(_block, arguments):
        arguments[1][..., 1:] = -1e4

    model.blocks[1].register_forward_pre_hook(hide)
    images, results = torch.ones(IMAGES).to(device), []
    for backend in ("reference", "triton"):
        with mode(), use_backend(backend):
            results.append(model.forward_features(images).clone())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_a_bias_that_is_written_in_between_is_padded_again(pads, device):
    with device:
        q, bias = torch.zeros(1, 4, 2, 16), torch.zeros(2, 4, 4)
    with attention_bias.padding_once():
        first = attention_bias.pad_for(q, bias, 0.25)
        assert attention_bias.pad_for(q, bias, 0.25) is first
        bias.fill_(1)
        assert (attention_bias.pad_for(q, bias, 0.25)[0, :, :4, :4] == 4).all()
        assert attention_bias.pad_for(q, bias, 0.5)[0, 0, 0, 0] == 2
    assert len(pads) == 3
