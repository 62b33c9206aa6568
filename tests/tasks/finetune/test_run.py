"""Fine-tuning runs end to end on crops of photographs: exact resume, what is left, errors."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from PIL import Image

from beit_fast import BeitForImageClassification, from_pretrained
from beit_fast.cli import main
from beit_fast.data.views.config import AugmentConfig
from beit_fast.tasks import check_images
from beit_fast.tasks.evaluate.checkpoints import open_classifier
from beit_fast.tasks.evaluate.config import ClassifierConfig
from beit_fast.tasks.finetune.task import FinetuneTask, run_finetuning
from beit_fast.train.state import CheckpointError, checkpoint_paths, load_checkpoint
from beit_fast.weights.convert import convert
from beit_fast.weights.read import read_checkpoint
from labelled_images import PHOTOGRAPHED
from task_runs import (
    ALONE,
    TWO_RANKS,
    assert_compiles_to_one_graph,
    assert_the_same_run,
    records_of,
    stopped_in_step,
)


@pytest.mark.promise("R1")
def test_two_epochs_that_are_stopped_and_resumed_are_bitwise_the_undisturbed_ones(
    finetune_config, tmp_path
):
    whole = run_finetuning(finetune_config(run={"output": str(tmp_path / "whole")}))
    parts = finetune_config(run={"output": str(tmp_path / "parts")})
    with stopped_in_step(FinetuneTask, 4):  # it ends the first epoch, and is evaluated
        run_finetuning(parts)
    resumed = run_finetuning(parts)
    assert load_checkpoint(resumed.train.checkpoint).step == 6  # an epoch is 3.6 batches: 3
    assert_the_same_run(tmp_path / "whole", tmp_path / "parts")
    assert (whole.raw.loss, whole.ema.loss) == (resumed.raw.loss, resumed.ema.loss)


def test_a_run_is_evaluated_on_the_way_and_at_the_end_and_names_its_classes(
    finetune_config, tmp_path, capsys
):
    result = run_finetuning(finetune_config())
    output, said = tmp_path / "run", capsys.readouterr().out
    evaluated = [record for record in records_of(output) if "test_top1" in record]
    assert [record["step"] for record in evaluated] == [4]  # the end has a place of its own
    assert {"test_top5", "test_loss", "test_ema_top1", "test_ema_loss"} <= evaluated[0].keys()
    assert result.raw.num_images == 6
    assert result.raw.loss != result.ema.loss
    saved = json.loads((output / "result.json").read_text())
    assert saved["classes"] == PHOTOGRAPHED
    assert saved["ema"]["top1"] == result.ema.top1
    assert saved["raw"]["images_per_class"] == [2, 2, 2]
    for text in ("fresh: fc_norm.bias", "averaged weights  top-1", "result.json", "picture.png"):
        assert text in said
    assert (output / "picture.png").exists()
    settings = load_checkpoint(result.train.checkpoint).manifest["settings"]
    assert settings["classes"] == PHOTOGRAPHED
    assert settings["model"]["embed_dim"] == 32  # the checkpoint's
    assert settings["statistics"] == "half"


def test_a_run_is_read_back_converted_and_fine_tuned_further(finetune_config, tmp_path):
    run = {"epochs": 1, "evaluate_every": None}
    result = run_finetuning(finetune_config(run=run, crop_pct=0.95))
    model = from_pretrained(str(tmp_path / "run"), key="ema")
    assert isinstance(model, BeitForImageClassification)
    for name, value in result.train.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    lone = read_checkpoint(
        shutil.copy(result.train.checkpoint / "model.safetensors", tmp_path / "lone.safetensors")
    )
    assert (lone.config, lone.labels) == (result.train.model.config, tuple(PHOTOGRAPHED))
    assert lone.statistics == "half"
    convert(str(tmp_path / "run"), tmp_path / "hf", to="hf")
    labels = json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"]
    assert list(labels.values()) == PHOTOGRAPHED
    for source in ("run", "hf"):
        assert view_of(tmp_path / source).crop_pct == 0.95  # as it was evaluated
        config = finetune_config(
            init=str(tmp_path / source), model={"img_size": 48}, run={"output": str(tmp_path / "x")}
        )
        task = FinetuneTask(config, ALONE)
        assert torch.equal(task.model.head.weight, load_raw(result).pop("head.weight"))
    config = replace(config, init=str(tmp_path / "run"), statistics="imagenet")
    with pytest.raises(ValueError, match=r"trained with statistics half .* --statistics half"):
        FinetuneTask(config, ALONE)


def view_of(source):
    config = ClassifierConfig(checkpoint=str(source))
    return open_classifier(config).view


def load_raw(result):
    return load_checkpoint(result.train.checkpoint).tensors["model"]


def test_two_micro_batches_learn_what_one_of_twice_the_size_does(finetune_config, tmp_path):
    weights, plain = [], AugmentConfig(erase=0.0, mixup=0.0, cutmix=0.0)
    for batch_size, accumulate in ((6, 1), (3, 2)):
        run = {"accumulate": accumulate, "output": str(tmp_path / str(accumulate))}
        config = finetune_config(data={"batch_size": batch_size}, augment=plain, run=run)
        weights.append(load_raw(run_finetuning(config)))
    # Not to the last bit: AdamW divides rounding differences by small second moments.
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


def test_two_ranks_learn_and_count_what_one_does_with_two_micro_batches(
    finetune_config, photographs, pretrained, tmp_path
):
    """Mixed, too: a micro-batch is mixed as its first image draws, on whatever rank."""
    config = finetune_config(
        data={"batch_size": 3},
        augment=AugmentConfig(erase=0.0),
        run={"accumulate": 2, "output": str(tmp_path / "one")},
    )
    one = run_finetuning(config)
    arguments = f"""
        --model {{"img_size":[32,40],"patch_size":8,"drop_path_rate":0.3,"num_classes":0}}
        --data.path {photographs / "train"} --data.test {photographs / "test"}
        --data.batch_size 3 --data.num_threads 1 --augment.erase 0 --init {pretrained}
        --optim.lr 5e-3 --optim.min_lr 1e-5 --optim.warmup_steps 2 --run.epochs 2
        --run.precision fp32 --run.device cpu --run.ema_decay 0.8 --run.cpu_threads 1
        --run.evaluate_every 1 --run.output {tmp_path / "two"}"""
    command = [*TWO_RANKS, "-m", "beit_fast.cli", "finetune", "small_data"]
    done = subprocess.run(
        [*command, *arguments.split()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    theirs = load_checkpoint(checkpoint_paths(tmp_path / "two")[-1]).tensors["model"]
    for name, value in load_raw(one).items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["raw"]["num_images"] == 6
    assert result["raw"]["loss"] == pytest.approx(one.raw.loss, rel=1e-3)


def test_a_compiled_step_is_one_graph_and_learns_as_the_plain_one(
    finetune_config, tmp_path, monkeypatch
):
    def train(**run):
        run |= {"epochs": 1, "log_every": 1}
        run_finetuning(finetune_config(model={"drop_path_rate": 0.0}, run=run))

    assert_compiles_to_one_graph(train, tmp_path, monkeypatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_step_as_a_cuda_graph_is_bitwise_the_plain_one(finetune_config, tmp_path):
    runs = []
    for graph in (False, True):
        run = {"cuda_graph": graph, "output": str(tmp_path / str(graph)), "device": "cuda"}
        run |= {"compile": "off", "epochs": 4}
        runs.append(load_raw(run_finetuning(finetune_config(run=run))))
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


def test_other_classes_or_weights_are_another_run(finetune_config, photographs, tmp_path):
    run_finetuning(finetune_config(run={"evaluate_every": None, "epochs": 1}))
    again = {"evaluate_every": None, "epochs": 1}
    run_finetuning(finetune_config(run=again, data={"test": "", "num_threads": 1}))
    with pytest.raises(CheckpointError, match="init was"):
        run_finetuning(finetune_config(run=again, init=None, model={"embed_dim": 24, "depth": 2}))


def test_a_run_goes_on_without_the_checkpoint_it_started_from(
    finetune_config, pretrained, tmp_path, capsys
):
    moved = tmp_path / "moved.pth"
    shutil.copy(pretrained, moved)
    begun = {"evaluate_every": None, "epochs": None, "steps": 3}
    run_finetuning(finetune_config(init=str(moved), run=begun))
    moved.unlink()
    result = run_finetuning(finetune_config(init=str(moved), run=begun | {"steps": 5}))
    assert "moved.pth is no longer there" in capsys.readouterr().out
    whole = run_finetuning(finetune_config(run=begun | {"steps": 5, "output": f"{tmp_path}/whole"}))
    assert load_checkpoint(result.train.checkpoint).step == 5
    assert result.train.model.state_dict().keys() == whole.train.model.state_dict().keys()
    new = {**begun, "output": str(tmp_path / "new")}
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        run_finetuning(finetune_config(init=str(moved), run=new))


def test_test_images_are_looked_at_before_the_first_step(
    finetune_config, photographs, tmp_path, monkeypatch
):
    test = tmp_path / "test"
    shutil.copytree(photographs / "test", test)
    config = finetune_config(data={"test": str(test)})
    whole = (test / "bee" / "0.png").read_bytes()
    (test / "bee" / "0.png").write_bytes(whole[:300])
    (test / "lemurs" / "1.png").write_text("<html>")
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTask, "begin_step", lambda *_: pytest.fail("a step was taken"))
        with pytest.raises(ValueError, match="2 of 6 test images cannot be used: ") as error:
            run_finetuning(config)
        for name in ("bee/0.png", "lemurs/1.png", "Repair or remove them"):
            assert name in str(error.value)
        assert not checkpoint_paths(tmp_path / "run")
    (test / "bee" / "0.png").write_bytes(whole)
    (test / "lemurs" / "1.png").unlink()
    assert run_finetuning(config).raw.num_images == 5
    # They are not looked at again, and one that breaks later ends the evaluation alone.
    monkeypatch.setattr(check_images, "unusable_images", lambda *_, **__: pytest.fail("again"))
    (test / "bee" / "0.png").write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match=r"bee/0\.png .* finished and saved in .*step_00000006"):
        run_finetuning(config)


def test_an_image_that_breaks_meanwhile_does_not_end_training(
    finetune_config, tmp_path, monkeypatch, caplog
):
    classify, calls = FinetuneTask.classify, []

    def breaks_once(self, model):
        calls.append(self)
        if len(calls) == 1:
            raise ValueError("cannot use test/3.png")
        return classify(self, model)

    monkeypatch.setattr(FinetuneTask, "classify", breaks_once)
    result = run_finetuning(finetune_config())
    assert "evaluation after step 4 failed, and training goes on" in caplog.text
    assert result.train.failed
    assert result.raw.num_images == 6


def test_the_command_line_fine_tunes_in_bf16_and_says_what_is_wrong_in_one_line(
    photographs, pretrained, tmp_path, capsys
):
    train, test = str(photographs / "train"), str(photographs / "test")
    arguments = ["finetune", "small_data", "--init", pretrained, "--run.output", f"{tmp_path}/run"]
    arguments += ["--model.img_size", "32", "--data.batch_size", "8", "--run.device", "cpu"]
    arguments += ["--run.epochs", "1", "--optim.warmup_steps", "1", "--data.path", train]
    assert main([*arguments, "--data.test", test]) == 0
    said = "\n" + capsys.readouterr().out
    for words in (
        f"\nimages: {train}: 18 images, 3 classes\n",
        f"\ntest images: {test}: 6 images, 3 classes\n",
        "averaged weights  top-1",
    ):
        assert said.count(words) == 1
    (tmp_path / "empty" / "bee").mkdir(parents=True)
    (tmp_path / "fewer" / "bee").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "fewer" / "bee" / "1.png")
    (tmp_path / "hollow").mkdir()
    for name in ("bee", "cat"):
        (tmp_path / "hollow" / name).mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "hollow" / "bee" / "1.png")
    for changes, message in (
        ([], "run.evaluate_every is set and there are no test images: pass --data.test"),
        (["--data.path", ""], "pass --data.path with a folder of classes"),
        (["--data.test", str(tmp_path / "empty")], "no images under"),
        (["--data.path", str(tmp_path / "fewer")], "has one class, bee, and one class teaches"),
        (["--data.path", str(photographs)], f"not like classes: pass {test} or {train}"),
        (["--data.test", str(photographs)], f"not like classes: pass {test} or {train}"),
        (["--data.test", str(tmp_path / "hollow")], "no images in the class 'cat'"),
        (["--data.test", str(tmp_path / "fewer")], "only one has galaxies, lemurs: give folders"),
        (["--data.test", test, "--model.num_classes", "4"], "pass --model.num_classes 3"),
        (["--data.test", test, "--model.img_size", "33"], "do not divide into patches"),
        (
            ["--data.test", test, "--init", "no/such", "--run.output", f"{tmp_path}/new"],
            "there are no weights at no/such",
        ),
        (
            ["--data.test", test, "--layer_decay", "0"],
            "--layer_decay is 0.0: give a finite",
        ),
    ):
        assert main([*arguments, *changes]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
