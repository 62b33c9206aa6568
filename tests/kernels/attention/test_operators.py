"""The operators among torch's machinery: compiler, export, autocast, counted operations."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from attention_cases import OURS, gradients, packed_reference
from beit_fast.kernels.attention import (
    attention,
    attention_qkvpacked,
    attention_reference,
    rel_pos_attention_qkvpacked,
)
from beit_fast.kernels.attention.bias import pad_bias
from beit_fast.kernels.attention.rel_pos_bias import relative_position_rows


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
