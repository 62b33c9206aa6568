"""Attention as users call it, on every back end, against the reference; what is refused."""

import functools

import pytest
import torch

from attention_cases import DTYPES, OURS, CountCalls, gradients, packed_reference
from beit_fast.kernels.attention import (
    attention,
    attention_backend,
    attention_qkvpacked,
    attention_reference,
    rel_pos_attention,
    rel_pos_attention_qkvpacked,
)
from beit_fast.kernels.attention.rel_pos_bias import (
    rel_pos_bias,
    rel_pos_bias_reference,
    relative_position_rows,
)
from beit_fast.kernels.philox import draw_rng


@DTYPES
@pytest.mark.parametrize("backend", ["cpu", "triton", None])
@pytest.mark.parametrize(
    ("B", "N", "H", "K"),
    [(2, 70, 2, 64), (3, 50, 3, 8), (0, 5, 2, 8), (2, 0, 2, 8)],
    ids=["B2-N70-K64", "B3-N50-K8", "no-images", "no-tokens"],
)
def test_packed_attention_is_as_exact_as_the_reference(
    assert_as_exact_as_reference, B, N, H, K, backend, dtype
):
    tensors = [torch.randn(B, N, 3, H, K), torch.randn(H, N, N)]
    function = functools.partial(attention_qkvpacked, backend=backend)
    assert_as_exact_as_reference(function, packed_reference, tensors, dtype)


@pytest.mark.parametrize(
    ("N", "std"),
    [(N, std) for N in (49, 64, 144, 197, 256) for std in (0.02, 1.0, 4.0)]
    + [(N, 1.0) for N in (257, 577, 1025)],  # the interpreter is slow
)
def test_the_lengths_of_published_models_are_as_exact_as_the_reference(
    assert_as_exact_as_reference, N, std
):
    tensors = [torch.randn(1, N, 3, 1, 64), std * torch.randn(1, N, N)]
    function = functools.partial(attention_qkvpacked, backend="triton")
    assert_as_exact_as_reference(function, packed_reference, tensors, torch.bfloat16)


