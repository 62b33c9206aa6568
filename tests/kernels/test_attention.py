import pytest
import torch

from beit_fast.kernels.attention import attention, attention_qkvpacked, attention_reference


def packed_reference(qkv, bias=None, **options):
    return attention_reference(*qkv.unbind(2), bias, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("B", "N", "H", "K"),
    [(2, 197, 2, 64), (3, 50, 3, 8), (1, 1, 2, 64), (0, 5, 2, 8)],
    ids=["B2-N197", "B3-N50-K8", "cls-only", "no-images"],
)
def test_packed_attention_is_as_exact_as_the_reference(
    assert_as_exact_as_reference, B, N, H, K, dtype
):
    tensors = [torch.randn(B, N, 3, H, K), torch.randn(H, N, N)]
    assert_as_exact_as_reference(attention_qkvpacked, packed_reference, tensors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_over_other_keys_is_as_exact_as_the_reference(
    assert_as_exact_as_reference, dtype
):
    q, k, v = torch.randn(2, 7, 3, 16), torch.randn(2, 11, 3, 16), torch.randn(2, 11, 3, 16)
    tensors = [q, k, v, torch.randn(3, 7, 11)]
    assert_as_exact_as_reference(attention, attention_reference, tensors, dtype)


def test_attention_without_bias_is_as_exact_as_the_reference(assert_as_exact_as_reference):
    tensors = [torch.randn(2, 17, 3, 2, 16)]
    assert_as_exact_as_reference(attention_qkvpacked, packed_reference, tensors, torch.float32)


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


@pytest.mark.parametrize("trains_bias", [True, False], ids=["trained-bias", "frozen-bias"])
def test_weights_sum_to_one(trains_bias):
    qkv = torch.randn(2, 9, 3, 2, 8)
    qkv[:, :, 2] = 1.0
    bias = torch.randn(2, 9, 9, requires_grad=trains_bias)
    torch.testing.assert_close(attention_qkvpacked(qkv, bias), torch.ones(2, 9, 2, 8))


@pytest.mark.parametrize("trains_bias", [True, False], ids=["trained-bias", "frozen-bias"])
def test_a_shift_of_all_logits_of_a_query_changes_nothing(trains_bias):
    qkv = torch.randn(2, 9, 3, 2, 8)
    bias = torch.randn(2, 9, 9)
    shifted = bias + torch.randn(2, 9, 1)
    out, out_shifted = (
        attention_qkvpacked(qkv, b.requires_grad_(trains_bias)) for b in (bias, shifted)
    )
    torch.testing.assert_close(out, out_shifted)


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


def test_non_contiguous_inputs_give_what_contiguous_ones_give():
    qkv = torch.randn(3, 9, 2, 8, 2).permute(4, 1, 0, 2, 3)
    bias = torch.randn(9, 9, 2).permute(2, 0, 1)
    results = []
    for contiguous in (False, True):
        leaves = [(t.contiguous() if contiguous else t).requires_grad_() for t in (qkv, bias)]
        out = attention_qkvpacked(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for strided, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous)


def test_a_gradient_of_odd_strides_is_taken():
    qkv, bias = torch.randn(2, 9, 3, 2, 8), torch.randn(2, 9, 9)
    dout = torch.randn(8, 2, 9, 2).permute(3, 2, 1, 0)
    for leaf in (qkv, bias):
        leaf.requires_grad_()
    strided = torch.autograd.grad(attention_qkvpacked(qkv, bias), (qkv, bias), dout)
    plain = torch.autograd.grad(attention_qkvpacked(qkv, bias), (qkv, bias), dout.contiguous())
    for one, other in zip(strided, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("trains_bias", [True, False], ids=["trained-bias", "frozen-bias"])
def test_dropout_keeps_the_mean_and_drops_the_share_asked_for(trains_bias):
    N, p = 64, 0.3
    qkv = torch.zeros(8, N, 3, 2, N)
    qkv[:, :, 2] = torch.eye(N)[:, None]  # so that the output is the weights
    bias = torch.zeros(2, N, N, requires_grad=trains_bias)
    weights = attention_qkvpacked(qkv, bias, dropout_p=p) * N
    assert (weights == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert weights.mean().item() == pytest.approx(1, abs=0.01)


def test_autocast_computes_in_bf16():
    qkv = torch.randn(2, 9, 3, 2, 8)
    bias = torch.randn(2, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_qkvpacked(qkv, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), packed_reference(qkv, bias), rtol=0.02, atol=0.02)


def test_compiles_in_one_graph_with_the_same_gradients():
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    bias = torch.randn(2, 9, 9, requires_grad=True)
    compiled = torch.compile(attention_qkvpacked, fullgraph=True, backend="aot_eager")
    eager_out, compiled_out = attention_qkvpacked(qkv, bias), compiled(qkv, bias)
    torch.testing.assert_close(compiled_out, eager_out)
    for one, other in zip(
        torch.autograd.grad(eager_out.square().sum(), (qkv, bias)),
        torch.autograd.grad(compiled_out.square().sum(), (qkv, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_shapes_that_do_not_fit_are_refused_by_name():
    qkv = torch.randn(2, 5, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    with pytest.raises(ValueError, match="pass \\(B, N, 3, H, K\\)"):
        attention_qkvpacked(qkv[:, :, :2])
    for bias in (torch.zeros(2, 4, 5), torch.zeros(2, 2, 5, 5)):
        with pytest.raises(ValueError, match="resize the position table"):
            attention_qkvpacked(qkv, bias)
        with pytest.raises(ValueError, match="resize the position table"):
            attention_qkvpacked(qkv, bias.requires_grad_())
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k[:, :4], v)
    with pytest.raises(ValueError, match="heads of 8 channels"):
        attention(q, k[..., :4], v[..., :4])
    with pytest.raises(ValueError, match="probability"):
        attention(q, k, v, dropout_p=1.0)
