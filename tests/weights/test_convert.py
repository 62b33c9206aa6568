"""Conversions keep every value, replace nothing unasked, and timm reads what it gets."""

import os

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.weights.convert import convert
from beit_fast.weights.load import from_pretrained, load_pretrained
from beit_fast.weights.read import read_checkpoint
from tiny_models import PER_BLOCK, VANILLA, assert_identical
from tiny_segmenter import save_run, tiny_segmenter


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
    batch = torch.randn(2, 3, 32, 32)
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


def segmentation_state(tiny, transformers_config):
    from transformers import BeitForSemanticSegmentation

    config = transformers_config(tiny(depth=4, img_size=64, patch_size=16, **PER_BLOCK))
    config.use_mask_token, config.out_indices = False, [0, 1, 2, 3]
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
    loaded = load_pretrained(model, weights)
    assert "decode_head.fpn_bottleneck.bn.running_mean" in loaded.left_out
    told = "left out: auxiliary_head.* (8 tensors), decode_head.* (74 tensors), fpn1.* (9 tensors)"
    assert told in str(loaded)
    assert told in str(convert(tmp_path / "m.pth", tmp_path / "timm.pth", to="timm"))
    assert torch.equal(model.cls_token, theirs.beit.embeddings.cls_token)
    convert(tmp_path / "hf", tmp_path / "again", to="hf")
    again, info = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_identical(again.state_dict(), theirs.state_dict())
    del stored["decode_head.lateral_convs.2.bn.running_var"]
    with pytest.raises(ValueError, match=r"lateral_convs\.2\.bn\.running_var is missing"):
        read_checkpoint(stored)


def test_how_a_runs_windows_slide_is_said_to_stay_with_it(tmp_path):
    said = {"stride": [16, 8], "scale": [96, 48]}
    run = save_run(tmp_path / "run", tiny_segmenter(), evaluation=said)
    report = convert(run, tmp_path / "m.pth", to="unilm")
    assert "evaluate and predict with --stride [16,8] --scale [96,48]" in str(report)
    usual = {"stride": None, "scale": None}
    run = save_run(tmp_path / "usual", tiny_segmenter(), evaluation=usual)
    assert convert(run, tmp_path / "u.pth", to="unilm").notes == ()


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
