"""Segmenters in unilm's files, transformers' folders and ours; what is fresh, what is refused."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.config import SegmenterConfig
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.pyramid import BeitFeaturePyramid
from beit_fast.model.resize import resize_rel_pos_table
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.train.state import save_checkpoint
from beit_fast.weights.convert import convert
from beit_fast.weights.layouts import from_house
from beit_fast.weights.load import from_pretrained, load_pretrained
from beit_fast.weights.published import PUBLISHED
from beit_fast.weights.read import read_checkpoint
from beit_fast.weights.save import save_pretrained
from tiny_models import PER_BLOCK, assert_identical

TABLE = "blocks.1.attn.relative_position_bias_table"
LAST = ("conv_seg.bias", "conv_seg.weight")


@pytest.fixture
def config():
    def make(**overrides) -> SegmenterConfig:
        fields = {
            "img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 6, "num_heads": 4,
            "num_classes": 5, "auxiliary_channels": 12,
        }  # fmt: skip
        return SegmenterConfig(**{**fields, **overrides})

    return make


@pytest.fixture
def segmenter(config, randomize):
    return randomize(BeitForSemanticSegmentation(config())).eval()


def unilm_file(model, path):
    """As mmsegmentation saves a segmenter of unilm's, index matrices included."""
    heads = ("decode_head.", "auxiliary_head.")
    named = model.state_dict().items()
    state = {n if n.startswith(heads) else f"backbone.{n}": tensor for n, tensor in named}
    state["backbone.blocks.0.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    torch.save({"meta": {"epoch": 1}, "state_dict": state, "optimizer": {}}, path)


def test_unilms_file_is_read_whole_and_written_again(segmenter, tmp_path):
    unilm_file(segmenter, tmp_path / "a.pth")
    model = from_pretrained(tmp_path / "a.pth")
    assert type(model) is BeitForSemanticSegmentation
    assert model.config == dataclasses.replace(segmenter.config, drop_rate=0.1)
    assert_identical(model.state_dict(), segmenter.state_dict())
    convert(tmp_path / "a.pth", tmp_path / "b.pth", to="unilm")
    stored = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    original = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
    del original["backbone.blocks.0.attn.relative_position_index"]
    assert_identical(stored, original)


def test_a_file_without_the_second_head_or_batch_counters_is_whole(segmenter):
    state = segmenter.state_dict()
    older = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    assert_identical(from_pretrained(older).state_dict(), dict(state))
    without = {n: t for n, t in state.items() if not n.startswith("auxiliary_head.")}
    assert from_pretrained(without).config.auxiliary_channels == 0
    assert from_pretrained(without).auxiliary_head is None
    report = load_pretrained(segmenter, without)
    assert {name.split(".")[0] for name in report.fresh} == {"auxiliary_head"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_head.fpn_convs.1.bn.bias": None}, "fpn_convs.1.bn.bias is missing"),
        ({"auxiliary_head.conv_seg.bias": None}, "auxiliary_head.conv_seg.bias is missing"),
        ({"fpn2.0.weight": None}, "fpn2.0.weight is missing"),
        ({"decode_head.conv_seg.weight": torch.ones(5, 31, 1, 1)}, "conv_seg.weight is"),
        ({"decode_head.fpn_convs.3.bn.bias": torch.ones(32)}, "fpn_convs.3.bn.bias has no place"),
        ({"decode_head.bn.weight": torch.ones(32)}, "auxiliary_head.conv_seg.bias has no place"),
        ({"decode_head.what": torch.ones(32)}, "names that no BEiT has: decode_head.what"),
    ],
)
def test_what_is_not_whole_is_refused(segmenter, change, message):
    state = {n: t for n, t in {**segmenter.state_dict(), **change}.items() if t is not None}
    with pytest.raises(ValueError, match=message):
        read_checkpoint(state)


