import math

import pytest
import torch
from torch import nn

from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling

# Rows enough that the measured deviations are within 2 % of what they estimate.
SIZES = {"embed_dim": 128, "depth": 3, "num_classes": 1000, "vocab_size": 512}


def std(tensor):
    return tensor.std().item()


def residual_weights(model):
    for depth, block in enumerate(model.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            yield depth, weight


def test_pretraining_cuts_the_normal_at_one_sigma(tiny):
    model = BeitForMaskedImageModeling(tiny(use_abs_pos_emb=True, **SIZES))
    for weight in (
        model.patch_embed.proj.weight,
        model.blocks[1].attn.qkv.weight,
        model.blocks[1].mlp.fc1.weight,
        model.lm_head.weight,
        model.pos_embed,
    ):
        assert std(weight) == pytest.approx(0.01079, rel=0.03)
        assert 0.0199 < weight.abs().max() <= 0.02
    for token in (model.cls_token, model.mask_token):
        assert std(token) == pytest.approx(0.01079, rel=0.2)
        assert token.abs().max() <= 0.02


def test_finetuning_uses_the_whole_normal_and_a_small_head(tiny):
    model = BeitForImageClassification(tiny(use_abs_pos_emb=True, **SIZES))
    for weight in (model.blocks[1].attn.qkv.weight, model.blocks[1].mlp.fc1.weight):
        assert std(weight) == pytest.approx(0.02, rel=0.03)
        assert weight.abs().max() > 0.06
    assert std(model.pos_embed) == pytest.approx(0.02, rel=0.05)
    assert std(model.head.weight) == pytest.approx(0.02 * 0.001, rel=0.03)
    # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(fan in).
    bound = 1 / math.sqrt(3 * 8 * 8)
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert std(model.patch_embed.proj.weight) == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize(
    ("head", "base_std"),
    [(BeitForMaskedImageModeling, 0.01079), (BeitForImageClassification, 0.02), (Beit, 0.01079)],
    ids=["pretraining", "finetuning", "encoder"],
)
def test_what_joins_the_residual_stream_shrinks_with_depth(tiny, head, base_std):
    for depth, weight in residual_weights(head(tiny(**SIZES))):
        assert std(weight) == pytest.approx(base_std / math.sqrt(2 * depth), rel=0.03)


@pytest.mark.parametrize("head", [BeitForMaskedImageModeling, BeitForImageClassification])
def test_biases_and_tables_start_at_zero_norms_at_identity_gammas_at_layer_scale(tiny, head):
    model = head(tiny(use_rel_pos_bias=True, init_values=0.07))
    for name, parameter in model.named_parameters():
        finetuned_patches = head is BeitForImageClassification and name == "patch_embed.proj.bias"
        if name.endswith(("bias", "bias_table")) and not finetuned_patches:
            assert not parameter.any(), name
        elif name.endswith(("gamma_1", "gamma_2")):
            assert torch.equal(parameter, torch.full_like(parameter, 0.07)), name
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))


@pytest.mark.parametrize("head", [Beit, BeitForMaskedImageModeling, BeitForImageClassification])
def test_a_model_made_without_memory_is_whole_after_its_init(tiny, head):
    config = tiny(use_rel_pos_bias=True, use_abs_pos_emb=True, img_size=(32, 16))
    torch.manual_seed(3)
    expected = head(config)
    with torch.device("meta"):
        model = head(config)
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(77)
    torch.manual_seed(3)
    expected.init_weights()
    torch.manual_seed(3)
    model.init_weights()
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
