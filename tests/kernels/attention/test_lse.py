"""`return_lse`: the natural log-sum-exp on every back end, with its gradient, for merging parts."""

import functools

import pytest
import torch

from beit_fast.kernels._triton import A100, H100, pretend
from beit_fast.kernels.attention import (
    attention,
    attention_backend,
    attention_lse_reference,
    attention_qkvpacked,
    attention_reference,
    rel_pos_attention,
    rel_pos_attention_qkvpacked,
)
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias_reference, relative_position_rows

BACKENDS = pytest.mark.parametrize("backend", ["triton", "cpu", "sdpa", "reference"])
OURS = pytest.mark.parametrize("backend", ["triton", "cpu"])


def inputs(B=2, N=9, M=9, K=16, G=1):
    return *(torch.randn(B, length, 2, K) for length in (N, M, M)), torch.randn(G, 2, N, M)


def reference(q, k, v, bias, scale=None):
    return attention_reference(q, k, v, bias, scale=scale), attention_lse_reference(
        q, k, bias, scale=scale
    )


def gradients(function, tensors):
    """Both outputs, and the gradients of a loss of both."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = function(*leaves)
    seen = lse.isfinite()
    loss = out.square().sum() + (lse * torch.linspace(-1, 1, lse.numel()).view_as(lse))[seen].sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


def assert_same(function, tensors, expected=reference):
    found, wanted = gradients(function, tensors), gradients(expected, tensors)
    assert found[1].dtype == torch.float32
    for value, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4)


@BACKENDS
@pytest.mark.parametrize(
    ("sizes", "scale"),
    [({}, None), ({"N": 5, "M": 70}, 0.2), ({"B": 4, "G": 2, "K": 24}, None)],
    ids=["self", "cross", "groups-K24"],
)
def test_values_and_gradients_are_the_references(backend, sizes, scale):
    run = functools.partial(attention, backend=backend, scale=scale, return_lse=True)
    assert_same(run, inputs(**sizes), functools.partial(reference, scale=scale))


@BACKENDS
def test_a_query_that_sees_no_key_has_minus_infinity_and_no_gradient(backend):
    q, k, v, bias = inputs()
    bias[:, :, 3], bias[..., 5] = -torch.inf, -torch.inf
    run = functools.partial(attention, backend=backend, return_lse=True)
    lse = run(q, k, v, bias)[1]
    assert (lse[..., 3] == -torch.inf).all()
    assert lse[..., 4].isfinite().all()
    assert_same(run, (q, k, v, bias))
    empty = torch.zeros(2, 0, 2, 16)
    assert (run(q, empty, empty)[1] == -torch.inf).all()


@BACKENDS
def test_far_from_zero_too(backend):
    q, k, v, bias = inputs()
    bias[..., 2, :] += 2e4
    bias[..., 4, 1] = -1e9
    lse = attention(q, k, v, bias, backend=backend, return_lse=True)[1]
    exact = attention_lse_reference(q.double(), k.double(), bias.double())
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-4)


@OURS
def test_all_forms_give_it(backend):
    table, grid = torch.randn(relative_position_rows((2, 4)), 2), (2, 4)
    qkv, options = torch.randn(2, 9, 3, 2, 16), {"backend": backend, "return_lse": True}
    bias = rel_pos_bias_reference(table, grid)
    wanted = attention_lse_reference(*qkv.unbind(2)[:2], bias)
    for _, lse in (
        attention(*qkv.unbind(2), bias, **options),
        attention_qkvpacked(qkv, bias, **options),
        rel_pos_attention(*qkv.unbind(2), table, grid, **options),
        rel_pos_attention_qkvpacked(qkv, table, grid, **options),
    ):
        torch.testing.assert_close(lse, wanted, rtol=1e-4, atol=1e-4)
    assert isinstance(attention_qkvpacked(qkv, bias, backend=backend), torch.Tensor)


@BACKENDS
def test_parts_of_the_keys_merge_into_the_whole(backend):
    """As ring attention does it, and as the docstring says; the second part hides some queries."""
    q, k, v, bias = inputs(N=7, M=20)
    bias[..., :4, 12:] = -torch.inf

    def merged(q, k, v, bias):
        run = functools.partial(attention, backend=backend, return_lse=True)
        out_1, lse_1 = run(q, k[:, :12], v[:, :12], bias[..., :12])
        out_2, lse_2 = run(q, k[:, 12:], v[:, 12:], bias[..., 12:])
        lse = torch.logaddexp(lse_1, lse_2)
        out = (lse_1 - lse).exp().mT[..., None] * out_1 + (lse_2 - lse).exp().mT[..., None] * out_2
        return out, lse

    assert_same(merged, (q, k, v, bias))


@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("N", [33, 70], ids=["one-tile", "two-tiles"])
def test_every_backward_kernel_takes_the_gradient_of_lse(N, trains, gpu):
    """Of lse alone, in bf16: windows and Hopper have kernels of their own for it."""
    qkv = [torch.randn(2, N, 1, 64).bfloat16().requires_grad_() for _ in range(3)]
    bias = torch.randn(1, N, N).half().float().requires_grad_(trains)
    leaves = [*qkv[:2], *[bias] * trains]
    exact = [t.detach().double().requires_grad_() for t in (*qkv[:2], bias)]
    weights = torch.randn(2, 1, N)
    lse = attention_lse_reference(*exact)
    wanted = torch.autograd.grad((lse * weights).sum(), exact[: len(leaves)])
    with pretend(gpu):
        lse = attention(*qkv, bias, backend="triton", return_lse=True)[1]
        found = torch.autograd.grad((lse * weights).sum(), leaves)
    for name, want, our in zip(("dq", "dk", "dbias"), wanted, found, strict=False):
        assert (our - want).norm() <= 1e-2 * want.norm(), name


@OURS
def test_dropout_leaves_it_as_it_is(backend):
    q, k, v, bias = inputs()
    options = {"dropout_p": 0.5, "rng": torch.tensor([1, 2]), "return_lse": True}
    run = functools.partial(attention, backend=backend, **options)

    def expected(q, k, v, bias):
        out = attention_reference(q, k, v, bias, dropout_p=0.5, rng=options["rng"])
        return out, attention_lse_reference(q, k, bias)

    assert_same(run, (q, k, v, bias), expected)


@OURS
def test_compiles_in_one_graph(backend):
    run = functools.partial(attention, backend=backend, return_lse=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled, inputs())


def test_exports_as_torchs_own_operators():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, bias):
            return attention(q, k, v, bias, return_lse=True)

    tensors = tuple(t.cpu() for t in inputs())
    with torch.device("cpu"):
        program = torch.export.export(Layer(), tensors)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert all(target.startswith(("aten.", "<built-in")) for target in targets), targets
    for value, want in zip(program.module()(*tensors), reference(*tensors), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_it_fp32():
    q, k, v, bias = inputs()
    for backend in ("triton", "cpu", "sdpa"):
        with torch.autocast(q.device.type, torch.bfloat16):
            lse = attention(q, k, v, bias, backend=backend, return_lse=True)[1]
        assert lse.dtype == torch.float32
        exact = attention_lse_reference(q.bfloat16().double(), k.bfloat16().double(), bias)
        torch.testing.assert_close(lse.double(), exact, rtol=1e-3, atol=1e-3)


def test_on_a_cpu_the_default_is_what_has_it():
    q, k, v, bias = (t.cpu() for t in inputs())
    assert attention_backend(q, k, v, bias).backend == "sdpa"
    assert attention_backend(q, k, v, bias, return_lse=True).backend == "cpu"


def test_shapes_are_known_without_values():
    q, k, v, bias = (t.to("meta") for t in inputs())
    for backend in (None, "sdpa"):
        out, lse = attention(q, k, v, bias, backend=backend, return_lse=True)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 2, 9), torch.float32)