@pytest.mark.parametrize("layout", ["hf4", "hf5"])
@torch.no_grad()
def test_transformers_reads_ours_and_we_theirs(layout, segmenter, tmp_path, caplog):
    from safetensors.torch import save_file
    from transformers import BeitForSemanticSegmentation as Theirs

    labels = [f"thing {i}" for i in range(5)]
    with caplog.at_level(logging.WARNING, logger="beit_fast.model"):
        save_pretrained(segmenter, tmp_path, labels=labels, statistics="imagenet")
    assert "reads blocks [-1, 0, 1, 3] for them" in caplog.text
    written = json.loads((tmp_path / "config.json").read_text())
    for name, value in {
        "out_indices": [1, 2, 3, 5], "use_auxiliary_head": True, "auxiliary_channels": 12,
        "pool_scales": [1, 2, 3, 6], "semantic_loss_ignore_index": 255,
    }.items():  # fmt: skip
        assert written[name] == value

    theirs, info = Theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_identical(from_house(segmenter.state_dict(), "hf5"), theirs.state_dict())
    if layout == "hf5":  # names of version 5's modules, which no file has that it writes
        save_file(from_house(segmenter.state_dict(), "hf5"), tmp_path / "model.safetensors")
    again = from_pretrained(tmp_path)
    assert again.config == dataclasses.replace(segmenter.config, taps=(1, 2, 3, 5))
    assert_identical(again.state_dict(), segmenter.state_dict())
    assert read_checkpoint(tmp_path).labels == tuple(labels)


def test_the_report_of_a_conversion_says_what_transformers_makes_of_it(
    segmenter, config, randomize, tmp_path
):
    torch.save({"state_dict": segmenter.state_dict()}, tmp_path / "a.pth")
    for report in (
        convert(tmp_path / "a.pth", tmp_path / "hf", to="hf"),
        convert(tmp_path / "hf", tmp_path / "b.pth", to="unilm"),
        load_pretrained(BeitForSemanticSegmentation(config()), tmp_path / "hf"),
    ):
        assert "blocks, from 0, that the heads read, as unilm counts" in str(report)
        assert "nor has it dropout in its heads, or a window that slides" in str(report)
    oblong = randomize(BeitForSemanticSegmentation(config(img_size=(64, 96))))
    save_pretrained(oblong, tmp_path / "oblong")
    report = convert(tmp_path / "oblong", tmp_path / "again", to="hf")
    assert "reads the table of relative positions transposed" in str(report)
    assert len(report.notes) == 2
    assert_identical(from_pretrained(tmp_path / "again").state_dict(), oblong.state_dict())


@torch.no_grad()
def test_heads_trained_in_transformers_read_its_blocks_with_other_taps(
    config, randomize, transformers_config, tmp_path, assert_agree, caplog
):
    from transformers import BeitForSemanticSegmentation as Theirs

    theirs_config = transformers_config(config())
    theirs_config.update({
        "out_indices": [2, 3, 4, 5], "use_mask_token": False, "auxiliary_channels": 12,
    })  # fmt: skip
    theirs = randomize(Theirs(theirs_config)).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with caplog.at_level(logging.WARNING, logger="beit_fast.model"):
        model = from_pretrained(tmp_path)
    assert "reads blocks [0, 1, 2, 3] for them" in caplog.text
    assert model.config.tapped == (2, 3, 4, 5)
    again = from_pretrained(tmp_path, taps=(0, 1, 2, 3))
    assert_agree(again(images), theirs(images).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_indices": [3, 4, 5, 6]}, r"out_indices \[3, 4, 5, 6\], and blocks are 0 to 5"),
        ({"out_indices": [0, 1, 2]}, r"out_indices \[0, 1, 2\], .*the four blocks"),
        ({"out_indices": ["0", "1", "2", "3"]}, r"out_indices \['0', .*the four blocks"),
        ({"out_indices": 3}, r"out_indices 3, .*the four blocks"),
        ({"pool_scales": [1, 2]}, r"pool_scales \[1, 2\]: the heads here have \[1, 2, 3, 6\]"),
        ({"auxiliary_num_convs": 2}, "auxiliary_num_convs 2"),
        ({"auxiliary_concat_input": True}, "auxiliary_concat_input True"),
        ({"auxiliary_channels": 13}, r"auxiliary_head.conv_seg.weight is \(5, 12, 1, 1\)"),
        ({"use_auxiliary_head": False}, "auxiliary_head.conv_seg.bias has no place"),
        ({"id2label": {"0": "a"}}, "1 names of classes, 5 rows"),
    ],
)
def test_a_config_that_is_not_the_tensors_is_refused(change, message, segmenter, tmp_path):
    save_pretrained(segmenter, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path)


