"""Training a segmenter end to end on coloured boxes: exact resume, ranks, what is left, errors."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast import BeitForSemanticSegmentation, from_pretrained
from beit_fast.cli import main
from beit_fast.data.sources import ade20k
from beit_fast.tasks import check_images
from beit_fast.tasks.segment.checkpoints import open_segmenter
from beit_fast.tasks.segment.config import SegmentationDataConfig
from beit_fast.tasks.segment.config_evaluation import SegmenterSourceConfig
from beit_fast.tasks.segment.data import open_masked
from beit_fast.tasks.segment.task import run_segmentation
from beit_fast.tasks.segment.training import SegmentTask
from beit_fast.train.state import CheckpointError, checkpoint_paths, load_checkpoint
from task_runs import (
    ALONE,
    TWO_RANKS,
    assert_compiles_to_one_graph,
    assert_the_same_run,
    records_of,
    stopped_in_step,
)

CLASSES = ["class 0", "class 1", "class 2"]
WITHOUT_CHANCE = {"drop_path_rate": 0.0, "drop_rate": 0.0}


@pytest.mark.promise("R1")
def test_a_run_that_is_stopped_and_resumed_is_bitwise_the_undisturbed_one(segment_config, tmp_path):
    whole = run_segmentation(segment_config(run={"output": str(tmp_path / "whole")}))
    parts = segment_config(run={"output": str(tmp_path / "parts")})
    with stopped_in_step(SegmentTask, 4):  # it ends the first pass, and is evaluated
        run_segmentation(parts)
    resumed = run_segmentation(parts)
    tensors = load_checkpoint(resumed.train.checkpoint).tensors
    for part in ("model", "ema"):
        buffers = [n for n in tensors[part] if n.endswith(("running_mean", "running_var"))]
        assert len(buffers) == 2 * 13  # of every batch norm
    assert_the_same_run(tmp_path / "whole", tmp_path / "parts")
    assert torch.equal(whole.raw.confusion, resumed.raw.confusion)
    assert torch.equal(whole.ema.confusion, resumed.ema.confusion)


def test_a_run_is_evaluated_on_the_way_and_at_the_end_and_says_what_others_need(
    segment_config, boxes, tmp_path, capsys
):
    result = run_segmentation(segment_config())
    output, said = tmp_path / "run", capsys.readouterr().out
    records = records_of(output)
    assert {"loss", "accuracy", "grad_norm", "lr"} <= records[0].keys()
    evaluated = [record for record in records if "test_miou" in record]
    assert [record["step"] for record in evaluated] == [4]  # the end has a place of its own
    assert {"test_macc", "test_aacc", "test_ema_miou", "test_ema_aacc"} <= evaluated[0].keys()
    saved = json.loads((output / "result.json").read_text())
    assert saved["classes"] == CLASSES
    assert saved["raw"]["miou"] == result.raw.miou
    assert saved["ema"]["confusion"] == result.ema.confusion.tolist()
    labelled = sum(
        (np.array(Image.open(mask)) != 9).sum() for mask in (boxes / "test_masks").iterdir()
    )
    assert np.sum(saved["raw"]["confusion"]) == labelled
    for text in (
        f"images: {boxes / 'train'}: 7 images, 3 classes",
        f"test images: {boxes / 'test'}: 3 images, 3 classes",
        "a mim checkpoint",
        "\nfresh: auxiliary_head, decode_head, fpn1\n",
        "it has no pyramid and no head for pixels: these start anew",
        "pixels: imagenet statistics\n",
        "averaged weights  mIoU",
        "result.json",
        "picture.png",
    ):
        assert text in said
    with Image.open(output / "picture.png") as picture:
        assert picture.width > 400  # three columns and a legend
    opened = open_segmenter(SegmenterSourceConfig(checkpoint=str(output), weights="ema"))
    assert opened.classes == tuple(CLASSES)
    for name, value in result.train.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], value)


def test_half_statistics_of_the_checkpoint_are_told_and_no_error(segment_config, tmp_path, capsys):
    short = {"steps": 1, "evaluate_every": None}
    optim = {"warmup_steps": 0}
    run_segmentation(segment_config(statistics="half", run=short, optim=optim))
    capsys.readouterr()
    again = short | {"output": str(tmp_path / "again")}
    run_segmentation(segment_config(init=str(tmp_path / "run"), run=again, optim=optim))
    said = capsys.readouterr().out
    assert f"pixels: imagenet statistics, and {tmp_path / 'run'} was trained with half" in said
    assert "(--statistics half changes it)" in said


def test_two_ranks_learn_and_count_what_one_process_with_both_batches_does(
    segment_config, boxes, pretrained, tmp_path
):
    """Also with two micro-batches. Of images enough that batch norm is no matter of rounding."""
    config = segment_config(
        model={"drop_rate": 0.0},
        data={"batch_size": 6},
        run={"accumulate": 2, "output": str(tmp_path / "one"), "log_every": 1, "steps": 4},
    )
    one = run_segmentation(config)
    arguments = """
        --model {"img_size":[32,40],"patch_size":8,"num_classes":0,"head_channels":16,"""
    arguments += f""""auxiliary_channels":8,"drop_path_rate":0.3,"drop_rate":0.0}}
        --data.path {boxes / "train"} --data.masks {boxes / "train_masks"}
        --data.test {boxes / "test"} --data.test_masks {boxes / "test_masks"} --data.ignore 9
        --data.batch_size 3 --data.num_threads 1 --augment.scale [128,32] --init {pretrained}
        --optim.lr 5e-3 --optim.warmup_steps 2 --run.steps 4 --run.accumulate 2
        --run.precision fp32 --run.device cpu --run.ema_decay 0.8 --run.cpu_threads 1
        --run.log_every 1 --run.evaluate_every 1 --run.output {tmp_path / "two"}"""
    command = [*TWO_RANKS, "-m", "beit_fast.cli", "segment", "small_data"]
    done = subprocess.run(
        [*command, *arguments.split()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(
        records_of(tmp_path / "one"), records_of(tmp_path / "two"), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    theirs = load_checkpoint(checkpoint_paths(tmp_path / "two")[-1]).tensors
    ours = load_checkpoint(one.train.checkpoint).tensors
    for part in ("model", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            torch.testing.assert_close(theirs[part][name], value, rtol=1e-2, atol=1e-3, msg=name)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["raw"]["num_images"] == 3
    assert np.sum(result["raw"]["confusion"]) == int(one.raw.confusion.sum())
    assert result["raw"]["aacc"] == pytest.approx(one.raw.aacc, abs=0.01)


def test_a_compiled_step_is_one_graph_and_learns_as_the_plain_one(
    segment_config, tmp_path, monkeypatch
):
    def train(**run):
        run |= {"steps": 3, "log_every": 1, "evaluate_every": None}
        data = {"batch_size": 5, "test": "", "test_masks": ""}
        # UPerNet is compiled in tests/model; here it takes long and shows no more.
        model = WITHOUT_CHANCE | {"head": "linear", "head_channels": None}
        run_segmentation(segment_config(model=model, data=data, run=run))

    assert_compiles_to_one_graph(train, tmp_path, monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_other_precisions_learn_nearly_the_same(segment_config, tmp_path, precision):
    losses = []
    for each in ("fp32", precision):
        run = {"precision": each, "output": str(tmp_path / each), "log_every": 1, "steps": 3}
        config = segment_config(
            model=WITHOUT_CHANCE,
            data={"batch_size": 5},
            run=run | {"evaluate_every": None},
            grad_checkpointing="selective" if each == precision else False,
        )
        assert run_segmentation(config).raw.num_images == 3
        losses.append([record["loss"] for record in records_of(tmp_path / each)])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_run_of_ade20ks_layout_finds_its_validation_part(boxes, tmp_path):
    for part, images in (("training", "train"), ("validation", "test")):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        shutil.copytree(boxes / images, tmp_path / "images" / part)
        shutil.copytree(boxes / f"{images}_masks", tmp_path / "annotations" / part)
    source, test = open_masked(SegmentationDataConfig(path=str(tmp_path)))
    assert (len(source), len(test)) == (7, 3)
    assert source.classes == test.classes == ade20k.CLASSES
    kept, held_out = open_masked(SegmentationDataConfig(path=str(tmp_path), held_out=0.3))
    assert (len(kept), len(held_out)) == (5, 2)
    of_another = SegmentationDataConfig(path=str(tmp_path), test=str(tmp_path))
    assert open_masked(of_another)[1].classes == ade20k.CLASSES
    plain = {"test": str(boxes / "test"), "test_masks": str(boxes / "test_masks")}
    with pytest.raises(ValueError, match=r"or under other names: .* --data\.classes_file"):
        open_masked(SegmentationDataConfig(path=str(tmp_path), **plain))
    (tmp_path / "names.txt").write_text("".join(f"{i}\n" for i in range(10)))
    named = {"classes_file": str(tmp_path / "names.txt")}
    source, test = open_masked(SegmentationDataConfig(path=str(tmp_path), **plain, **named))
    assert source.classes == test.classes
    assert len(source.classes) == 10
    shutil.rmtree(tmp_path / "images" / "validation")
    assert open_masked(SegmentationDataConfig(path=str(tmp_path)))[1] is None


def test_held_out_images_are_never_trained_on_whatever_the_seed(
    segment_config, write_boxes, tmp_path
):
    data = {"test": "", "test_masks": "", "held_out": 0.4}
    task, other = (
        SegmentTask(segment_config(data=data, run={"seed": seed}), ALONE) for seed in (0, 1)
    )
    named = [{s.name(i) for i in range(len(s))} for s in (task.source, task.test)]
    assert [len(names) for names in named] == [4, 3]
    assert not named[0] & named[1]
    assert other.test.digest() == task.test.digest()
    assert 0 <= task.evaluate(task.model)["miou"] <= 1
    alone = tmp_path / "alone"
    write_boxes(alone / "images", alone / "masks", 1, seed=0)
    one = {"path": str(alone / "images"), "masks": str(alone / "masks")}
    with pytest.raises(ValueError, match=r"--data\.held_out is 0\.4 and there is one image"):
        SegmentTask(segment_config(data=data | one), ALONE)


def test_other_weights_or_ids_are_another_run_and_the_window_is_not(segment_config, tmp_path):
    run = {"steps": 2, "evaluate_every": None}
    optim = {"warmup_steps": 1}
    run_segmentation(segment_config(run=run, optim=optim))
    evaluation = {"stride": 16, "flip": True}
    run_segmentation(segment_config(run=run | {"steps": 3}, optim=optim, evaluation=evaluation))
    with pytest.raises(CheckpointError, match=r"data\.ignore was 9, is None"):
        run_segmentation(
            segment_config(run=run, optim=optim, data={"ignore": None, "num_classes": 10})
        )
    with pytest.raises(CheckpointError, match=r"auxiliary_weight was 0\.4, is 0\.5"):
        run_segmentation(segment_config(run=run, optim=optim, auxiliary_weight=0.5))


def test_a_run_goes_on_without_the_checkpoint_it_started_from(
    segment_config, pretrained, tmp_path, capsys
):
    moved = tmp_path / "moved.pth"
    shutil.copy(pretrained, moved)
    run = {"steps": 2, "evaluate_every": None}
    optim = {"warmup_steps": 1}
    run_segmentation(segment_config(init=str(moved), run=run, optim=optim))
    moved.unlink()
    result = run_segmentation(segment_config(init=str(moved), run=run | {"steps": 3}, optim=optim))
    assert "moved.pth is no longer there" in capsys.readouterr().out
    assert load_checkpoint(result.train.checkpoint).step == 3


def test_images_and_masks_are_looked_at_before_the_first_step(
    segment_config, boxes, tmp_path, monkeypatch
):
    for name in ("test", "test_masks"):
        shutil.copytree(boxes / name, tmp_path / name)
    config = segment_config(
        data={"test": str(tmp_path / "test"), "test_masks": str(tmp_path / "test_masks")}
    )
    mask = tmp_path / "test_masks" / "1.png"
    whole = mask.read_bytes()
    Image.new("L", (5, 5)).save(mask)
    with monkeypatch.context() as patch:
        patch.setattr(SegmentTask, "begin_step", lambda *_: pytest.fail("a step was taken"))
        with pytest.raises(ValueError, match=r"1 of 3 test images cannot be used: .*1\.png"):
            run_segmentation(config)
    mask.write_bytes(whole)
    assert run_segmentation(config).raw.num_images == 3
    # They are not looked at again, and one that breaks later ends the evaluation alone.
    monkeypatch.setattr(check_images, "unusable_images", lambda *_, **__: pytest.fail("again"))
    mask.write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match=r"1\.png .* finished and saved in .*step_00000006"):
        run_segmentation(config)


def test_the_command_line_trains_in_bf16_and_says_what_is_wrong_in_one_line(
    boxes, pretrained, tmp_path, capsys
):
    train, masks = str(boxes / "train"), str(boxes / "train_masks")
    arguments = ["segment", "small_data", "--init", pretrained, "--run.output", f"{tmp_path}/run"]
    arguments += ["--model.img_size", "32", "--model.head_channels", "16", "--data.batch_size", "2"]
    arguments += ["--augment.scale", "[128,32]", "--run.device", "cpu", "--run.steps", "2"]
    arguments += ["--optim.warmup_steps", "1", "--data.path", train, "--data.masks", masks]
    held_out = ["--data.held_out", "0.3"]
    assert main([*arguments, *held_out, "--data.ignore", "9", "--run.picture_every", "1"]) == 0
    said = "\n" + capsys.readouterr().out
    for words in (f"\nimages: 5 of {train}: 7 images, 3 classes", "averaged weights  mIoU"):
        assert said.count(words) == 1
    assert (tmp_path / "run" / "picture_00000001.png").exists()
    assert isinstance(from_pretrained(tmp_path / "run"), BeitForSemanticSegmentation)
    (tmp_path / "empty").mkdir()
    new = ["--run.output", f"{tmp_path}/new", "--data.ignore", "9"]
    for changes, message in (
        (new, "--run.evaluate_every is set and there are no images to evaluate on: pass --data.t"),
        ([*new, *held_out, "--data.masks", str(tmp_path / "empty")], "no masks under"),
        ([*new, *held_out, "--data.path", ""], "pass --data.path with their folder"),
        ([*new, *held_out, "--data.masks", ""], "that of the masks of"),
        ([*new, *held_out, "--model.num_classes", "4"], "pass --model.num_classes 3"),
        ([*new, *held_out, "--model.img_size", "33"], "do not divide into patches"),
        ([*new, *held_out, "--data.batch_size", "1"], "pass --data.batch_size 2"),
        ([*new, *held_out, "--init", "no/such"], "there are no weights at no/such"),
        ([*new, *held_out, "--model.in_chans", "4"], "pass --model.in_chans 3"),
        ([*new, *held_out, "--evaluation.stride", "40"], "give no more than the window's sides"),
        ([*new, *held_out, "--auxiliary_weight", "0"], "--auxiliary_weight is 0.0: give a finite"),
        ([*new, *held_out, "--data.test", train], "and then no data.test"),
        ([*new, "--data.test", train], "pass --data.test_masks"),
        ([*new, "--data.test_masks", masks], "pass --data.test"),
    ):
        assert main([*arguments, *changes]) == 1, message
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
    assert not Path(tmp_path / "new" / "checkpoints").exists()
