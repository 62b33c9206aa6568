"""`beit-fast replay`: the run's losses again, where a step goes bad, and nothing written."""

import hashlib
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from beit_fast import cli
from beit_fast.cli import VERBS, main, parse, parse_replay
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.train.bad_steps import read_record, record_path
from beit_fast.train.kept_config import CONFIG
from beit_fast.train.log import read_metrics
from faults import fired
from masked_images import write_pairs
from replayed_ranks import spoiling
from task_runs import SUPPORT, TWO_RANKS
from tiny_commands import VERBS as TRAINED
from tiny_commands import tiny_command

SPOILED = 5  # the image


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 8)


@pytest.fixture(scope="module")
def commands(image_folder, tokenizer_file, pairs):
    """`commands(verb, output, ranks)`: arguments of a tiny run, of as many images on any number."""
    files = {"images": image_folder, "tokenizer": tokenizer_file, "pairs": pairs}
    return lambda verb, output, ranks=1: tiny_command(verb, output, batch_size=4 // ranks, **files)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, commands):
    """One of each task, on one process."""
    folder = tmp_path_factory.mktemp("runs")
    for verb in TRAINED:
        assert main(commands(verb, folder / verb)) == 0
    return folder


@pytest.fixture(scope="module")
def runs_of_two(tmp_path_factory, commands):
    """The same on two ranks, and a pre-training `spoiled` by an image."""
    folder = tmp_path_factory.mktemp("ranks")
    planned = [(commands(verb, folder / verb, 2), None) for verb in TRAINED]
    planned.append((commands("pretrain", folder / "spoiled", 2), SPOILED))
    made = []
    for (verb, recipe, *flags), sample in planned:
        config = parse(verb, recipe, VERBS[verb][0][recipe], flags)
        made.append((config, sample, folder))
    (folder / "made").write_bytes(pickle.dumps(made))
    command = [*TWO_RANKS, str(SUPPORT / "replayed_ranks.py"), str(folder / "made")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def replayed(run: Path, step: int, *flags: str) -> dict:
    """What a replay writes, which changes nothing in the run's folder."""
    before, file = contents(run), run.parent / "found.json"
    assert main(["replay", str(run), str(step), "--json", str(file), *flags]) == 0
    assert contents(run) == before
    return json.loads(file.read_text())


def logged(run: Path, step: int) -> dict:
    return next(line for line in read_metrics(run / "metrics.jsonl") if line["step"] == step)


@pytest.mark.parametrize("verb", TRAINED)
def test_a_step_of_one_process_is_the_runs_to_the_last_bit(runs, verb, capsys):
    for step, begins in ((4, "step_00000002"), (2, "the run's beginning")):
        found = replayed(runs / verb, step)
        line = logged(runs / verb, step)
        assert found["finite"]
        assert (found["loss"], found["grad_norm"]) == (line["loss"], line["grad_norm"])
        assert found["checkpoint"].endswith(begins)
        assert len(found["micro_batches"]) == 2
        said = capsys.readouterr().out
        assert "the step is finite here, with loss and norm of then to the last bit" in said


@pytest.mark.parametrize("verb", TRAINED)
def test_a_step_of_two_ranks_is_replayed_on_one_process(runs_of_two, verb):
    found = replayed(runs_of_two / verb, 4)
    line = logged(runs_of_two / verb, 4)
    assert found["loss"] == pytest.approx(line["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
    ranks = [batch["rank"] for batch in found["micro_batches"]]
    assert ranks == ([None] * 2 if verb == "segment" else [0, 0, 1, 1])
    assert len({tuple(batch["samples"]) for batch in found["micro_batches"]}) == len(ranks)


def test_a_step_of_a_run_that_went_on_split_otherwise_is_replayed_as_its_checkpoint_says(
    runs_of_two, commands, tmp_path
):
    """Two ranks with 2 x 2 images became one with 2 x 4, which the kept configuration has."""
    run = tmp_path / "pretrain"
    shutil.copytree(runs_of_two / "pretrain", run)
    assert main([*commands("pretrain", run), "--run.steps", "5"]) == 0
    found = replayed(run, 5)
    assert found["checkpoint"].endswith("step_00000004")
    assert [batch["rank"] for batch in found["micro_batches"]] == [0, 0, 1, 1]
    assert found["loss"] == pytest.approx(logged(run, 5)["loss"], rel=1e-5)


def test_the_image_that_overflows_on_a_rank_is_found_on_one_process(
    runs_of_two, monkeypatch, capsys
):
    run = runs_of_two / "spoiled"
    assert fired(runs_of_two)[f"0:{SPOILED}:huge"]
    records = [read_record(path) for path in sorted(record_path(run, 1).parent.iterdir())]
    record = records[-1]
    bad = [rank for rank, of in enumerate(record["ranks"]) if of["loss"] == "nan"]
    build = PretrainTask.__init__

    def spoiled(self, *args):
        build(self, *args)
        self.prepare = spoiling(self.prepare, runs_of_two, SPOILED, "patches")

    monkeypatch.setattr(PretrainTask, "__init__", spoiled)
    found = replayed(run, record["step"])
    assert not found["finite"]
    batch = found["micro_batches"][found["found_in"]]
    assert SPOILED in batch["samples"]
    assert batch["rank"] in bad
    theirs = record["ranks"][batch["rank"]]["micro_batches"][batch["micro_batch"]]
    assert (theirs["samples"], theirs["files"]) == (batch["samples"], batch["files"])
    assert not found["found"]["backward"]
    assert found["found"]["module"].startswith("blocks.0")
    said = capsys.readouterr().out
    assert "first in the forward pass: the output" in said
    assert f"micro-batch {batch['micro_batch']} of rank {batch['rank']}" in said


def test_a_spike_is_replayed_with_what_the_file_says_of_it(runs, commands, tmp_path, capsys):
    """A step that was finite, and skipped."""
    run = tmp_path / "run"
    shutil.copytree(runs / "pretrain", run)
    line = logged(run, 4)
    record = {"format": 1, "loss": line["loss"] * 1.5, "grad_norm": line["grad_norm"]}
    record |= {"why": "spike", "mean_before": 2.0, "deviation_before": 0.25}
    record_path(run, 4).parent.mkdir()
    record_path(run, 4).write_text(json.dumps(record))
    found = replayed(run, 4)
    assert found["differences"] == {"loss": pytest.approx(1 / 3), "grad_norm": 0.0}
    said = capsys.readouterr().out
    assert "see whether the images are the same" in said
    assert "it was skipped as a spike: losses before it were 2 +- 0.25" in said
    record_path(run, 4).write_text(json.dumps(record | {"loss": "nan"}))
    replayed(run, 4)
    assert "and was not then: see whether images, weights or machine" in capsys.readouterr().out


@pytest.mark.parametrize("verb", TRAINED)
def test_the_kept_configuration_is_the_one_that_was_given(runs, commands, verb, capsys):
    _, recipe, *flags = commands(verb, runs / verb)
    known = VERBS[verb][0]
    given = parse(verb, recipe, known[recipe], flags)
    for other in known:  # whatever the recipe
        kept = parse(verb, other, known[other], ["--config", str(runs / verb / CONFIG)])
        assert kept == given
    with pytest.raises(SystemExit):
        main([verb, recipe, *flags, "--print_config"])
    printed = runs / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert parse(verb, recipe, known[recipe], ["--config", str(printed)]) == given


def test_flags_of_the_run_change_what_is_replayed(runs, image_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(image_folder, moved)
    found = replayed(runs / "pretrain", 4, "--data.path", str(moved))
    assert found["loss"] == logged(runs / "pretrain", 4)["loss"]
    assert all(name.startswith(str(moved)) for name in found["micro_batches"][0]["files"])


def test_a_step_after_a_change_of_the_folder_is_replayed_over_both_lists(
    runs, commands, image_folder, tmp_path
):
    """From a checkpoint of before it, or where that is gone from the run's beginning: step 3 ends
    the old pass, and step 4 begins the new one."""
    run, grown = tmp_path / "pretrain", tmp_path / "grown"
    shutil.copytree(runs / "pretrain", run)
    shutil.rmtree(run / "checkpoints/step_00000004")
    shutil.copytree(image_folder, grown)
    shutil.copy(grown / "class_0/0.jpg", grown / "class_0/00.jpg")
    changed = ["--data.path", str(grown), "--run.resume_with", "[data.images]"]
    assert main([*commands("pretrain", run), *changed]) == 0
    assert logged(run, 4)["loss"] != logged(runs / "pretrain", 4)["loss"]
    for step in (3, 4):
        found = replayed(run, step)
        assert found["loss"] == logged(run, step)["loss"]
    shutil.rmtree(run / "checkpoints/step_00000002")
    for step in (3, 4):
        assert replayed(run, step)["loss"] == logged(run, step)["loss"]


def test_what_cannot_be_replayed_says_why(runs, tmp_path, image_folder, capsys):
    def refused(*arguments):
        assert main(["replay", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "step 99 of a run of 4: give one that it took" in refused(runs / "pretrain", 99)
    fewer = tmp_path / "fewer"
    shutil.copytree(image_folder, fewer)
    next(fewer.rglob("*.jpg")).unlink()
    said = refused(runs / "pretrain", 4, "--data.path", fewer)
    assert "not those of the run (1 image is gone (class_" in said
    assert "pass --data.path with the folder of then, or, where the run went on over these" in said
    said = refused(runs / "pretrain", 4, "--tokenizer", tmp_path / "gone.safetensors")
    assert "the run's tokenizer, is not there" in said
    other = tmp_path / "other"
    other.mkdir()
    (other / CONFIG).write_text("nothing: 1\n")
    assert "is no configuration of pretrain, tokenizer, finetune or segment" in refused(other, 1)


def test_a_run_without_a_kept_configuration_is_given_one(runs, commands, tmp_path, capsys):
    """As those of earlier versions."""
    run = tmp_path / "pretrain"
    shutil.copytree(runs / "pretrain", run)
    (run / CONFIG).unlink()
    assert main(["replay", str(run), "4"]) == 1
    assert f"--print_config > {run / CONFIG} is added" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*commands("pretrain", run), "--print_config"])
    (run / CONFIG).write_text(capsys.readouterr().out)
    assert replayed(run, 4)["loss"] == logged(run, 4)["loss"]


def test_arguments_in_any_order_are_sorted(runs):
    run = str(runs / "finetune")
    for words in (
        [run, "4", "--json", "x.json", "--ranks=2", "--data.num_threads", "3"],
        ["--data.num_threads", "3", "--ranks", "2", run, "--json=x.json", "4"],
    ):
        parsed = parse_replay(words)
        wanted = parsed.wanted
        assert (wanted.run, wanted.step, wanted.json, wanted.ranks) == (run, 4, "x.json", 2)
        assert (parsed.verb, parsed.config.data.num_threads) == ("finetune", 3)
    assert cli.WITHOUT_RECIPE["replay"][0] is parse_replay
