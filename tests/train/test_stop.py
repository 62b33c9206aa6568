"""Stop signals: noted, heeded in a wait that may never end, and lost at no moment of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from beit_fast.train.stop import Interrupted, StopFlag, heeded, stop_signals
from faults import Injector, fired
from stopped_ranks import STOPS
from task_runs import SUPPORT, assert_the_same_run, steps_of

pytestmark = pytest.mark.promise("R10", "R17")


def later(signum=signal.SIGTERM, seconds=0.2):
    """The signal comes to the main thread while it waits."""
    threading.Timer(seconds, os.kill, (os.getpid(), signum)).start()


def hung(*values):
    """The values, and then a wait without end. `hung.closed` once it is left."""
    hung.closed = False
    try:
        yield from values
        threading.Event().wait(60)
    finally:
        hung.closed = True


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_wait_for_a_value_and_not_that_it_interrupts_at_work(signum):
    with stop_signals() as stop:
        values = stop.until_told(hung(1, 2))
        assert next(values) == 1
        later(signum)
        began = time.monotonic()
        assert list(values) == [2]
        assert time.monotonic() - began < 10
        assert stop.received == signum
        assert hung.closed
    with stop_signals() as stop:
        os.kill(os.getpid(), signum)  # not in a wait: noted, and the next is not begun
        assert list(stop.until_told(hung())) == []


def test_values_and_errors_pass_and_an_end_is_an_end():
    def values():
        yield 1
        raise OSError("a disk")

    with stop_signals() as stop:
        assert list(stop.until_told(iter([0, None, 2]))) == [0, None, 2]
        passed = stop.until_told(values())
        assert next(passed) == 1
        with pytest.raises(OSError, match="a disk"):
            next(passed)
        left = stop.until_told(hung(1))
        next(left)
        left.close()
        assert hung.closed


def test_a_signal_at_any_instruction_of_a_wait_is_noted_and_passes_on_as_no_error():
    """Where Python looks for signals is its own affair: played before each instruction."""

    def told_at(number):
        flag, seen = StopFlag(), 0

        def trace(frame, event, arg):
            nonlocal seen
            frame.f_trace_opcodes = True
            if frame.f_code not in (StopFlag._next.__code__, StopFlag._wait_for.__code__):
                return None
            if event == "opcode":
                seen += 1
                if seen == number:
                    flag._handle(signal.SIGTERM, frame)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            got = flag._next(iter([7]))
        finally:
            sys.settrace(before)
        return flag, got, seen

    _, got, count = told_at(-1)
    assert got == [7]
    assert count > 10
    results = []
    for number in range(1, count + 1):
        flag, got, seen = told_at(number)
        assert seen >= number
        assert flag.received == signal.SIGTERM
        assert got in (None, [7])
        assert not flag._waits
        assert flag._next(iter([8])) is None
        results.append(got)
    assert results[0] is None
    assert results[-1] == [7]


def test_work_in_parts_is_left_in_its_wait():
    with stop_signals():
        later()
        with pytest.raises(Interrupted, match="SIGTERM while evaluating"):
            list(heeded(hung(1), "while evaluating"))
        assert hung.closed
    assert list(heeded(iter([1, 2]), "anywhere")) == [1, 2]


class WaitingTask:
    """What a task of the toy's needs to meet faults while it waits for a batch."""

    def __new__(cls, toy_task, injector):
        task = toy_task()
        batches = task.batches

        def meeting(start):
            for number, batch in enumerate(batches(start), start + 1):
                injector.meet("batch", number)
                yield batch

        task.batches = meeting
        return task


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_in_the_wait_for_a_batch_saves_the_step_before_and_goes_on_bit_equal(
    tmp_path, run_toy, toy_task, signum
):
    output = tmp_path / "parts"
    output.mkdir()
    task = WaitingTask(toy_task, Injector(output, ["0:8:wait"]))  # the second of step 4
    later(signum, 0.7)
    with pytest.raises(Interrupted, match=r"after step 3; the checkpoint is saved") as stop:
        run_toy(output, task)
    assert stop.value.exit_code == 128 + signum
    assert fired(output) == {"0:8:wait": 1}
    assert steps_of(output) == [3]
    run_toy(output)
    run_toy(tmp_path / "whole")
    assert_the_same_run(output, tmp_path / "whole")


def test_before_anything_is_trained_there_is_nothing_to_save(tmp_path, run_toy, toy_task):
    injector = Injector(tmp_path, ["0:1:wait", "0:7:wait"])
    later(seconds=0.7)
    with pytest.raises(Interrupted, match="before step 1; nothing was trained yet, and the same"):
        run_toy(tmp_path, WaitingTask(toy_task, injector))
    assert steps_of(tmp_path) == []
    run_toy(tmp_path, stop_at=3)
    later(seconds=0.7)
    with pytest.raises(Interrupted, match="before step 4; the checkpoint is saved"):
        run_toy(tmp_path, WaitingTask(toy_task, injector))
    assert steps_of(tmp_path) == [3]
    assert fired(tmp_path) == {"0:1:wait": 1, "0:7:wait": 1}
    run_toy(tmp_path)


def test_a_stop_comes_before_an_evaluation_and_a_picture_that_are_due(tmp_path, run_toy, toy_task):
    task = toy_task()
    task.evaluate = lambda model: pytest.fail("it was evaluated")
    task.picture = lambda model, path: pytest.fail("it was drawn")
    task.on_step = lambda step: step == 2 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM after step 3; the checkpoint is saved"):
        run_toy(tmp_path, task, evaluate_every=1.2, picture_every=3)
    assert steps_of(tmp_path) == [3]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of stopped_ranks.py, and what became of each run."""
    output = tmp_path_factory.mktemp("stopped")
    script = [sys.executable, str(SUPPORT / "stopped_ranks.py"), str(output)]
    done = subprocess.run(script, check=True, timeout=300, capture_output=True, text=True)
    return output, json.loads(done.stdout)


def test_two_ranks_stop_after_the_same_step_whoever_is_told_and_go_on_bit_equal(stopped):
    output, results = stopped
    after = {"before step 1": 0, "to rank 0": 2, "to rank 1": 4, "to both": 5, "to both, twice": 6}
    after |= {"in the wait of rank 1": 14, "to both, in the wait of rank 1": 16}
    for name, faults in STOPS.items():
        run = results[name]
        code, signum = (138, "SIGUSR1") if faults[0].endswith("usr1") else (143, "SIGTERM")
        assert run["codes"] == [code, code], name
        assert all(fired(output / "run")[fault] == 1 for fault in faults), name
        where = f"after step {after.get(name)}; the checkpoint is saved"
        if name == "in a save":  # which a thread writes beside the steps
            where = run["said"].partition("SIGTERM ")[2].strip()
            assert where in [f"after step {n}; the checkpoint is saved" for n in range(8, 15)]
        if name == "before step 1":
            where = "before step 1; nothing was trained yet, and the same command begins anew"
        assert run["said"] == f"beit-fast: stopped by {signum} {where}\n", name
    assert results["the rest"]["codes"] == [0, 0]
    assert_the_same_run(output / "run", output / "whole")


def test_a_process_is_gone_soon_after_its_signal(stopped):
    """A step, a save and a second are promised. Here both take hundredths of a second, and the
    limit is one that a busy machine keeps; the interpreter's own end took two to four."""
    output, results = stopped
    assert results["alone"]["codes"] == [143]
    assert fired(output / "alone") == {"0:5:term": 1}
    for name in (*STOPS, "alone"):
        assert 0 < results[name]["seconds"] < 5, name
