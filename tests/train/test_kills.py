"""kill -9 at any moment: what was complete is loadable, and the run goes on from it bit-equal."""

import json
import subprocess
import sys

import pytest

from beit_fast.train.state import load_newest
from task_runs import SUPPORT, assert_the_same_run, steps_of


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of the runs, and what became of each."""
    output = tmp_path_factory.mktemp("killed")
    script = SUPPORT / "killed_saves.py"
    done = subprocess.run(
        [sys.executable, str(script), str(output), "20"],
        check=True,
        timeout=600,
        capture_output=True,
        text=True,
    )
    return output, json.loads(done.stdout)


def test_runs_killed_at_each_step_of_a_save_and_at_random_end_as_the_undisturbed_one(killed):
    output, results = killed
    assert results["whole"]["ended"] == "exit 0"
    runs = {name: run for name, run in results.items() if "again" in run}
    assert len(runs) == 14
    for name, run in runs.items():
        assert run["ended"] == "killed", name  # the fault fired
        assert run["again"] == "exit 0", name
        assert_the_same_run(output / "whole", output / name)
        assert steps_of(output / name) == [10, 12]
        assert not run["rests"], name


def test_a_save_that_is_killed_leaves_those_before_it(killed):
    _, results = killed
    steps = {n: [int(p[5:]) for p in run["kept"]] for n, run in results.items() if "kept" in run}
    unfinished = ("before_it_writes", "half_a_file", "before_the_manifest", "before_the_rename")
    assert all(steps[name] == [2, 4] for name in unfinished)
    assert steps["after_the_rename"] == [2, 4, 6]
    assert steps["while_it_deletes"] == [4, 6]  # half of the oldest does not count as one


def test_an_interpreter_that_ends_while_one_is_written_ends_after_it(killed):
    output, results = killed
    assert results["left"]["ended"] == "exit 0"
    assert load_newest(output / "left").step == 1
