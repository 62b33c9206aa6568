import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels.attention import attention_reference
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias_reference
from beit_fast.model.layers import Attention, Block, Mlp, PatchEmbed, patchify


def test_patches_are_row_major_and_ordered_as_a_convolution_weight():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, (4, 2))
    assert torch.equal(patches, F.unfold(images, (4, 2), stride=(4, 2)).transpose(1, 2))
    assert torch.equal(patches[0, 7].view(3, 4, 2), images[0, :, 4:8, 2:4])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_patch_embedding_is_the_convolution_it_stores(tiny, channels_last):
    embed = PatchEmbed(tiny(img_size=(24, 32), patch_size=(8, 16)))
    images = torch.randn(2, 3, 24, 32)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), expected)


def test_patches_are_embedded_as_the_images_they_are_cut_from(tiny):
    embed = PatchEmbed(tiny(img_size=(24, 32), patch_size=(8, 16)))
    images = torch.randn(2, 3, 24, 32)
    patches = patchify(images, (8, 16))
    assert torch.equal(embed(patches), embed(images))
    with pytest.raises(ValueError, match=r"patches are \(B, 6, 384\)"):
        embed(patches[:, 1:])


def test_images_of_another_size_are_refused_with_both_remedies(tiny):
    embed = PatchEmbed(tiny())
    for shape in ((1, 3, 40, 32), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"takes \(B, 3, 32, 32\): resize the images, or"):
            embed(torch.zeros(shape))


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


def test_a_block_scales_both_branches(tiny, randomize):
    block, x = randomize(Block(tiny(), 0.0)), torch.randn(2, 17, 32)
    middle = x + block.gamma_1 * block.attn(block.norm1(x), None)
    expected = middle + block.gamma_2 * block.mlp(block.norm2(middle))
    torch.testing.assert_close(block(x, None), expected)


@pytest.mark.parametrize("init_values", [None, 0.0])
def test_without_layer_scale_a_block_has_no_gamma(tiny, init_values):
    names = dict(Block(tiny(init_values=init_values), 0.0).named_parameters())
    assert not [name for name in names if "gamma" in name]


def test_drop_path_keeps_the_share_and_the_mean(tiny):
    block, x = Block(tiny(), 0.3), torch.zeros(20_000, 1, 1)
    keep = block._draw_keep(x)
    assert sorted(keep.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert keep.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(keep, block._draw_keep(x))


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
    draw = block._draw_keep
    block._draw_keep = lambda x: draws.append(draw(x)) or draws[-1]
    block(torch.randn(64, 17, 32), None)
    assert len(draws) == 2
    assert not torch.equal(*draws)