def test_what_transformers_cannot_hold_is_refused_and_unilms_layout_holds_it(
    config, randomize, transformers_config, tmp_path
):
    for fields, message in (
        ({"head": "linear"}, "the head is 'linear': .*use to='unilm', or save the encoder"),
        ({"head_channels": 24}, "head_channels is 24: transformers' head has embed_dim, 32"),
        ({"patch_size": 8}, "patches of 8 pixels have unilm's pyramid"),
        ({"taps": (0, 1, 1, 3)}, r"taps \[0, 1, 1, 3\]: transformers wants four different blocks"),
    ):
        model = randomize(BeitForSemanticSegmentation(config(**fields)))
        with pytest.raises(ValueError, match=message):
            save_pretrained(model, tmp_path / "hf")
        convert(model.state_dict(), tmp_path / "a.pth", to="unilm", overwrite=True)
        assert_identical(from_pretrained(tmp_path / "a.pth").state_dict(), model.state_dict())
    encoder = Beit(config(head="linear"))
    assert save_pretrained(encoder, tmp_path / "encoder")
    assert from_pretrained(tmp_path / "encoder").config.embed_dim == 32
    theirs = transformers_config(config(patch_size=8))
    theirs.update({"out_indices": [0, 1, 2, 3], "use_mask_token": False})
    from transformers import BeitForSemanticSegmentation as Theirs

    Theirs(theirs).save_pretrained(tmp_path / "eight")
    with pytest.raises(ValueError, match="a pyramid of transformers for patches of 8 pixels"):
        read_checkpoint(tmp_path / "eight")


def test_a_head_that_scores_no_classes_is_refused_and_the_remedy_works(segmenter):
    state = {n: t for n, t in segmenter.state_dict().items() if "decode_head.conv_seg" not in n}
    with pytest.raises(
        ValueError, match=r"conv_seg\.weight, .*is missing: .*begins with decode_head"
    ):
        read_checkpoint(state)
    encoder = {n: t for n, t in state.items() if not n.startswith("decode_head.")}
    model = from_pretrained(encoder, Beit)
    assert torch.equal(model.cls_token, segmenter.cls_token)


def test_a_run_and_a_moved_file_of_ours_say_their_config(config, randomize, tmp_path):
    for fields in ({"head": "linear", "taps": (2,)}, {"taps": (0, 1, 1, 2), "img_size": (64, 96)}):
        model = randomize(BeitForSemanticSegmentation(config(**fields)))
        settings = {"model": json.loads(json.dumps(dataclasses.asdict(model.config)))}
        settings |= {"classes": list("abcde")}
        save_checkpoint(tmp_path / "run", 7, {"model": model.state_dict()}, settings, keep=1)
        convert(tmp_path / "run", tmp_path / "moved.safetensors", to="unilm", overwrite=True)
        for source in (tmp_path / "run", tmp_path / "moved.safetensors"):
            again = from_pretrained(source)
            assert again.config == model.config
            assert_identical(again.state_dict(), model.state_dict())
            assert read_checkpoint(source).labels == tuple("abcde")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("kind", [BeitForImageClassification, BeitForMaskedImageModeling])
