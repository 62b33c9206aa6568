"""What an earlier version wrote is read, converted and continued as that version did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beit_fast import BeitForImageClassification, BeitForMaskedImageModeling, from_pretrained
from beit_fast.cli import main
from beit_fast.tasks.drop_path import DropPathDraws
from beit_fast.train.state import checkpoint_paths

WRITTEN = Path(__file__).parent / "written_before"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A copy to continue in, with the working directory there: configurations name its files."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


@pytest.fixture
def drawn_as_then(monkeypatch):
    """Drop path as the blocks draw it, from the generator of step and rank: since it is drawn by
    sample the numbers are others, and all else is compared."""
    monkeypatch.setattr(DropPathDraws, "added_to", lambda self, batches, start: batches)


def metrics_of(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_steps(run: Path, expected: list[dict[str, float]]) -> None:
    steps = {line["step"]: line for line in metrics_of(run)}
    for wanted in expected:
        got = steps[wanted["step"]]
        for name in wanted:
            assert got[name] == pytest.approx(wanted[name], rel=1e-4), (wanted["step"], name)


@pytest.mark.promise("R26")
def test_a_pretraining_goes_on_as_it_did(written, drawn_as_then):
    assert main(["pretrain", "digits", "--config", "pretrain.yaml", "--run.steps", "6"]) == 0
    assert_steps(written / "pretrained", EXPECTED["pretrain"])


def test_a_pretraining_goes_on_with_what_is_drawn_by_sample(written, capsys):
    assert main(["pretrain", "digits", "--config", "pretrain.yaml", "--run.steps", "5"]) == 0
    assert "run.loss_mean was 'rank', is 'global'" in capsys.readouterr().out
    before, now = EXPECTED["pretrain"][0], metrics_of(written / "pretrained")[-1]
    assert now["loss"] == pytest.approx(before["loss"], rel=0.05)
    assert now["loss"] != before["loss"]


@pytest.mark.promise("R26")
def test_a_pretraining_of_format_2_goes_on_as_it_did(written):
    command = ["pretrain", "digits", "--config", "format_2/pretrain.yaml", "--run.steps", "6"]
    assert main(command) == 0
    assert_steps(written / "format_2" / "run", EXPECTED["format_2"])


@pytest.mark.promise("R26")
def test_both_formats_are_there_and_a_newer_one_is_refused_by_its_number(written, capsys):
    runs = {1: (written / "pretrained", "pretrain.yaml")}
    runs[2] = written / "format_2" / "run", "format_2/pretrain.yaml"
    for version, (run, config) in runs.items():
        path = checkpoint_paths(run)[-1] / "manifest.json"
        manifest = json.loads(path.read_text())
        assert manifest["format"] == version
        path.write_text(json.dumps(manifest | {"format": 3}))
        said = f"{path.relative_to(written)} has checkpoint format 3, this version reads 1 to 2"
        for command in (
            ["pretrain", "digits", "--config", config, "--run.steps", "6"],
            ["convert", str(run.relative_to(written)), "out.pth", "--to", "unilm"],
        ):
            assert main(command) == 1
            assert said in capsys.readouterr().err


def test_a_finetuning_goes_on_as_it_did(written):
    assert main(["finetune", "digits", "--config", "finetune.yaml", "--run.steps", "6"]) == 0
    assert_steps(written / "finetuned", EXPECTED["finetune"])


@pytest.mark.promise("R26")
def test_a_token_cache_is_read_as_it_was(written, drawn_as_then):
    command = ["pretrain", "digits", "--config", "pretrain.yaml", "--run.steps", "3"]
    command += ["--run.output", "fresh", "--token_cache", "tokens", "--tokenizer_training", "null"]
    assert main(command) == 0
    assert_steps(written / "fresh", EXPECTED["from_cache"])


def test_weights_convert_to_the_same_bytes(written):
    assert main(["convert", "pretrained", "again_hf", "--to", "hf"]) == 0
    assert main(["convert", "finetuned", "again.safetensors", "--to", "timm"]) == 0
    pairs = [
        ("as_hf/model.safetensors", "again_hf/model.safetensors"),
        ("classifier_timm.safetensors", "again.safetensors"),
    ]
    for before, now in pairs:
        assert_same_tensors(written / before, written / now)
    configs = [
        json.loads((written / folder / "config.json").read_text())
        for folder in ("as_hf", "again_hf")
    ]
    assert configs[0] == configs[1]


def assert_same_tensors(before: Path, now: Path) -> None:
    before, now = load_file(before), load_file(now)
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)


@pytest.mark.promise("R26")
def test_models_are_made_of_them():
    images = torch.zeros(2, 3, 16, 16)
    classifier = from_pretrained(WRITTEN / "finetuned", BeitForImageClassification)
    same = from_pretrained(WRITTEN / "classifier_timm.safetensors", BeitForImageClassification)
    torch.testing.assert_close(classifier(images), same(images))
    model = from_pretrained(WRITTEN / "pretrained", BeitForMaskedImageModeling)
    same = from_pretrained(WRITTEN / "as_hf", BeitForMaskedImageModeling)
    torch.testing.assert_close(model.forward_features(images), same.forward_features(images))
    model = from_pretrained(WRITTEN / "format_2" / "run", BeitForMaskedImageModeling)
    same = from_pretrained(WRITTEN / "format_2" / "unilm.safetensors", BeitForMaskedImageModeling)
    assert torch.equal(model.forward_features(images), same.forward_features(images))


def test_a_classifier_is_as_right_as_it_was(written):
    command = ["evaluate", "finetuned", "images", "--output", "evaluation.json"]
    assert main([*command, "--precision", "fp32", "--crop_pct", "1"]) == 0
    now = json.loads((written / "evaluation.json").read_text())
    before = json.loads((written / "finetuned" / "result.json").read_text())["raw"]
    assert now["top1"] == before["top1"]
    assert now["loss"] == pytest.approx(before["loss"], rel=1e-4)
