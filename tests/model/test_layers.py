"""What a block and its parts are."""

import functools

import pytest
import torch
from torch import nn

from beit_fast.kernels.attention import attention_reference
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias_reference
from beit_fast.model.layers import Attention, Block, Mlp


@pytest.mark.parametrize("head_dim", [None, 24], ids=["K8", "K24"])
def test_attention_adds_the_own_and_the_shared_bias_and_no_key_bias(tiny, randomize, head_dim):
    config = tiny(use_rel_pos_bias=True, attn_head_dim=head_dim)
    attn = randomize(Attention(config))
    x, shared = torch.randn(2, 17, 32), torch.randn(4, 17, 17)

    q, k, v = (x @ attn.qkv.weight.t()).chunk(3, dim=-1)
    q, v = q + attn.q_bias, v + attn.v_bias
    q, k, v = (t.unflatten(2, (4, config.head_dim)) for t in (q, k, v))
    bias = shared + rel_pos_bias_reference(attn.relative_position_bias_table, (4, 4))
    expected = attn.proj(attention_reference(q, k, v, bias).flatten(2))
    torch.testing.assert_close(attn(x, shared), expected, rtol=1e-4, atol=1e-4)


def test_mlp_uses_the_exact_gelu(tiny, randomize):
    mlp, x = randomize(Mlp(tiny(mlp_ratio=2.5))), torch.randn(2, 3, 32)
    assert mlp.fc1.out_features == 80
    hidden = mlp.fc1(x)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), mlp.fc2(hidden))


def test_a_block_adds_two_scaled_branches_each_of_a_norm(tiny, randomize):
    block, x = randomize(Block(tiny(), 0.0)), torch.randn(2, 17, 32)
    middle = x + block.gamma_1 * block.attn(block.norm1(x))
    expected = middle + block.gamma_2 * block.mlp(block.norm2(middle))
    torch.testing.assert_close(block(x), expected)


def test_a_block_without_layer_scale_adds_its_branches_as_they_are(tiny, randomize):
    block, x = randomize(Block(tiny(init_values=None), 0.0)), torch.randn(2, 17, 32)
    middle = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))


def test_a_dropped_sample_skips_the_branch_and_a_kept_one_counts_for_it(tiny, randomize):
    block, x = randomize(Block(tiny(), 0.5)), torch.randn(4, 17, 32)
    keeps = iter([torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 2.0, 2.0])])
    block.draw_keep = lambda x: next(keeps)
    out = block(x)
    assert torch.equal(out[0], x[0])
    middle = x + 2 * block.gamma_1 * block.attn(block.norm1(x))
    torch.testing.assert_close(out[1], middle[1])
    middle[2] = x[2]
    expected = middle + 2 * block.gamma_2 * block.mlp(block.norm2(middle))
    torch.testing.assert_close(out[2:], expected[2:])


def test_a_block_is_timms(tiny, randomize):
    from timm.models.beit import Block as TimmBlock

    ours = randomize(Block(tiny(use_rel_pos_bias=True), 0.5))
    theirs = TimmBlock(
        32, 4, qkv_bias=True, init_values=0.1, drop_path=0.5, window_size=(4, 4),
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, shared = torch.randn(8, 17, 32), torch.randn(4, 17, 17)
    outputs = []
    for block in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(block(x, shared))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init_values", [None, 0.0])
def test_without_layer_scale_a_block_has_no_gamma(tiny, init_values):
    names = dict(Block(tiny(init_values=init_values), 0.0).named_parameters())
    assert not [name for name in names if "gamma" in name]


def test_layer_scale_may_begin_at_a_whole_number(tiny):
    assert torch.equal(Block(tiny(init_values=2), 0.0).gamma_1, torch.full((32,), 2.0))


def test_drop_path_keeps_the_share_and_the_mean(tiny):
    block, x = Block(tiny(), 0.3), torch.zeros(20_000, 1, 1)
    keep = block.draw_keep(x)
    assert sorted(keep.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert keep.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(keep, block.draw_keep(x))


def test_drop_path_draws_nothing_in_eval_or_at_rate_zero(tiny):
    x = torch.randn(8, 17, 32)
    state = torch.get_rng_state()
    block = Block(tiny(), 0.5).eval()
    untouched = Block(tiny(), 0.0)
    torch.set_rng_state(state)
    block(x, None)
    untouched(x, None)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_branches_of_a_block_are_dropped_independently(tiny):
    block = Block(tiny(), 0.5)
    draws = []
    draw = block.draw_keep
    block.draw_keep = lambda x: draws.append(draw(x)) or draws[-1]
    block(torch.randn(64, 17, 32), None)
    assert len(draws) == 2
    assert not torch.equal(*draws)
