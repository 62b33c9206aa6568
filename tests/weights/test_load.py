"""Loading: what is resized, expanded, fresh, left out, and what is refused."""

import dataclasses
import json
import logging

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.train.state import save_checkpoint
from beit_fast.weights.load import from_pretrained, load_pretrained
from beit_fast.weights.read import read_checkpoint
from beit_fast.weights.save import save_pretrained
from tiny_models import PER_BLOCK, VANILLA, assert_identical

TABLE = "blocks.1.attn.relative_position_bias_table"
SHARED = "rel_pos_bias.relative_position_bias_table"


def test_mim_becomes_a_classifier_with_a_table_for_each_block(mim, tiny):
    model = BeitForImageClassification(tiny(**PER_BLOCK))
    fc_norm, head = model.fc_norm.weight.clone(), model.head.weight.clone()
    report = load_pretrained(model, mim.state_dict())
    assert torch.equal(model.state_dict()[TABLE], mim.state_dict()[SHARED])
    assert report.expanded == ("blocks.0" + TABLE[8:], TABLE)
    assert report.fresh == ("fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight")
    names = ("lm_head.bias", "lm_head.weight", "mask_token", "norm.bias", "norm.weight")
    assert report.left_out == names
    assert torch.equal(model.fc_norm.weight, fc_norm)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.cls_token, mim.cls_token)
    with torch.no_grad():  # the copies diverge
        model.blocks[0].attn.relative_position_bias_table.zero_()
    assert model.blocks[1].attn.relative_position_bias_table.any()


@pytest.mark.parametrize("img_size", [48, (24, 40)])
def test_positions_are_resized_exactly(img_size, mim, tiny, randomize):
    model = BeitForImageClassification(tiny(**PER_BLOCK, img_size=img_size))
    report = load_pretrained(model, mim.state_dict())
    table = mim.rel_pos_bias.relative_position_bias_table
    expected = resize_rel_pos_table(table, (4, 4), model.config.grid)
    assert torch.equal(model.state_dict()[TABLE], expected)
    assert TABLE in report.resized
    vanilla = randomize(Beit(tiny(**VANILLA)))
    larger = from_pretrained(vanilla.state_dict(), img_size=img_size, num_heads=4)
    expected = resize_pos_embed(vanilla.pos_embed, (4, 4), larger.config.grid)
    assert torch.equal(larger.pos_embed, expected)


def test_a_head_with_other_classes_stays_fresh_and_is_logged(classifier, caplog):
    with caplog.at_level(logging.WARNING, logger="beit_fast.model"):
        model = from_pretrained(classifier.state_dict(), num_classes=3)
    assert model.head.weight.shape == (3, 32)
    assert torch.equal(model.fc_norm.weight, classifier.fc_norm.weight)
    assert "fresh: head.bias, head.weight" in caplog.text
    assert from_pretrained(classifier.state_dict(), num_classes=0).head.__class__.__name__ == (
        "Identity"
    )


def test_the_epsilon_of_config_json_counts_and_a_difference_is_said(classifier, tmp_path):
    save_pretrained(classifier, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"layer_norm_eps": 1e-12}))
    assert from_pretrained(tmp_path).blocks[0].norm1.eps == 1e-12
    (note,) = load_pretrained(classifier, tmp_path).notes
    assert note == "norm_eps is 1e-12 in the source, 1e-06 in the model"


def test_a_run_of_ours_is_a_source_with_its_config(tiny, randomize, tmp_path):
    config = tiny(img_size=(32, 48), num_classes=0)  # a grid no shape tells
    model = randomize(BeitForMaskedImageModeling(config))
    settings = {"model": json.loads(json.dumps(dataclasses.asdict(config)))}
    save_checkpoint(tmp_path, 7, {"model": model.state_dict()}, settings, keep=1)
    again = from_pretrained(tmp_path)
    assert again.config == config
    assert_identical(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="of no square grid: pass img_size"):
        read_checkpoint(model.state_dict())
    assert read_checkpoint(model.state_dict(), img_size=(32, 48)).config.grid == (4, 6)


def without(*names):
    return lambda state: {n: t for n, t in state.items() if n not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.1.norm2.bias"), "blocks.1.norm2.bias is missing"),
        (without("fc_norm.bias"), "fc_norm.bias is missing"),
        (without("fc_norm.bias", "fc_norm.weight"), "fc_norm.bias is missing"),
        (lambda s: s | {"blocks.2.gamma_1": torch.ones(32)}, "blocks.2"),
        (lambda s: s | {"blocks.0.gamma_1": torch.ones(31)}, r"gamma_1 is \(31,\) where \(32,\)"),
        (lambda s: s | {"extra": torch.ones(1)}, "names that no BEiT has: extra"),
        (without("patch_embed.proj.weight"), "'patch_embed.proj.weight' is missing"),
        (lambda s: s | {"head.weight": torch.ones(())}, "have no axes"),
        (lambda s: s | {"head.bias": torch.ones(5, dtype=torch.int8)}, "torch.int8 where weights"),
        (lambda s: s | {TABLE: torch.ones(50, 4)}, "relative_position_bias_table is"),
    ],
)
def test_what_is_not_whole_is_refused_and_nothing_is_loaded(change, message, classifier, tiny):
    model = BeitForImageClassification(tiny(**PER_BLOCK))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, change(classifier.state_dict()))
    assert_identical(before, dict(model.state_dict()))


def test_another_architecture_is_refused_by_name(classifier, mim, tiny):
    with pytest.raises(ValueError, match=r"rel_pos_bias\.relative_position_bias_table is missing"):
        load_pretrained(mim, classifier.state_dict())
    with pytest.raises(ValueError, match=r"behind another norm than norm\.weight"):
        load_pretrained(
            BeitForImageClassification(tiny(**PER_BLOCK, global_pool="token")),
            classifier.state_dict(),
        )
    with torch.device("meta"):
        nowhere = BeitForImageClassification(tiny(**PER_BLOCK))
    with pytest.raises(ValueError, match="meta device"):
        load_pretrained(nowhere, classifier.state_dict())
    vanilla = Beit(tiny(**VANILLA)).state_dict()
    with pytest.raises(ValueError, match="pass num_heads"):
        read_checkpoint(vanilla)
    weights = read_checkpoint(vanilla, num_heads=2)
    with pytest.raises(ValueError, match="2 heads in the source, 4 here"):
        load_pretrained(Beit(tiny(**VANILLA)), weights)
    with pytest.raises(ValueError, match="read already"):
        read_checkpoint(weights, num_heads=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "of a 'vit'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_dropout_prob": 0.1}, "trains without dropout"),
        ({"num_hidden_layers": 3}, "blocks.2.attn.proj.bias is missing"),
        ({"use_shared_relative_position_bias": True}, "rel_pos_bias.* is missing"),
        ({"id2label": {"0": "a", "1": "b"}}, "2 names of classes, 5 rows"),
        ({"id2label": {"1": "a"}}, "number them from 0"),
    ],
)
def test_a_config_that_is_not_the_tensors_is_refused(change, message, classifier, tmp_path):
    save_pretrained(classifier, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path)
