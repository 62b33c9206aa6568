"""What holds of attention whatever its inputs: of its formula, its bits, its strides."""

import functools

import pytest
import torch

from attention_cases import OURS, gradients, packed_reference
from beit_fast.kernels.attention import attention, attention_qkvpacked, attention_reference


def test_reference_is_the_formula_one_query_at_a_time():
    q, k, v = torch.randn(3, 2, 4, 3, 8, dtype=torch.float64)
    bias = torch.randn(3, 4, 4, dtype=torch.float64)
    out = attention_reference(q, k, v, bias, scale=0.3)
    b, n, h = 1, 2, 1
    logits = torch.stack([0.3 * q[b, n, h].dot(k[b, m, h]) + bias[h, n, m] for m in range(4)])
    weights = logits.exp() / logits.exp().sum()
    torch.testing.assert_close(out[b, n, h], weights @ v[b, :, h])


def test_training_a_bias_on_the_cpu_has_the_gradients_of_finite_differences():
    qkv = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: attention_qkvpacked(*t, scale=0.7), (qkv, bias))


@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa"])
def test_weights_sum_to_one(backend):
    qkv = torch.randn(2, 9, 3, 2, 8)
    qkv[:, :, 2] = 1.0
    out = attention_qkvpacked(qkv, torch.randn(2, 9, 9), backend=backend)
    torch.testing.assert_close(out, torch.ones(2, 9, 2, 8))


@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa"])
def test_a_shift_of_all_logits_of_a_query_changes_nothing(backend):
    qkv, bias = torch.randn(2, 9, 3, 2, 8), torch.randn(2, 9, 9)
    run = functools.partial(attention_qkvpacked, backend=backend)
    plain = gradients(run, qkv, bias)
    shifted = gradients(run, qkv, bias + torch.randn(2, 9, 1))
    for one, other in zip(plain, shifted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@OURS
def test_packed_and_separate_give_the_same_bits(backend):
    qkv, bias = torch.randn(2, 9, 3, 2, 16), torch.randn(2, 9, 9)
    packed = gradients(lambda t, b: attention_qkvpacked(t, b, backend=backend), qkv, bias)
    apart = gradients(lambda t, b: attention(*t.unbind(2), b, backend=backend), qkv, bias)
    for one, other in zip(packed, apart, strict=True):
        assert torch.equal(one, other)


@OURS
def test_the_same_input_gives_the_same_bits(backend):
    qkv, bias = torch.randn(3, 33, 3, 2, 16), torch.randn(2, 33, 33)
    first, second = (
        gradients(lambda t, b: attention_qkvpacked(t, b, backend=backend), qkv, bias)
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@OURS
def test_permuting_the_images_permutes_the_output_and_leaves_the_bias_its_gradient(backend):
    qkv, bias = torch.randn(4, 33, 3, 2, 16), torch.randn(2, 33, 33)
    order = torch.tensor([2, 0, 3, 1])
    run = functools.partial(attention_qkvpacked, backend=backend)
    out, dqkv, dbias = gradients(run, qkv, bias)
    out_permuted, dqkv_permuted, dbias_permuted = gradients(run, qkv[order], bias)
    assert torch.equal(out_permuted, out[order])
    assert torch.equal(dqkv_permuted, dqkv[order])
    torch.testing.assert_close(dbias_permuted, dbias)


def test_frozen_trained_and_batched_biases_give_the_same():
    qkv, bias = torch.randn(2, 9, 3, 2, 8), torch.randn(2, 9, 9)
    frozen = attention_qkvpacked(qkv, bias, scale=0.5)
    trained = attention_qkvpacked(qkv, bias.clone().requires_grad_(), scale=0.5)
    batched = attention_qkvpacked(qkv, bias.clone()[None].requires_grad_(), scale=0.5)
    torch.testing.assert_close(trained, frozen)
    torch.testing.assert_close(batched, trained, rtol=0, atol=0)


def test_a_batched_bias_gets_its_gradient_in_its_own_shape():
    bias = torch.randn(1, 2, 9, 9, requires_grad=True)
    attention_qkvpacked(torch.randn(2, 9, 3, 2, 8), bias).sum().backward()
    assert bias.grad.shape == bias.shape


@OURS
@pytest.mark.parametrize(
    "order", [(4, 1, 0, 2, 3), (0, 2, 1, 3, 4)], ids=["last-strided", "heads-strided"]
)
def test_strides_change_nothing(backend, order):
    shape = (3, 9, 3, 2, 8)
    inverse = [order.index(axis) for axis in range(5)]
    qkv = torch.randn([shape[axis] for axis in order]).permute(inverse)
    bias = torch.randn(9, 9, 2).permute(2, 0, 1)
    run = functools.partial(attention_qkvpacked, backend=backend)
    strided = gradients(run, qkv, bias)
    plain = gradients(run, qkv.contiguous(), bias.contiguous())
    for one, other in zip(strided, plain, strict=True):
        assert torch.equal(one, other)


@OURS
def test_a_gradient_of_odd_strides_is_taken(backend):
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    bias = torch.randn(2, 9, 9, requires_grad=True)
    out = attention_qkvpacked(qkv, bias, backend=backend)
    dout = torch.randn(8, 2, 9, 2).permute(3, 2, 1, 0)
    strided = torch.autograd.grad(out, (qkv, bias), dout, retain_graph=True)
    plain = torch.autograd.grad(out, (qkv, bias), dout.contiguous())
    for one, other in zip(strided, plain, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_of_one_number_for_all_is_taken():
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    attention_qkvpacked(qkv, backend="triton").sum().backward()  # dout has strides of 0
    ours, qkv.grad = qkv.grad, None
    packed_reference(qkv).sum().backward()
    torch.testing.assert_close(ours, qkv.grad, rtol=1e-4, atol=1e-5)


def test_images_more_than_two_billion_elements_apart_are_reached():
    far = 2**31 + 64
    memory = torch.empty(far + 1000, dtype=torch.bfloat16)  # of which few pages are touched
    qkv = memory.as_strided((2, 5, 3, 2, 16), (far, 96, 32, 16, 1))
    qkv.copy_(torch.randn(2, 5, 3, 2, 16))
    bias = torch.randn(2, 5, 5)
    run = functools.partial(attention_qkvpacked, backend="triton")
    near = gradients(run, qkv.contiguous(), bias)
    for one, other in zip(gradients(run, qkv, bias), near, strict=True):
        assert torch.equal(one, other)
