"""Checkpoints against live timm and transformers models: tensors, logits, loading, converting."""

import dataclasses
import json
import logging
import os

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.train.state import save_checkpoint
from beit_fast.weights.pretrained import (
    convert,
    from_pretrained,
    load_pretrained,
    push_to_hub,
    save_pretrained,
)
from beit_fast.weights.read import read_checkpoint

VANILLA = {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "init_values": None}
PER_BLOCK = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
TABLE = "blocks.1.attn.relative_position_bias_table"
SHARED = "rel_pos_bias.relative_position_bias_table"


def images():
    return torch.randn(2, 3, 32, 32)


def mask():
    return torch.rand(2, 16) < 0.4


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture
def mim(tiny, randomize):
    return randomize(BeitForMaskedImageModeling(tiny(num_classes=0))).eval()


@pytest.fixture
def classifier(tiny, randomize):
    return randomize(BeitForImageClassification(tiny(**PER_BLOCK))).eval()


@pytest.mark.parametrize("global_pool", ["avg", "token"])
@pytest.mark.parametrize("overrides", [PER_BLOCK, VANILLA], ids=["plus", "vanilla"])
@torch.no_grad()
def test_transformers_reads_our_classifier_and_we_theirs(
    overrides, global_pool, tiny, randomize, tmp_path, assert_agree
):
    from transformers import BeitForImageClassification as Theirs

    config = tiny(**overrides, global_pool=global_pool, num_heads=4, drop_path_rate=0.1)
    ours = randomize(BeitForImageClassification(config)).eval()
    labels = [f"kind {i}" for i in range(5)]
    save_pretrained(ours, tmp_path / "ours", labels=labels)
    theirs, info = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(labels))
    batch = images()
    assert_agree(ours(batch), theirs.eval()(batch).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = from_pretrained(tmp_path / "theirs")
    assert again.config.num_heads == 4
    assert again.config.norm_eps == config.norm_eps
    assert_identical(again.state_dict(), ours.state_dict())
    assert_agree(again(batch), ours(batch))
    assert read_checkpoint(tmp_path / "theirs").labels == tuple(labels)


@pytest.mark.parametrize("overrides", [{}, VANILLA], ids=["plus", "vanilla"])
@torch.no_grad()
def test_transformers_reads_our_mim_and_we_theirs(
    overrides, tiny, randomize, tmp_path, assert_agree
):
    from transformers import BeitForMaskedImageModeling as Theirs
    from transformers import BeitModel

    ours = randomize(BeitForMaskedImageModeling(tiny(**overrides))).eval()
    save_pretrained(ours, tmp_path / "ours")
    theirs, info = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch, hidden = images(), mask()
    assert_agree(ours(batch, hidden), theirs.eval()(batch, bool_masked_pos=hidden).logits)
    encoder = BeitModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False).eval()
    assert_agree(ours.forward_features(batch), encoder(batch).last_hidden_state)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    again = from_pretrained(tmp_path / "theirs")
    assert_identical(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize("global_pool", ["avg", "token"])
@torch.no_grad()
def test_a_model_without_classes_is_transformers_encoder(
    global_pool, tiny, randomize, tmp_path, assert_agree
):
    from transformers import BeitModel

    config = tiny(**PER_BLOCK, num_classes=0, global_pool=global_pool)
    ours = randomize(BeitForImageClassification(config)).eval()
    save_pretrained(ours, tmp_path)
    theirs, info = BeitModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = images()
    assert_agree(ours(batch), theirs.eval()(batch).pooler_output)
    assert_identical(from_pretrained(tmp_path).state_dict(), ours.state_dict())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("overrides", [PER_BLOCK, VANILLA], ids=["plus", "vanilla"])
@torch.no_grad()
def test_timm_reads_what_we_convert_and_we_what_it_saves(
    overrides, suffix, tiny, randomize, timm_beit, tmp_path, assert_agree
):
    import timm

    given = {"num_heads": 4} if overrides is VANILLA else {}  # no tensor shows them
    theirs = randomize(timm_beit(tiny(**overrides))).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = from_pretrained(tmp_path / "theirs.pth", **given)
    batch = images()
    assert_agree(ours(batch), theirs(batch))
    report = convert(tmp_path / "theirs.pth", tmp_path / f"ours.{suffix}", to="timm", **given)
    assert (report.left_out, report.read) == ((), report.written)
    again = timm_beit(tiny(**overrides)).eval()
    timm.models.load_checkpoint(again, str(tmp_path / f"ours.{suffix}"), strict=True)
    assert_identical(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("to", ["unilm", "hf"])
def test_every_conversion_and_its_way_back_keep_every_value(to, mim, classifier, tmp_path):
    for model in (mim.bfloat16(), classifier.half()):
        torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
        convert(tmp_path / "a.pth", tmp_path / to, to=to, overwrite=True)
        back = convert(tmp_path / to, tmp_path / "b.safetensors", to="unilm", overwrite=True)
        assert back.layout == ("house" if to == "unilm" else "hf4")
        weights = read_checkpoint(tmp_path / "b.safetensors")
        assert_identical(weights.state, dict(model.state_dict()))
        assert from_pretrained(weights).cls_token.dtype == model.cls_token.dtype


@pytest.mark.parametrize("to", ["unilm", "timm", "hf"])
def test_conversion_makes_folders_and_replaces_nothing_unasked(to, classifier, mim, tmp_path):
    target = tmp_path / "new" / "folder" / "beit"
    convert(classifier.state_dict(), target, to=to)
    files = [target] if to != "hf" else sorted(target.iterdir())
    before = [file.read_bytes() for file in files]
    with pytest.raises(ValueError, match=r"beit.* would be overwritten: .*or --overwrite"):
        convert(mim.state_dict(), target, to=to)
    assert [file.read_bytes() for file in files] == before
    convert(mim.state_dict(), target, to=to, overwrite=True)
    assert all(file.read_bytes() != old for file, old in zip(files, before, strict=True))
    assert sorted(target.parent.rglob("*")) == sorted({target, *files})  # nothing temporary


def test_a_target_is_looked_at_before_the_source_is_read(tmp_path):
    (tmp_path / "preprocessor_config.json").touch()  # of another model
    with pytest.raises(ValueError, match=r"preprocessor_config.json would be overwritten"):
        convert(tmp_path / "no such file", tmp_path, to="hf")
    (tmp_path / "link.pth").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"link.pth would be overwritten"):
        convert(tmp_path / "no such file", tmp_path / "link.pth", to="unilm")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is no file, and nothing takes its place"):
        convert(tmp_path / "no such file", tmp_path / "pipe", to="unilm", overwrite=True)


def test_an_interrupted_conversion_leaves_the_old_file_whole(classifier, tmp_path, monkeypatch):
    file = tmp_path / "beit.pth"
    file.write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(classifier.state_dict(), file, to="unilm", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["beit.pth"]
    assert file.read_bytes() == b"old"


def test_timm_leaves_out_what_it_lacks_and_the_report_names_it(mim, tmp_path):
    report = convert(mim.state_dict(), tmp_path / "m.safetensors", to="timm")
    assert report.left_out == ("lm_head.bias", "lm_head.weight", "mask_token")
    assert "left out: lm_head.bias, lm_head.weight, mask_token" in str(report)
    assert read_checkpoint(tmp_path / "m.safetensors").task == "features"


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


def segmentation_state(tiny, transformers_config):
    from transformers import BeitForSemanticSegmentation

    config = transformers_config(tiny(depth=4, use_rel_pos_bias=True))
    config.use_shared_relative_position_bias, config.out_indices = False, [1, 2, 3, 4]
    return BeitForSemanticSegmentation(config).eval()


def test_a_segmentation_file_gives_its_encoder_and_converts_whole(
    tiny, transformers_config, tmp_path
):
    theirs = segmentation_state(tiny, transformers_config)
    theirs.save_pretrained(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "m.pth", to="unilm")
    assert report.task == "segmentation"
    stored = torch.load(tmp_path / "m.pth", weights_only=True)["state_dict"]
    assert {"backbone.fpn1.0.weight", "backbone.cls_token", "decode_head.conv_seg.bias"} < set(
        stored
    )
    weights = read_checkpoint(tmp_path / "m.pth")
    model = Beit(weights.config)
    left_out = load_pretrained(model, weights).left_out
    assert "decode_head.fpn_bottleneck.bn.running_mean" in left_out
    assert torch.equal(model.cls_token, theirs.beit.embeddings.cls_token)
    convert(tmp_path / "hf", tmp_path / "again", to="hf")
    again, info = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_identical(again.state_dict(), theirs.state_dict())
    del stored["decode_head.lateral_convs.2.bn.running_var"]
    with pytest.raises(ValueError, match=r"1 tensors of the heads .*convs\.2\.bn\.running_var"):
        read_checkpoint(stored)
    with pytest.raises(ValueError, match="no taps are known for 4 blocks"):
        convert(tmp_path / "m.pth", tmp_path / "third", to="hf")


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


def test_what_transformers_cannot_hold_is_refused(tiny, classifier, tmp_path):
    with pytest.raises(ValueError, match="has no such BEiT"):
        save_pretrained(BeitForMaskedImageModeling(tiny(predict="pixels")), tmp_path)
    with pytest.raises(ValueError, match="heads of 16 channels"):
        save_pretrained(Beit(tiny(attn_head_dim=16)), tmp_path)
    with pytest.raises(ValueError, match="2 labels for 5 classes"):
        save_pretrained(classifier, tmp_path, labels=["a", "b"])
    with pytest.raises(ValueError, match="no layout 'keras'"):
        convert(classifier.state_dict(), tmp_path / "x", to="keras")
    with pytest.raises(ValueError, match="is a folder: --to timm writes a file"):
        convert(classifier.state_dict(), tmp_path, to="timm")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: --to hf writes a folder"):
        convert(classifier.state_dict(), tmp_path / "file", to="hf")


def test_push_to_hub_sends_the_folder(classifier, monkeypatch, tmp_path):
    import huggingface_hub

    sent = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            sent.update(private=private, exist_ok=exist_ok)
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["state"] = from_pretrained(folder_path).state_dict()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_to_hub(classifier, "me/beit", private=True) == "https://hub/me/beit"
    assert (sent["private"], sent["exist_ok"]) == (True, True)
    assert_identical(sent["state"], classifier.state_dict())


def test_the_command_converts_and_says_what_it_did(mim, tmp_path, capsys):
    from beit_fast.cli import main

    torch.save({"model": mim.state_dict()}, tmp_path / "m.pth")
    assert main(["convert", str(tmp_path / "m.pth"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "house names, mim, 2 blocks of 32, 32x32 px" in said
    assert f"{len(mim.state_dict())} tensors became {len(mim.state_dict()) + 4}" in said
    assert_identical(from_pretrained(tmp_path / "hf").state_dict(), mim.state_dict())
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "x"), "--to", "hf"]) == 1
    assert "no weights at" in capsys.readouterr().err