@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_what_is_no_segmenter_becomes_one_with_fresh_heads(kind, head, tiny, randomize, caplog):
    source = randomize(kind(tiny(depth=6, img_size=64, patch_size=16, drop_rate=0.3)))
    asked = {"num_classes": 7, "img_size": (96, 64), "head": head, **PER_BLOCK}
    with caplog.at_level(logging.WARNING, logger="beit_fast.model"):
        model = from_pretrained(dict(source.state_dict()), BeitForSemanticSegmentation, **asked)
    assert model.config.drop_rate == 0.1
    assert model.decode_head.conv_seg.weight.shape[0] == 7
    assert torch.equal(model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    table = source.state_dict()["rel_pos_bias.relative_position_bias_table"]
    assert torch.equal(model.state_dict()[TABLE], resize_rel_pos_table(table, (4, 4), (6, 4)))
    fresh = next(line for line in caplog.text.splitlines() if line.startswith("fresh: "))
    named = {name.split(".")[0] for name in fresh.removeprefix("fresh: ").split(", ")}
    pyramid = {"fpn1", "fpn2", "auxiliary_head"} if head == "upernet" else set()
    assert named == {"decode_head"} | pyramid
    with pytest.raises(ValueError, match=r"is of no segmenter, .*pass num_classes"):
        from_pretrained(dict(source.state_dict()), BeitForSemanticSegmentation)


def test_other_classes_leave_the_last_convolutions_fresh(segmenter, config, caplog):
    with caplog.at_level(logging.WARNING, logger="beit_fast.model"):
        model = from_pretrained(segmenter.state_dict(), num_classes=9)
    named = [f"{part}.{name}" for part in ("auxiliary_head", "decode_head") for name in LAST]
    assert f"fresh: {', '.join(named)}" in caplog.text
    assert model.decode_head.conv_seg.weight.shape == (9, 32, 1, 1)
    for name in ("decode_head.fpn_bottleneck.conv.weight", "auxiliary_head.convs.0.bn.bias"):
        assert torch.equal(model.state_dict()[name], segmenter.state_dict()[name])
    linear = BeitForSemanticSegmentation(config(head="linear"))
    report = load_pretrained(linear, segmenter.state_dict())
    assert {name.split(".")[0] for name in report.fresh} == {"decode_head"}
    assert "blocks [1, 2, 3, 5] are read in the source, [5] in the model" in str(report)
    report = load_pretrained(
        BeitForSemanticSegmentation(config(head_channels=8)), segmenter.state_dict()
    )
    assert {name.split(".")[0] for name in report.fresh} == {"decode_head"}


def test_positions_are_resized_and_other_models_take_what_they_have(segmenter, config):
    larger = from_pretrained(segmenter.state_dict(), img_size=96)
    table = segmenter.state_dict()[TABLE]
    assert torch.equal(larger.state_dict()[TABLE], resize_rel_pos_table(table, (4, 4), (6, 6)))
    for kind in (Beit, BeitFeaturePyramid, BeitForImageClassification):
        model = from_pretrained(segmenter.state_dict(), kind, num_classes=0)
        assert not isinstance(model.config, SegmenterConfig)
        assert torch.equal(model.state_dict()[TABLE], table)
    moved = BeitForSemanticSegmentation(config(taps=(0, 1, 2, 3)))
    report = load_pretrained(moved, segmenter.state_dict())
    assert "blocks [1, 2, 3, 5] are read in the source, [0, 1, 2, 3] in the model" in str(report)


def test_the_published_segmenters_have_their_config():
    entries = [entry for entry in PUBLISHED.values() if entry.task == "segmentation"]
    assert [entry.config.tapped for entry in entries] == [(3, 5, 7, 11), (7, 11, 15, 23)]
    for entry in entries:
        with torch.device("meta"):
            model = BeitForSemanticSegmentation(entry.config)
        state = model.state_dict()
        assert state["decode_head.conv_seg.weight"].shape == (150, entry.config.embed_dim, 1, 1)
        assert state["auxiliary_head.convs.0.conv.weight"].shape[0] == 256
        assert len(state["blocks.0.attn.relative_position_bias_table"]) == 6244