def test_a_sum_over_many_images_is_as_exact_as_the_reference(assert_as_exact_as_reference):
    tensors = [torch.randn(256, 5, 3, 1, 32), torch.randn(1, 5, 5)]
    function = functools.partial(attention_qkvpacked, backend="triton")
    assert_as_exact_as_reference(function, packed_reference, tensors, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_lonely_token_is_as_exact_as_the_reference(assert_as_exact_as_reference, dtype):
    tensors = [torch.randn(1, 1, 3, 2, 64), torch.randn(2, 1, 1)]
    assert_as_exact_as_reference(attention_qkvpacked, packed_reference, tensors, dtype)


@DTYPES
@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa", None])
def test_attention_over_other_keys_is_as_exact_as_the_reference(
    assert_as_exact_as_reference, backend, dtype
):
    q, k, v = torch.randn(2, 7, 3, 16), torch.randn(2, 11, 3, 16), torch.randn(2, 11, 3, 16)
    tensors = [q, k, v, torch.randn(3, 7, 11)]
    function = functools.partial(attention, backend=backend)
    assert_as_exact_as_reference(function, attention_reference, tensors, dtype)


@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa"])
def test_attention_without_bias_is_as_exact_as_the_reference(assert_as_exact_as_reference, backend):
    tensors = [torch.randn(2, 17, 3, 2, 16)]
    function = functools.partial(attention_qkvpacked, backend=backend)
    assert_as_exact_as_reference(function, packed_reference, tensors, torch.float32)


@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa"])
def test_each_window_takes_the_bias_of_its_place(assert_as_exact_as_reference, backend):
    tensors = [torch.randn(6, 9, 3, 2, 16), torch.randn(3, 2, 9, 9)]
    function = functools.partial(attention_qkvpacked, backend=backend)
    assert_as_exact_as_reference(function, packed_reference, tensors, torch.float32)
    qkv, bias = tensors
    out = attention_qkvpacked(qkv, bias, backend=backend)
    alone = attention_qkvpacked(qkv[4:5], bias[1], backend=backend)
    torch.testing.assert_close(out[4:5], alone)


@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa"])
def test_a_query_that_sees_no_key_gets_zeros_and_gives_none(backend):
    qkv = torch.randn(2, 9, 3, 2, 16)
    bias = torch.randn(2, 9, 9)
    bias[0, 3] = -torch.inf
    bias[:, :, 5] = -torch.inf
    results = gradients(lambda *t: attention_qkvpacked(*t, backend=backend), qkv, bias)
    out, dqkv, dbias = results
    assert (out[:, 3, 0] == 0).all()
    assert (dqkv[:, 3, 0, 0] == 0).all()
    assert (dqkv[:, 5, 1:] == 0).all()
    assert (dbias[:, :, 5] == 0).all()
    for ours, theirs in zip(results, gradients(packed_reference, qkv, bias), strict=True):
        torch.testing.assert_close(ours, theirs)


@OURS
@pytest.mark.parametrize("trained", ["q", "k", "v", "bias"])
def test_one_input_may_be_trained_alone(backend, trained):
    tensors = {name: torch.randn(2, 9, 2, 16) for name in "qkv"}
    tensors["bias"] = torch.randn(2, 9, 9)
    tensors[trained].requires_grad_()
    for function in (functools.partial(attention, backend=backend), attention_reference):
        function(**tensors).square().sum().backward()
        gradient, tensors[trained].grad = tensors[trained].grad, None
        if function is not attention_reference:
            ours = gradient
    torch.testing.assert_close(ours, gradient)


@OURS
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_a_table_gives_what_its_dense_bias_gives_and_gets_its_gradient(backend, packed):
    grid, rows = (3, 2), relative_position_rows((3, 2))
    qkv, table = torch.randn(3, 7, 3, 2, 16), torch.randn(rows, 2)

    def ours(qkv, table):
        if packed:
            return rel_pos_attention_qkvpacked(qkv, table, grid, backend=backend)
        return rel_pos_attention(*qkv.unbind(2), table, grid, backend=backend)

    def theirs(qkv, table):
        return packed_reference(qkv, rel_pos_bias_reference(table, grid))

    results = zip(gradients(ours, qkv, table), gradients(theirs, qkv, table), strict=True)
    for one, other in results:
        torch.testing.assert_close(one, other)


def test_a_table_goes_to_other_libraries_as_a_dense_bias():
    qkv, table = torch.randn(3, 7, 3, 2, 16), torch.randn(relative_position_rows((3, 2)), 2)
    ours = rel_pos_attention_qkvpacked(qkv, table, (3, 2), backend="sdpa")
    torch.testing.assert_close(ours, packed_reference(qkv, rel_pos_bias_reference(table, (3, 2))))


@OURS
def test_layers_that_share_a_table_scatter_its_gradient_once(backend):
    table = torch.randn(relative_position_rows((3, 2)), 2, requires_grad=True)
    layers = [torch.randn(2, 7, 3, 2, 16) for _ in range(3)]
    bias = rel_pos_bias(table, (3, 2))
    loss = sum(attention_qkvpacked(qkv, bias, backend=backend).square().sum() for qkv in layers)
    with CountCalls(torch.ops.beit_fast.rel_pos_bias_backward.default) as scatters:
        loss.backward()
    assert scatters.calls == 1
    dense = rel_pos_bias_reference(table, (3, 2))
    want = sum(packed_reference(qkv, dense).square().sum() for qkv in layers)
    torch.testing.assert_close(table.grad, torch.autograd.grad(want, table)[0])


def test_shapes_that_do_not_fit_are_refused_by_name():
    qkv = torch.randn(2, 5, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    with pytest.raises(ValueError, match=r"pass \(B, N, 3, H, K\)"):
        attention_qkvpacked(qkv[:, :, :2])
    for bias in (torch.zeros(2, 4, 5), torch.zeros(5, 5)):
        with pytest.raises(ValueError, match="resize the position table"):
            attention_qkvpacked(qkv, bias)
    with pytest.raises(ValueError, match="3 biases for 2 images: their number must divide"):
        attention_qkvpacked(qkv, torch.zeros(3, 2, 5, 5))
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k[:, :4], v)
    with pytest.raises(ValueError, match="heads of 8 channels"):
        attention(q, k[..., :4], v[..., :4])
    with pytest.raises(ValueError, match="cast them to one dtype"):
        attention(q, k.half(), v)
    with pytest.raises(ValueError, match="5 queries and 5 keys, a grid of 2 x 3 patches"):
        rel_pos_attention_qkvpacked(qkv, torch.zeros(relative_position_rows((2, 3)), 2), (2, 3))
    with pytest.raises(ValueError, match="a table of 3 heads"):
        rel_pos_attention(q, k, v, torch.zeros(12, 3), (2, 2))


def test_options_out_of_range_are_refused_by_name():
    q, k, v = torch.randn(2, 5, 3, 2, 8).unbind(2)
    with pytest.raises(ValueError, match="probability"):
        attention(q, k, v, dropout_p=1.0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="pass a positive number"):
            attention(q, k, v, scale=scale)
    with pytest.raises(ValueError, match=r"pass int64 \(2,\), seed and offset, on "):
        attention(q, k, v, dropout_p=0.1, rng=torch.zeros(2))
    with pytest.raises(ValueError, match="draws its dropout itself"):
        attention(q, k, v, dropout_p=0.1, rng=draw_rng(q.device), backend="sdpa")


def test_what_runs_can_be_asked(device):
    q, k, v = torch.randn(2, 5, 3, 2, 8, device="cpu").unbind(2)
    bias = torch.zeros(2, 5, 5, requires_grad=True, device="cpu")
    assert attention_backend(q, k, v).backend == "sdpa"
    assert attention_backend(q, k, v, bias).backend == "cpu"
    q, k, v = torch.randn(2, 5, 3, 2, 8, device=device).unbind(2)
    assert attention_backend(q, k, v, backend="triton").backend == "triton"
