"""Masks of bool: what they mean to SDPA, on every back end, there and back."""

import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels.attention import attention, attention_backend, attention_qkvpacked

B, N, M, H, K = 4, 5, 7, 2, 8
BACKENDS = ("triton", "cpu", "sdpa", "reference")
SHAPES = {
    "HNM": (H, N, M),
    "NM": (N, M),
    "B1NM": (B, 1, N, M),
    "B11M": (B, 1, 1, M),
    "BHNM": (B, H, N, M),
    "windows": (2, H, N, M),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(device, queries=N):
    q = torch.randn(B, queries, H, K, device=device, requires_grad=True)
    k, v = (torch.randn(B, M, H, K, device=device, requires_grad=True) for _ in "kv")
    return q, k, v


def random_mask(shape, device):
    mask = torch.rand(shape, device=device) < 0.6
    mask[..., 2] = True  # no row without a key: that is a test of its own
    return mask


def by_torch(q, k, v, mask):
    mask = mask.repeat(B // 2, 1, 1, 1) if mask.shape[:-3] == (2,) else mask
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def assert_same(out, expected, tensors):
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    dout = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(o, tensors, dout) for o in (out, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_true_is_what_a_query_sees(backend, shape, device):
    q, k, v = inputs(device)
    mask = random_mask(shape, device)
    out = attention(q, k, v, mask, backend=backend)
    assert_same(out, by_torch(q, k, v, mask), (q, k, v))


@every_backend
def test_a_packed_call_reads_a_mask_in_the_same_way(backend, device):
    qkv = torch.randn(B, N, 3, H, K, device=device, requires_grad=True)
    mask = random_mask((H, N, N), device)
    out = attention_qkvpacked(qkv, mask, backend=backend)
    assert_same(out, by_torch(*qkv.unbind(2), mask), (qkv,))


@every_backend
def test_a_query_that_sees_no_key_gets_zeros_and_finite_gradients(backend, device):
    q, k, v = inputs(device)
    mask = random_mask((H, N, M), device)
    mask[0, 1] = False
    out = attention(q, k, v, mask, backend=backend)
    assert not out[:, 1, 0].any()
    assert_same(out, by_torch(q, k, v, mask), (q, k, v))


def test_a_mask_goes_through_the_compiler_in_one_graph(device):
    q, k, v = inputs(device)
    mask = random_mask((N, M), device)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_same(compiled(q, k, v, mask), by_torch(q, k, v, mask), (q, k, v))


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "lse"])
def test_a_mask_of_every_image_is_exported_for_any_number_of_them(with_lse):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return attention(q, k, v, mask, return_lse=with_lse)

    module, batch = Attention(), {0: torch.export.Dim("batch")}
    tensors = [t.detach() for t in inputs("cpu")]
    arguments = (*tensors, random_mask((B, 1, 1, M), "cpu"))
    program = torch.export.export(module, arguments, dynamic_shapes=(batch,) * 4)
    twice = [torch.cat((t, t.flip(0))) for t in arguments]
    torch.testing.assert_close(program.module()(*twice), module(*twice), rtol=1e-5, atol=1e-6)


def test_under_autocast_a_mask_takes_the_dtype_of_the_queries(device):
    q, k, v = inputs(device)
    mask = random_mask((N, M), device)
    with torch.autocast(q.device.type, torch.bfloat16):
        out = attention(q, k, v, mask)
        assert attention_backend(q, k, v, mask).backend in BACKENDS
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), by_torch(q, k, v, mask), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_are_no_mask_and_the_remedy_works(dtype, device):
    q, k, v = inputs(device)
    mask = random_mask((H, N, M), device)
    for call in (attention, attention_backend):
        with pytest.raises(ValueError, match=rf"the bias is {dtype}: .*mask\.bool\(\)"):
            call(q, k, v, mask.to(dtype))
    out = attention(q, k, v, mask.to(dtype).bool())
    torch.testing.assert_close(out, by_torch(q, k, v, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(N, M + 1), (3, N, M), (1, B, H, N, M), (M, N), (3, H, N, M)])
def test_a_mask_of_another_shape_is_refused(shape, device):
    q, k, v = inputs(device)
    message = r"the mask is .*\(N, M\), \(H, N, M\), \(B, 1, N, M\)|3 biases for 4 images"
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, torch.ones(shape, dtype=torch.bool, device=device))
