"""Layer-wise learning rates are unilm's."""

import pytest
import torch
from timm.optim import param_groups_layer_decay

from beit_fast.model.config import beit_config
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.tasks.layer_decay import layer_decay_groups, layer_id


def model_of(name, model_class=BeitForImageClassification):
    with torch.device("meta"):
        return model_class(beit_config(name))


def by_name(model, groups):
    """(scale, decay) of every parameter; each is in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    return found


@pytest.mark.parametrize(
    ("size", "decay", "embeddings"),
    [
        ("base", 0.65, 0.00370),
        ("large", 0.75, 0.000753),
        ("base", 0.85, 0.1209),
        ("large", 0.9, 0.0718),
    ],
)
def test_rates_fall_from_the_head_to_the_embeddings(size, decay, embeddings):
    model = model_of(f"beit_{size}_patch16_224")
    depth = len(model.blocks)
    found = by_name(model, layer_decay_groups(model, 0.05, decay))
    for name in ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert found[name][0] == pytest.approx(embeddings, rel=2e-3)
    for name in ("head.weight", "head.bias", "fc_norm.weight"):
        assert found[name][0] == 1.0
    assert found[f"blocks.{depth - 1}.mlp.fc1.weight"][0] == pytest.approx(decay)
    assert found["blocks.0.gamma_1"][0] == pytest.approx(decay**depth)


def test_tables_and_mask_token_are_decayed_but_no_vector_and_no_position():
    found = by_name(model := model_of("beit_base_patch16_224"), layer_decay_groups(model, 0.05, 1))
    assert found["blocks.3.attn.relative_position_bias_table"][1] == 0.05
    assert found["blocks.3.mlp.fc1.weight"][1] == 0.05
    for name in ("cls_token", "blocks.3.gamma_1", "blocks.3.attn.q_bias", "fc_norm.weight"):
        assert found[name][1] == 0
    found = by_name(
        model := model_of("beit_base_patch16_224_vanilla"), layer_decay_groups(model, 0.05, 0.5)
    )
    assert found["pos_embed"] == (0.5**13, 0)
    model = model_of("beit_base_patch16_224_8k_vocab", BeitForMaskedImageModeling)
    assert by_name(model, layer_decay_groups(model, 0.05, 0.5))["mask_token"] == (0.5**13, 0.05)


def test_a_shared_table_learns_as_the_head_does_where_timm_holds_it_back():
    model = model_of("beit_base_patch16_224_8k_vocab")
    name = "rel_pos_bias.relative_position_bias_table"
    assert layer_id(name, 12) == 13
    assert by_name(model, layer_decay_groups(model, 0.05, 0.65))[name] == (1.0, 0.05)
    timm = by_name(model, param_groups_layer_decay(model, 0.05, ["cls_token"], layer_decay=0.65))
    assert timm[name][0] == pytest.approx(0.65**13)


def test_without_a_shared_table_the_groups_are_timms():
    for size in ("beit_base_patch16_224", "beit_base_patch16_224_vanilla"):
        model = model_of(size)
        ours = layer_decay_groups(model, 0.05, 0.65)
        timm = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.65)
        assert by_name(model, ours) == by_name(model, timm)
        assert len({(g["lr_scale"], g["weight_decay"]) for g in ours}) == len(ours) == 28
