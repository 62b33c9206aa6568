"""beit-fast evaluate on a tiny run: what is printed, what is written, what is refused."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from beit_fast.cli import main
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.tasks.evaluate.config import EvaluateConfig
from beit_fast.tasks.evaluate.task import run_evaluation
from beit_fast.train.state import save_checkpoint
from beit_fast.weights.convert import convert
from labelled_images import FOUR_COLOURS, write_class_folders
from task_runs import TWO_RANKS, told_in_a_read
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier

ALONE = ["--device", "cpu", "--precision", "fp32", "--num_threads", "2"]


def evaluate(*arguments, output):
    assert main(["evaluate", *map(str, arguments), *ALONE, "--output", str(output)]) == 0
    return json.loads(Path(output).read_text())


def test_it_prints_the_worst_classes_and_writes_every_one(run_folder, folder, tmp_path, capsys):
    result = evaluate(run_folder, folder, output=tmp_path / "new" / "evaluation.json")
    said = capsys.readouterr().out
    assert [row["name"] for row in result["classes"]] == FOUR_COLOURS
    assert [row["images"] for row in result["classes"]] == [5, 5, 0, 5]
    assert result["classes"][2]["top1"] is None
    assert sum(row["correct"] for row in result["classes"]) == round(15 * result["top1"])
    assert result["top5"] == 1.0
    for words in (
        f"{folder}: 15 images, 3 classes",
        "1 of 4 classes have no folder: pink",
        "half statistics (of the run)",
        "top-1",
    ):
        assert words in said
    shares = [row["top1"] for row in result["classes"] if row["images"]]
    lines = [line.split("│")[1].split()[0] for line in said.splitlines() if line.startswith("│")]
    order = sorted(range(3), key=lambda i: shares[i])
    assert shares[order[0]] < shares[order[-1]]  # else there is no order to test
    assert [["red", "blue", "green"].index(line) for line in lines] == order
    assert result["checkpoint"].endswith("step_00000004")
    assert result["view"]["crop_pct"] == 0.875
    assert torch.__version__.startswith(result["environment"]["torch"])


def test_conversion_changes_no_count(run_folder, folder, tmp_path):
    wanted = evaluate(run_folder, folder, output=tmp_path / "run.json")
    for to, target in (("hf", "hf"), ("unilm", "unilm.pth"), ("timm", "timm.safetensors")):
        convert(run_folder, tmp_path / target, to=to)
        again = evaluate(tmp_path / target, folder, output=tmp_path / f"{to}.json")
        for name in ("top1", "top5", "loss", "classes"):
            assert again[name] == wanted[name]
    convert(run_folder, tmp_path / "timm.pth", to="timm")  # has no place for names
    assert main(["evaluate", str(tmp_path / "timm.pth"), str(folder), *ALONE]) == 1


def test_nothing_is_converted_onto_a_run(run_folder, tmp_path):
    (own,) = (run_folder / "checkpoints").glob("*/model.safetensors")
    before = own.read_bytes()
    for target, to in ((own, "unilm"), (own.parent, "hf"), (run_folder, "hf")):
        with pytest.raises(ValueError, match="is of a run, whose checkpoints stay"):
            convert(run_folder, target, to=to, overwrite=True)
    assert own.read_bytes() == before
    convert(run_folder, own.parent / "unilm.safetensors", to="unilm")  # beside them, it may
    (own.parent / "unilm.safetensors").unlink()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text("{}")  # of something else
    convert(run_folder, tmp_path / "site", to="hf")


def test_an_order_can_be_forced_and_changes_what_counts(run_folder, folder, tmp_path, capsys):
    three = replace(TINY_CLASSIFIER, num_classes=3)
    state = tiny_classifier(three).state_dict()
    settings = {"model": asdict(three), "statistics": "half", "classes": ["x", "y", "z"]}
    save_checkpoint(tmp_path, 1, {"model": state}, settings, keep=1)
    assert main(["evaluate", str(tmp_path), str(folder), *ALONE]) == 1
    assert "pass --match order" in capsys.readouterr().err
    result = evaluate(tmp_path, folder, "--match", "order", output=tmp_path / "order.json")
    assert [row["name"] for row in result["classes"]] == ["blue", "green", "red"]


def test_two_ranks_write_what_one_writes(run_folder, folder, tmp_path):
    alone = evaluate(run_folder, folder, output=tmp_path / "one.json")
    command = ["-m", "beit_fast.cli", "evaluate", str(run_folder), str(folder), *ALONE]
    done = subprocess.run(
        [*TWO_RANKS, *command, "--output", str(tmp_path / "two.json")],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["num_ranks"] == 2
    for name in ("num_images", "top1", "top5", "classes"):
        assert two[name] == alone[name]
    assert two["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert done.stdout.count("every class in") == 1  # one rank speaks


def test_an_output_that_cannot_be_written_is_said_before_evaluating(
    run_folder, folder, tmp_path, capsys, monkeypatch
):
    never = "beit_fast.tasks.evaluate.task.open_classifier"
    monkeypatch.setattr(never, lambda config: pytest.fail("it was evaluated"))
    command = ["evaluate", str(run_folder), str(folder), *ALONE, "--output"]
    assert main([*command, str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path} is a folder, and a file is to be written: pass --output" in said
    (tmp_path / "file").write_text("")
    assert main([*command, str(tmp_path / "file" / "x.json")]) == 1
    assert "give another --output" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command, said.split("--output ")[1].split(",")[0]]) == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_is_heeded_between_batches(
    run_folder, folder, tmp_path, capsys, monkeypatch, signum, code
):
    batches = []

    def stop(batch):
        batches.append(batch)
        os.kill(os.getpid(), signum)
        return batch

    monkeypatch.setattr(
        "beit_fast.tasks.evaluate.evaluation.ranks_of_labels", lambda logits, y: stop(y)
    )
    output = tmp_path / "result.json"
    command = ["evaluate", str(run_folder), str(folder), *ALONE, "--batch_size", "2"]
    assert main([*command, "--output", str(output)]) == code
    assert len(batches) == 1
    assert not output.exists()
    assert "while evaluating" in capsys.readouterr().err


@pytest.mark.promise("R17")
def test_a_stop_signal_is_heeded_in_the_wait_for_a_read(run_folder, folder):
    config = EvaluateConfig(
        checkpoint=str(run_folder), folder=str(folder), device="cpu", num_threads=2
    )
    with told_in_a_read(ImageFolder, 5):
        run_evaluation(config)


def test_classes_with_any_name_are_printed_as_they_are(run_folder, folder, tmp_path, monkeypatch):
    names = [b"[red]", b"bl\xfce", b":smile:", "grün".encode()]
    classes = os.fsencode(tmp_path) + b"/[b]"
    for name in names:
        place = os.path.join(classes, name)
        shutil.copytree(folder / "red", os.fsdecode(place))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    output = f"{tmp_path}/[i].json"
    arguments = ["evaluate", str(run_folder), os.fsdecode(classes), "--match", "order"]
    assert main([*arguments, *ALONE, "--output", output]) == 0
    stdout.flush()
    said = stdout.buffer.getvalue()
    assert f"every class in {output}".encode() in said
    said_names = [row["name"] for row in json.loads(Path(output).read_text())["classes"]]
    assert sorted(map(os.fsencode, said_names)) == sorted(names)


def test_scores_that_are_not_finite_are_no_hits_and_valid_json(folder, tmp_path, capsys):
    model = tiny_classifier(replace(TINY_CLASSIFIER, num_classes=3))
    torch.nn.init.constant_(model.fc_norm.weight, 3e38)  # scores overflow
    torch.save({"model": model.state_dict()}, tmp_path / "nan.pth")
    result = evaluate(tmp_path / "nan.pth", folder, output=tmp_path / "nan.json")
    assert (result["top1"], result["loss"]) == (0.0, None)
    assert "NaN" not in (tmp_path / "nan.json").read_text()
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "ema"], "no average of the weights: pass --weights model"),
        (["--img_size", "20"], "20x20 pixels do not divide"),
        (["--crop_pct", "1.5"], "crop_pct is 1.5"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--match", "order"], "3 class folders and the checkpoint has 4 classes"),
    ],
)
def test_a_mistake_is_one_line(run_folder, folder, flags, message, tmp_path, capsys):
    output = ["--output", str(tmp_path / "e.json")]
    assert main(["evaluate", str(run_folder), str(folder), *ALONE, *output, *flags]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "e.json").exists()


def test_one_class_is_counted_and_links_are_followed_if_wanted(
    run_folder, folder, tmp_path, capsys
):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "red").symlink_to(folder / "red")
    result = evaluate(run_folder, tmp_path / "test", output=tmp_path / "one.json")
    assert [row["images"] for row in result["classes"]] == [5, 0, 0, 0]
    said = capsys.readouterr().out
    assert "5 images, 5 of them by links, 1 class\n" in said
    assert "one class: what is counted says nothing of" in said
    arguments = [str(run_folder), str(tmp_path / "test"), *ALONE, "--follow_links", "false"]
    assert main(["evaluate", *arguments]) == 1
    assert "or --follow_links true" in capsys.readouterr().err
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "val").symlink_to(folder)
    assert main(["evaluate", str(run_folder), str(tmp_path / "set"), *ALONE]) == 1
    assert f"pass {tmp_path / 'set' / 'val'}" in capsys.readouterr().err


def test_a_class_folder_without_images_is_named(run_folder, tmp_path, capsys):
    folder = write_class_folders(tmp_path / "test", 1, seed=0)
    (folder / "pink").mkdir()
    assert main(["evaluate", str(run_folder), str(folder), *ALONE]) == 1
    assert "no images in the class 'pink'" in capsys.readouterr().err


def test_a_run_is_evaluated_as_it_evaluated_itself_and_so_is_its_conversion(
    folder, tmp_path, capsys
):
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    flags = [f"--model.{name}={value}" for name, value in tiny.items()]
    flags += ["--init=null", "--statistics=imagenet", "--data.batch_size=5", "--optim.lr=1e-2"]
    flags += ["--run.epochs=2", "--optim.warmup_epochs=0", "--run.evaluate_every=null"]
    flags += ["--run.precision=fp32", "--run.device=cpu", f"--run.output={tmp_path / 'run'}"]
    folders = ["--data.path", str(folder), "--data.test", str(folder)]
    assert main(["finetune", "small_data", *folders, *flags]) == 0
    own = json.loads((tmp_path / "run" / "result.json").read_text())
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert "preprocessor_config.json" in capsys.readouterr().out
    for checkpoint, weights, wanted in (
        ("run", "model", own["raw"]),
        ("run", "ema", own["ema"]),
        ("hf", "model", own["raw"]),
    ):
        found = evaluate(
            tmp_path / checkpoint, folder, "--weights", weights, output=tmp_path / "e.json"
        )
        assert [found["top1"], found["top5"]] == [wanted["top1"], wanted["top5"]]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert [row["correct"] for row in found["classes"]] == wanted["correct_per_class"]
        assert [row["name"] for row in found["classes"]] == own["classes"]
    assert own["raw"]["loss"] != own["ema"]["loss"]
