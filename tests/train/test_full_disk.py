"""A disk that is full: what was saved stays, training goes on while it may, one line says it."""

import logging
import os
import re
import signal
import sys

import pytest

from beit_fast import cli
from beit_fast.train import saving
from beit_fast.train.stop import Interrupted
from faults import FULL_AT, Injector, fired
from killed_saves import fork
from task_runs import assert_the_same_run, steps_of
from toy import ToyTask, train_toy

pytestmark = pytest.mark.promise("R7")


class Disk:
    """The toy with a counter of 400 kB, whose files may grow no more from some step on."""

    def __init__(self, output, fault):
        output.mkdir()
        self.output, self.injector = output, Injector(output, [fault])

    def run(self, **changes):
        task = ToyTask()
        task.counters["large"] = task.counters["seen"].repeat(50_000)
        task.on_step = lambda step: self.injector.meet("step", step + 1)
        options = {"save_every": 2, "log_every": 1, "keep": 9, "save_async": False}
        train_toy(self.output, task, **options | changes)


def of_a_child(run):
    """Exit code and stderr of the command that runs it, in a fork: its files are limited alone."""
    reading, writing = os.pipe()

    def command():
        os.dup2(writing, 2)
        sys.stderr, sys.stdout = os.fdopen(2, "w"), os.fdopen(1, "w")  # not pytest's
        logging.root.handlers.clear()
        cli.WITHOUT_RECIPE["toy"] = (lambda arguments: None, lambda: lambda config: run())
        raise_code(cli.main(["toy"]))

    def raise_code(code):
        sys.stderr.flush()
        os._exit(code)

    pid = fork(command)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


@pytest.mark.parametrize("size", FULL_AT)
def test_a_disk_that_is_full_from_some_byte_on_leaves_what_was_saved(tmp_path, size):
    disk = Disk(tmp_path / "run", f"0:5:full_at_{size}")
    code, said = of_a_child(disk.run)
    assert code == 1
    assert fired(disk.output) == {f"0:5:full_at_{size}": 1}
    lines = said.splitlines()
    folder = re.escape(str(disk.output))
    assert re.fullmatch(
        rf"beit-fast: checkpoint of step 6 not written to {folder}/checkpoints \(\d+ MiB free\): .*"
        r"File too large.*",
        lines[-1],
    )
    # Metrics of four steps have 600 bytes or so.
    assert len(lines) == {100: 3, 1_000: 2}.get(size, 1), said
    for line in lines[:-1]:
        assert re.fullmatch(
            rf"WARNING the log failed, and training goes on: OSError: {folder}/"
            r"(metrics\.jsonl|tensorboard/events\S*): File too large \(\d+ MiB free\): make room",
            line,
        )
    assert steps_of(disk.output) == [2, 4]
    assert not list((disk.output / "checkpoints").glob(".*"))
    if size == FULL_AT[0]:
        disk.run()  # there is room again
        assert steps_of(disk.output) == [2, 4, 6, 8, 10, 12]


def test_a_strict_run_ends_where_its_log_cannot_be_written(tmp_path):
    disk = Disk(tmp_path / "run", "0:5:full_at_100")
    code, said = of_a_child(lambda: disk.run(strict=True))
    assert code == 1
    assert fired(disk.output) == {"0:5:full_at_100": 1}
    assert re.fullmatch(
        r"beit-fast: \S+/metrics\.jsonl: File too large \(\d+ MiB free\): make room\n", said
    )


@pytest.fixture
def saves_that_fail(tmp_path, monkeypatch):
    """`saves_that_fail(*faults)`: the injector that each save of a run in `tmp_path` meets."""
    write = saving.save_checkpoint

    def plant(*faults):
        injector = Injector(tmp_path, faults)

        def save(output, step, *args, **more):
            if output == tmp_path:
                injector.meet("save", step)
            return write(output, step, *args, **more)

        monkeypatch.setattr(saving, "save_checkpoint", save)
        return dict.fromkeys(faults, 1)

    return plant


@pytest.mark.parametrize("beside", [True, False])
def test_so_many_failed_saves_in_a_row_are_borne_and_counted_anew_after_one_that_succeeds(
    tmp_path, run_toy, saves_that_fail, caplog, tmp_path_factory, beside
):
    planted = saves_that_fail("0:2:full_disk", "0:4:full_disk", "0:8:full_disk", "0:10:full_disk")
    run_toy(tmp_path, save_every=2, keep=9, failed_saves=2, save_async=beside)
    assert fired(tmp_path) == planted
    assert steps_of(tmp_path) == [6, 12]
    told = [r.getMessage() for r in caplog.records if "--run.failed_saves" in r.getMessage()]
    for line, step, number in zip(told, (2, 4, 8, 10), (1, 2, 1, 2), strict=True):
        assert f"checkpoint of step {step}" in line or "No space left on device" in line
        assert line.endswith(
            f"Training goes on: {number} of the 2 in a row that --run.failed_saves bears"
        )
    run_toy(tmp_path_factory.mktemp("whole"), save_every=2, keep=9)
    assert_the_same_run(tmp_path, tmp_path_factory.getbasetemp() / "whole0")


def test_one_more_than_is_borne_ends_the_run(tmp_path, run_toy, toy_task, saves_that_fail):
    planted = saves_that_fail("0:2:full_disk", "0:4:full_disk", "0:6:full_disk")
    with pytest.raises(OSError, match="No space left"):
        run_toy(tmp_path, toy_task(), save_every=2, failed_saves=2, save_async=False)
    assert fired(tmp_path) == planted
    assert steps_of(tmp_path) == []


@pytest.mark.promise("R8")
def test_an_error_that_is_no_disks_is_not_borne(tmp_path, run_toy, saves_that_fail):
    planted = saves_that_fail("0:2:bug")
    with pytest.raises(ZeroDivisionError):
        run_toy(tmp_path, save_every=2, failed_saves=9)
    assert fired(tmp_path) == planted


def test_the_last_save_of_a_run_has_to_succeed(tmp_path, run_toy, saves_that_fail):
    planted = saves_that_fail("0:12:full_disk")
    with pytest.raises(OSError, match="No space left"):
        run_toy(tmp_path, save_every=6, failed_saves=9)
    assert fired(tmp_path) == planted
    assert steps_of(tmp_path) == [6]
    run_toy(tmp_path, save_every=6, failed_saves=9)
    assert steps_of(tmp_path) == [6, 12]


@pytest.mark.promise("R10")
def test_a_stop_saves_again_what_could_not_be_saved_and_else_does_not_save_twice(
    tmp_path, run_toy, toy_task, saves_that_fail, monkeypatch
):
    planted = saves_that_fail("0:6:full_disk")
    task = toy_task()
    task.on_step = lambda step: step == 5 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="after step 6; the checkpoint is saved"):
        run_toy(tmp_path, task, save_every=6, failed_saves=1)
    assert fired(tmp_path) == planted
    assert steps_of(tmp_path) == [6]

    saved = []
    monkeypatch.setattr(saving, "save_checkpoint", lambda output, step, *a, **k: saved.append(step))
    task.on_step = lambda step: step == 8 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="after step 9"):
        run_toy(tmp_path, task, save_every=3)
    assert saved == [9]
