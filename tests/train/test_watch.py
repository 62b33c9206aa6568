"""What the watch says, when it ends a run, and when it lets it be."""

import time
from dataclasses import replace

import pytest
import torch

from beit_fast.checks import FieldError
from beit_fast.train import progress, watch
from beit_fast.train.config import RunConfig
from beit_fast.train.progress import Note, begin_stage, note, tick, unhurried
from beit_fast.train.stop import heed_stop
from beit_fast.train.watch import Clock, Seen, Watch, standing_still
from beit_fast.train.world import World

pytestmark = pytest.mark.promise("R19")

AT_WORK = Seen("waiting for a batch", 7, order=1, waits=False, left=0.0)
WAITING = Seen("in the backward pass", 7, order=4, waits=True, left=0.0)


@pytest.mark.parametrize(
    ("ranks", "said", "blamed"),
    [
        (
            {0: WAITING, 1: AT_WORK, 2: WAITING},
            "at step 7: rank 1 is waiting for a batch, and ranks 0, 2 wait for it",
            [1],
        ),
        (  # a rank that is still one step behind, and says so
            {0: WAITING, 1: replace(AT_WORK, step=6), 2: WAITING, 3: WAITING},
            "at step 6: rank 1 is waiting for a batch, and ranks 0, 2-3 wait for it",
            [1],
        ),
        (  # all wait: whoever has come least far
            {0: WAITING, 1: replace(WAITING, place="saving", order=2)},
            "at step 7: rank 1 is saving, and rank 0 waits for it",
            [1],
        ),
        ({0: WAITING, 1: WAITING}, "at step 7: ranks 0-1 are in the backward pass", [0, 1]),
        (
            {0: WAITING, 1: replace(WAITING, alive=False, step=5)},
            "at step 7: rank 1 gives no sign any more, last seen in the backward pass of step 5: "
            "it is dead, cut off, or stuck, and rank 0 waits for it",
            [1],
        ),
        ({0: WAITING, 1: replace(AT_WORK, gone=True)}, "at step 7: rank 1 has ended, and", [1]),
        (
            {0: Seen("starting", None, 0, False, 0.0)},
            "no progress for 5 s: rank 0 is starting",
            [0],
        ),
    ],
)
def test_it_names_whom_the_others_wait_for(ranks, said, blamed):
    line, who = standing_still(ranks, 5.0)
    assert said in line
    assert line.startswith("no progress for 5 s")
    assert who == blamed


@pytest.fixture
def fresh(monkeypatch):
    """The notes of a process that begins, and a watch that looks often."""
    for name, value in vars(Note()).items():
        monkeypatch.setattr(note, name, value)
    monkeypatch.setattr(watch, "BEAT", 0.05)


def test_the_clock_has_the_time_out_of_the_start_until_the_first_step_is_done(fresh):
    clock = Clock(note, timeout=1.0, startup_timeout=9.0)
    assert clock.limit == 9.0
    progress.progress("waiting for a batch", 41)  # the first step of a run that was resumed
    progress.progress("in the forward pass")
    assert clock.limit == 9.0
    progress.progress("waiting for a batch", 42)
    assert clock.limit == 1.0
    with unhurried("saving a checkpoint"):
        assert clock.limit == 9.0
    assert clock.limit == 1.0
    begin_stage("preparing the training of BEiT")  # after its tokenizer's
    assert clock.limit == 9.0


@pytest.mark.parametrize("name", ["timeout", "startup_timeout"])
def test_time_outs_are_such_as_timers_take(name):
    longest = 2_592_000  # of the refusal's own words
    with pytest.raises(FieldError, match=f"above 0 and at most {longest}"):
        RunConfig(output="runs/t", steps=1, **{name: longest + 1})
    RunConfig(output="runs/t", steps=1, **{name: longest})
    watch.faulthandler.dump_traceback_later(longest + watch.AFTER, exit=True)
    watch.faulthandler.cancel_dump_traceback_later()


def test_parts_of_long_work_and_time_that_the_process_had_not_do_not_count(fresh, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    clock = Clock(note, 1.0, 1.0)
    tick()
    clock.read()
    now[0] += 0.5
    assert clock.read() == 0.5
    heed_stop("while evaluating")
    assert clock.read() == 0.0
    now[0] += 3600.0  # Ctrl-Z, and fg after an hour
    assert clock.read() == watch.LONGEST_BEAT


@pytest.fixture
def alone(fresh, tmp_path):
    """`alone(timeout)`: a world of one process whose end is noted instead of met."""
    ends, watches = [], []

    def alone(timeout: float) -> World:
        limits = {"timeout": timeout, "startup_timeout": timeout}
        watched = Watch(None, 0, **limits, advice="Look.", end=ends.append)
        watches.append(watched)
        watched.start()
        return World(0, 1, torch.device("cpu"), watch=watched)

    yield alone, ends
    for watched in watches:
        watched.close()
    watch.faulthandler.cancel_dump_traceback_later()


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.promise("S10", "R19")
def test_a_loader_that_hangs_ends_one_process_too(alone, run_toy, toy_task, tmp_path):
    open_alone, ends = alone

    class Hanging(toy_task):
        def batches(self, start):
            for number, batch in enumerate(super().batches(start), start + 1):
                if number == 7:
                    until(lambda: ends)
                    raise ConnectionError("what the test is ended by")
                yield batch

    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / "run" / "stacks_rank0.txt").symlink_to(tmp_path / "precious")
    world = open_alone(0.5)
    with pytest.raises(ConnectionError):
        run_toy(tmp_path / "run", Hanging(dropout=0.0), world, accumulate=1)
    stacks = tmp_path / "run" / "stacks_rank0.txt"
    assert ends[0] == (
        "no progress for 0.5 s at step 7: this process is waiting for a batch. "
        f"Stacks: {stacks}. Look."
    )
    assert "in until\n" in stacks.read_text()
    assert (tmp_path / "precious").read_text() == "as it was"


def test_outside_of_training_one_process_may_take_its_time(alone):
    open_alone, ends = alone
    world = open_alone(0.2)
    time.sleep(0.8)
    assert not ends
    with world.watching("preparing", world.watch.folder):
        until(lambda: ends)
    (world.watch.folder / "stacks_rank0.txt").unlink()


def test_a_step_that_is_slow_by_parts_goes_on(alone, run_toy, toy_task, tmp_path):
    open_alone, ends = alone

    def work(step: int) -> None:
        if step == 3:
            for _ in range(20):
                time.sleep(0.06)
                heed_stop("while working")

    task = toy_task(dropout=0.0)
    task.on_step = work
    run_toy(tmp_path / "run", task, open_alone(0.6), accumulate=1)
    assert not ends


def test_a_watch_that_is_closed_ends_nothing(alone):
    open_alone, ends = alone
    world = open_alone(0.2)
    world.watch.armed = True
    world.watch.close()
    time.sleep(0.6)
    assert not ends
