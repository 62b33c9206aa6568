"""Attention as users call it, on every back end: values, gradients, options, the compiler."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.kernels.attention import (
    attention,
    attention_backend,
    attention_qkvpacked,
    attention_reference,
    rel_pos_attention,
    rel_pos_attention_qkvpacked,
)
from beit_fast.kernels.attention.bias import pad_bias
from beit_fast.kernels.attention.rel_pos_bias import (
    rel_pos_bias,
    rel_pos_bias_reference,
    relative_position_rows,
)
from beit_fast.kernels.philox import draw_rng

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OURS = pytest.mark.parametrize("backend", ["cpu", "triton"])


def packed_reference(qkv, bias=None, **options):
    return attention_reference(*qkv.unbind(2), bias, **options)


class CountCalls(TorchDispatchMode):
    """How often an operator runs."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.calls = operator, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.operator
        return function(*args, **kwargs or {})


def gradients(function, *leaves):
    """Output, and gradients of a loss that is not linear in it."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out, *torch.autograd.grad(out.square().sum(), leaves)


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


# --- the relative-position table ------------------------------------------------------------------


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


# --- properties of the formula --------------------------------------------------------------------


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


# --- dropout --------------------------------------------------------------------------------------


@OURS
def test_dropout_is_that_of_the_reference_forward_and_backward(backend):
    qkv, bias, rng = torch.randn(2, 21, 3, 2, 16), torch.randn(2, 21, 21), torch.tensor([5, 7])
    options = {"dropout_p": 0.3, "rng": rng}
    ours = gradients(lambda *t: attention_qkvpacked(*t, backend=backend, **options), qkv, bias)
    theirs = gradients(lambda *t: packed_reference(*t, **options), qkv, bias)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa", "reference", None])
def test_dropout_keeps_the_mean_and_drops_the_share_asked_for(backend):
    N, p = 64, 0.3
    qkv = torch.zeros(8, N, 3, 2, N)
    qkv[:, :, 2] = torch.eye(N)[:, None]  # so that the output is the weights
    weights = attention_qkvpacked(qkv, dropout_p=p, backend=backend) * N
    assert (weights == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert weights.mean().item() == pytest.approx(1, abs=0.01)


@OURS
def test_a_checkpointed_layer_drops_the_same_again(backend):
    qkv, bias = torch.randn(2, 9, 3, 2, 16), torch.randn(2, 9, 9)
    run = functools.partial(attention_qkvpacked, dropout_p=0.5, backend=backend)
    results = []
    for function in (run, lambda *t: checkpoint(run, *t, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(gradients(function, qkv, bias))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_each_call_drops_anew():
    qkv = torch.randn(2, 9, 3, 2, 16)
    first, second = (attention_qkvpacked(qkv, dropout_p=0.5, backend="cpu") for _ in range(2))
    assert not torch.equal(first, second)


# --- torch's machinery ----------------------------------------------------------------------------


@OURS
def test_the_operators_keep_what_they_promise_the_compiler(backend):
    qkv = torch.randn(2, 7, 3, 2, 16, requires_grad=True)
    q, k, v = (torch.randn(2, 7, 2, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(relative_position_rows((3, 2)), 2, requires_grad=True)
    bias = torch.randn(2, 7, 7, requires_grad=True)
    ops = torch.ops.beit_fast
    padded = pad_bias(bias, [], q, 7, 0.25) if backend == "triton" else None
    options = (torch.tensor([1, 2]), [], 0.25, 0.1, backend, padded)
    of_table = (None, [3, 2], 0.25, 0.0, backend, None)
    torch.library.opcheck(ops.attention.default, (q, k, v, bias, *options))
    torch.library.opcheck(ops.attention_qkvpacked.default, (qkv, table, *of_table))
    out, lse = ops.attention(q, k, v, bias, *options)
    dout = torch.randn_like(out)
    tensors = [t.detach() for t in (dout, lse, q, k, v, bias, out, lse)]
    for needs in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(ops.attention_backward.default, (*tensors, *options, needs))
    tensors = [dout, None, *(t.detach() for t in (qkv, table, out, lse))]
    torch.library.opcheck(
        ops.attention_qkvpacked_backward.default, (*tensors, *of_table, [True, False])
    )


@OURS
def test_compiles_in_one_graph_with_the_same_gradients(backend):
    qkv, bias = torch.randn(2, 9, 3, 2, 16), torch.randn(2, 9, 9)
    run = functools.partial(attention_qkvpacked, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(run, qkv, bias), gradients(compiled, qkv, bias), strict=True):
        torch.testing.assert_close(one, other)


@OURS
def test_exports_with_any_number_of_images(backend):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(relative_position_rows((3, 2)), 2))

        def forward(self, qkv):
            return rel_pos_attention_qkvpacked(qkv, self.table, (3, 2), backend=backend)

    layer = Layer()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        layer, (torch.randn(2, 7, 3, 2, 16),), dynamic_shapes={"qkv": {0: batch}}
    )
    qkv = torch.randn(5, 7, 3, 2, 16)
    torch.testing.assert_close(program.module()(qkv), layer(qkv))


@OURS
@pytest.mark.parametrize("vary", ["images", "biases", "lengths"])
def test_exports_with_a_dense_bias_and_any_number_of(vary, backend):
    class Layer(torch.nn.Module):
        def forward(self, qkv, bias):
            return attention_qkvpacked(qkv, bias, backend=backend)

    def inputs(number, G):
        B, N = (2 * G, number) if vary == "lengths" else (number, 9)
        return torch.randn(B, N, 3, 2, 16), torch.randn(G, 2, N, N)

    size = torch.export.Dim("size", min=2, max=1000)
    shapes = {"images": ({0: size}, None), "biases": ({0: size}, {0: size})}
    shapes["lengths"] = {1: size}, {2: size, 3: size}
    example = inputs(4, G=4 if vary == "biases" else 1)
    program = torch.export.export(Layer(), example, dynamic_shapes=shapes[vary]).module()
    for number in (6, 65):
        arguments = inputs(number, G=number if vary == "biases" else 1)
        torch.testing.assert_close(program(*arguments), Layer()(*arguments))


@OURS
def test_one_compiled_graph_serves_any_number_of_biases(backend):
    graphs = CompileCounter()
    run = functools.partial(attention_qkvpacked, backend=backend)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=graphs)
    for G in (2, 3, 4, 5):
        compiled(torch.randn(G, 9, 3, 2, 16), torch.randn(G, 2, 9, 9))
    assert graphs.frame_count <= 2  # B / G = 1 is a number of its own


def test_the_operators_need_no_padded_bias():
    q, bias = torch.randn(1, 5, 2, 16), torch.randn(2, 5, 5)
    ours = torch.ops.beit_fast.attention(q, q, q, bias, None, [], 0.25, 0.0, "triton")[0]
    torch.testing.assert_close(ours, attention_reference(q, q, q, bias), rtol=1e-2, atol=1e-2)


@OURS
def test_autocast_computes_in_bf16_and_leaves_the_bias_its_dtype(backend):
    qkv = torch.randn(2, 9, 3, 2, 16)
    bias = torch.randn(2, 9, 9, requires_grad=True)
    with torch.autocast(qkv.device.type, torch.bfloat16):
        out = attention_qkvpacked(qkv, bias, backend=backend)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), packed_reference(qkv, bias), rtol=0.02, atol=0.02)


@OURS
def test_operations_are_counted(backend):
    qkv = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = attention_qkvpacked(qkv, backend=backend)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 4 * 9 * 9 * 16
    assert counter.get_total_flops() == forward * 7 // 2
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 5, 4, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, k, backend=backend).sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 4 * 3 * 5 * 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_replayed_graph_drops_anew_and_is_right_without_dropout():
    qkv, bias = torch.randn(2, 197, 3, 2, 64).bfloat16(), torch.randn(2, 197, 197)
    for dropout_p in (0.0, 0.2):
        run = functools.partial(attention_qkvpacked, backend="triton", dropout_p=dropout_p)
        gradients(run, qkv, bias)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(run, qkv, bias)
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append([t.detach().clone() for t in captured])
        same = [torch.equal(one, other) for one, other in zip(*replays, strict=True)]
        assert all(same) if dropout_p == 0 else not any(same)
        if dropout_p == 0:
            for one, other in zip(replays[0], gradients(run, qkv, bias), strict=True):
                assert torch.equal(one, other)


# --- what is refused ------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"pass int64 \(2,\) on "):
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
