"""The attention of other models with a trainable additive bias: each an example, against its own.

Swin adds a table's bias and one mask per window; T5 a bias by buckets of distance, unscaled; a
plain bias is a parameter (H, N, M).
"""

import pytest
import torch
from torch import nn

from beit_fast.kernels.attention import attention, attention_qkvpacked


def swin_window_attention(module, x, mask=None):
    """timm's or torchvision's Swin window attention: x (B W, N, D), windows of an image together.

    mask (W, N, N), 0 or a large negative number where a shift brought strangers together.
    """
    qkv_BN3HK = module.qkv(x).unflatten(2, (3, module.num_heads, -1))
    bias = module._get_rel_pos_bias()[0]  # (H, N, N)
    if mask is not None:
        bias = bias + mask[:, None]  # (W, H, N, N): window b takes bias b mod W
    return module.proj(attention_qkvpacked(qkv_BN3HK, bias).flatten(2))


def t5_attention(module, x, memory=None):
    """transformers' T5 attention, of x to itself or to a memory: x (B, N, D), memory (B, M, D)."""
    memory = x if memory is None else memory
    layers = ((module.q, x), (module.k, memory), (module.v, memory))
    q, k, v = (layer(t).unflatten(2, (module.n_heads, -1)) for layer, t in layers)
    bias = module.compute_bias(x.shape[1], memory.shape[1])[0]  # (H, N, M), by buckets
    return module.o(attention(q, k, v, bias, scale=1.0).flatten(2))


class BiasedAttention(nn.Module):
    """A plain bias (H, N, M) that is learned."""

    def __init__(self, num_tokens: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = nn.Parameter(torch.randn(num_heads, num_tokens, num_tokens))

    def forward(self, x):
        qkv_BN3HK = self.qkv(x).unflatten(2, (3, len(self.bias), -1))
        return attention_qkvpacked(qkv_BN3HK, self.bias).flatten(2)

    def eager(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, len(self.bias), -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + self.bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


def assert_same(ours, theirs, module, *inputs):
    """Output and the gradients of the inputs and of every parameter, to 1e-5 of the largest."""
    inputs = [t.requires_grad_() for t in inputs]
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    out, expected = ours(), theirs()
    dout = torch.randn(out.shape)
    gradients = torch.autograd.grad(out, wanted, dout, allow_unused=True)
    exact = torch.autograd.grad(expected, wanted, dout, allow_unused=True)
    assert sum(g is not None for g in exact) > len(inputs) + 1
    for our, their in zip((out, *gradients), (expected, *exact), strict=True):
        assert (our is None) == (their is None)
        if their is not None:
            assert (our - their).abs().max() <= 1e-5 * their.abs().max()


@pytest.mark.parametrize("shifted", [False, True], ids=["aligned", "shifted"])
def test_a_swin_window_is_timms(shifted):
    from timm.models.swin_transformer import WindowAttention

    module = WindowAttention(dim=32, num_heads=4, window_size=(4, 4))
    module.fused_attn = False
    nn.init.normal_(module.relative_position_bias_table)
    mask = None
    if shifted:  # of three windows the last two hold strangers
        mask = torch.zeros(3, 16, 16)
        mask[1, :8, 8:] = mask[1, 8:, :8] = -100.0
        mask[2, ::2, 1::2] = mask[2, 1::2, ::2] = -100.0
    x = torch.randn(2 * 3, 16, 32)
    assert_same(
        lambda: swin_window_attention(module, x, mask), lambda: module(x, mask=mask), module, x
    )


@pytest.mark.parametrize("length", [None, 11], ids=["self", "cross"])
def test_attention_by_buckets_is_that_of_t5(length):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=32, d_kv=8, num_heads=4, dropout_rate=0.0)
    module = T5Attention(config, has_relative_attention_bias=True)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 32)
    if length is None:
        assert_same(lambda: t5_attention(module, x), lambda: module(x)[0], module, x)
        return
    memory = torch.randn(2, length, 32)
    assert_same(
        lambda: t5_attention(module, x, memory),
        lambda: module(x, key_value_states=memory)[0],
        module,
        x,
        memory,
    )


def test_a_plain_bias_is_that_of_eager_code():
    module = BiasedAttention(13, 32, 4)
    x = torch.randn(3, 13, 32)
    assert_same(lambda: module(x), lambda: module.eager(x), module, x)
