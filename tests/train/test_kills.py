"""kill -9 at any moment: what was complete is loadable, and the run goes on from it bit-equal."""

import json
import subprocess
import sys

import pytest

from beit_fast.train.state import load_newest
from faults import KILLED_SAVES
from task_runs import SUPPORT, assert_the_same_run, steps_of

SEED = 20  # of the kills at random moments
# At these moments of the third save, after step 6, its checkpoint is there.
COMPLETE = ("after_the_rename", "before_it_deletes", "half_deleted")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of the runs, and what became of each."""
    output = tmp_path_factory.mktemp("killed")
    script = SUPPORT / "killed_saves.py"
    done = subprocess.run(
        [sys.executable, str(script), str(output), str(SEED)],
        check=True,
        timeout=600,
        capture_output=True,
        text=True,
    )
    return output, json.loads(done.stdout)["runs"]


@pytest.mark.promise("R3", "R4", "R24")
def test_42_runs_killed_in_a_save_and_at_random_end_as_the_undisturbed_one(killed):
    output, results = killed
    assert results["whole"]["ended"] == "exit 0"
    runs = {name: run for name, run in results.items() if "again" in run}
    assert len(runs) == 2 * len(KILLED_SAVES) + 20 == 42
    for name, run in runs.items():
        assert run["ended"] == "killed", name
        assert run["fired"] == ({} if name.startswith("random") else {name: 1}), name
        assert run["bad_lines"] == [], name
        assert run["again"] == "exit 0", name
        assert_the_same_run(output / "whole", output / name)
        # Nothing is saved, and no old one deleted, where all steps were done.
        done = "step_00000012" in run["kept"]
        assert steps_of(output / name) == ([int(k[5:]) for k in run["kept"]] if done else [10, 12])
        assert not run["rests"], name


@pytest.mark.promise("R4", "R9")
def test_a_save_that_is_killed_leaves_those_before_it(killed):
    _, results = killed
    for save, before, after in ((3, [2, 4], [2, 4, 6]), (6, [8, 10], [8, 10, 12])):
        for place in KILLED_SAVES:
            kept = [int(name[5:]) for name in results[f"0:{save}:{place}"]["kept"]]
            if place == "half_deleted":  # half of the oldest does not count as one
                assert kept == after[1:], place
            else:
                assert kept == (after if place in COMPLETE else before), place


def test_an_interpreter_that_ends_while_one_is_written_ends_after_it(killed):
    output, results = killed
    assert results["left"]["ended"] == "exit 0"
    assert load_newest(output / "left").step == 1
