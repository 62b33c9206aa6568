"""Checkpoints are written beside training: what is saved, how it fails, who waits for it."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from beit_fast.errors import RunError
from beit_fast.train import saving, state
from beit_fast.train.bad_steps import NonFiniteLoss
from beit_fast.train.saving import FAILED, Saver
from beit_fast.train.state import load_checkpoint, load_newest
from beit_fast.train.stop import WRITER, Interrupted
from beit_fast.train.world import World
from task_runs import ALONE, assert_the_same_run, steps_of


@pytest.fixture
def write(monkeypatch):
    """`write(before)`: from now on `before(step)` runs ahead of each checkpoint's writing."""
    real = saving.save_checkpoint

    def set_before(before):
        def save(output, step, *args, **more):
            before(step)
            return real(output, step, *args, **more)

        monkeypatch.setattr(saving, "save_checkpoint", save)

    return set_before


def writers():
    return [thread for thread in threading.enumerate() if thread.name == WRITER]


def full_disk(*_args, **_more):
    raise OSError(28, "No space left on device")


def test_what_is_saved_is_the_copy_whatever_is_trained_meanwhile(tmp_path, write):
    trained = threading.Event()
    write(lambda step: trained.wait(30))
    tensors = {
        "model": {
            "w": torch.randn(3, 5),
            "transposed": torch.randn(4, 6).T,
            "half": torch.randn(7).bfloat16(),
            "step": torch.tensor(3.0),
            "flags": torch.tensor([True, False]),
            "none": torch.zeros(0, 2),
        },
        "run": {"seen": torch.tensor(2, dtype=torch.int64)},
    }
    length = {"num_steps": 9, "warmup_steps": 0}
    with Saver(tmp_path, {"a": 1}, keep=3, world=ALONE, schedule=length) as saver:
        for step in (1, 2):
            trained.clear()
            wanted = {s: {n: v.clone() for n, v in vs.items()} for s, vs in tensors.items()}
            saver.save(step, tensors)
            for values in tensors.values():
                for value in values.values():
                    value.copy_(torch.ones_like(value) if step == 1 else torch.zeros_like(value))
            trained.set()
            saved = load_checkpoint(saver.wait()[-1])
            assert saved.step == step
            assert saved.manifest["schedule"] == length
            for stem, values in wanted.items():
                assert saved.tensors[stem].keys() == values.keys()
                for name, value in values.items():
                    assert saved.tensors[stem][name].dtype == value.dtype
                    assert torch.equal(saved.tensors[stem][name], value)


def test_the_second_copy_takes_the_memory_of_the_first():
    copy = saving.HostCopy(torch.device("cpu"))
    first, _ = copy.take({"model": {"w": torch.ones(1000)}})
    second, _ = copy.take({"model": {"w": torch.zeros(1000)}})
    assert first["model"]["w"].data_ptr() == second["model"]["w"].data_ptr()


class Cudart:
    """Notes what is pinned; `answer` is CUDA's error, 0 for none."""

    def __init__(self, answer=0):
        self.answer, self.pinned = answer, {}

    def cudaHostRegister(self, pointer, num_bytes, flags):
        self.pinned[pointer] = num_bytes
        return self.answer

    def cudaHostUnregister(self, pointer):
        del self.pinned[pointer]


def test_the_copy_of_a_gpus_tensors_is_pinned_and_given_back(monkeypatch):
    cudart, events = Cudart(), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Recorded(events))
    copy = saving.HostCopy(torch.device("cuda"))
    for size in (100, 90, 200):  # room for the second; a larger one is pinned anew
        copied, event = copy.take({"model": {"w": torch.full((size,), 2.0)}})
        assert torch.equal(copied["model"]["w"], torch.full((size,), 2.0))
        assert events[-1] is event
        room = {100: 448, 90: 448, 200: 832}[size]  # of 64 bytes each
        assert cudart.pinned == {copied["model"]["w"].data_ptr(): room}
    copy.close()
    assert not cudart.pinned


class Recorded:
    def __init__(self, events):
        self._events = events

    def record(self):
        self._events.append(self)


def test_memory_that_cannot_be_pinned_ends_the_run_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(answer=2))
    with pytest.raises(
        RunError, match=r"cannot be pinned \(CUDA error 2\): pass --run.save_async f"
    ):
        saving.HostCopy(torch.device("cuda")).take({"model": {"w": torch.ones(3)}})
    on_gpu = World(0, 1, torch.device("cuda"))
    with Saver(tmp_path, {}, keep=1, world=on_gpu, beside=False) as saver:
        saver.save(1, {"model": {"w": torch.ones(3)}})
    assert steps_of(tmp_path) == [1]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, run_toy, toy_task, write):
    task, seen = toy_task(), {}
    reached = threading.Event()
    task.on_step = lambda step: reached.set() if step == 7 else None
    # That of the fourth step is not written before the eighth is at work.
    write(lambda step: seen.setdefault(step, reached.wait(30)))
    run_toy(tmp_path / "beside", task, save_every=4)
    assert seen == {4: True, 8: True, 12: True}
    run_toy(tmp_path / "whole")
    assert_the_same_run(tmp_path / "beside", tmp_path / "whole")


def test_without_it_a_save_is_on_the_disk_before_the_next_step(tmp_path, run_toy, toy_task, write):
    task, threads, there = toy_task(), set(), {}
    write(lambda step: threads.add(threading.current_thread()) or time.sleep(0.05))
    task.on_step = lambda step: there.setdefault(step, steps_of(tmp_path / "waits"))
    run_toy(tmp_path / "waits", task, save_every=4, save_async=False)
    assert threads == {threading.main_thread()}
    assert (there[4], there[8]) == ([4], [4, 8])
    run_toy(tmp_path / "beside", save_every=4)
    assert_the_same_run(tmp_path / "waits", tmp_path / "beside")


def test_a_save_waits_for_the_one_before(tmp_path, run_toy, write):
    at_work, most = [], []

    def slow(step):
        at_work.append(step)
        most.append(len(writers()))
        time.sleep(0.05)
        assert at_work.pop() == step

    write(slow)
    run_toy(tmp_path, save_every=1, keep=12)
    assert most == [1] * 12
    assert steps_of(tmp_path) == list(range(1, 13))


@pytest.mark.promise("R7", "R8")
@pytest.mark.parametrize("beside", [True, False])
def test_a_failed_save_ends_the_run_at_the_next_step(
    tmp_path, run_toy, toy_task, monkeypatch, beside
):
    task, seventh = toy_task(), threading.Event()

    def on_step(step):
        if step == 6:
            seventh.set()
        for thread in writers():  # what it met is known at the end of the step
            thread.join()
        if step == 5:
            monkeypatch.setattr(state, "save_file", fill_disk)

    def fill_disk(*_args, **_more):
        assert seventh.wait(30 * beside) == beside
        full_disk()

    task.on_step = on_step
    with pytest.raises(OSError, match=r"step 6 not written .* MiB free.*No space left"):
        run_toy(tmp_path, task, save_every=3, save_async=beside)
    assert task.step == (6 if beside else 5)
    assert steps_of(tmp_path) == [3]
    assert load_newest(tmp_path).step == 3
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.promise("R7")
def test_a_file_that_grows_over_its_limit_ends_the_run_so_too(tmp_path, run_toy, toy_task):
    task, (soft, hard) = toy_task(), resource.getrlimit(resource.RLIMIT_FSIZE)
    task.counters["large"] = torch.zeros(100_000)

    def on_step(step):
        for thread in writers():
            thread.join()
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    task.on_step = on_step
    try:
        with pytest.raises(OSError, match=r"step 6 not written .* MiB free.*File too large"):
            run_toy(tmp_path, task, save_every=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_newest(tmp_path).step == 3


@pytest.mark.promise("R7", "R8")
@pytest.mark.parametrize("end", ["the last step", "a signal", "a bad loss"])
def test_a_run_that_ends_otherwise_says_that_its_last_save_failed(
    tmp_path, run_toy, toy_task, write, end
):
    write(lambda step: time.sleep(0.3) or full_disk())
    task = toy_task(bad_step=3 if end == "a bad loss" else None)
    if end == "a signal":
        task.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    with pytest.raises(OSError, match="No space left"):
        run_toy(tmp_path, task, save_every=12 if end == "the last step" else 3)


@pytest.mark.promise("R8")
def test_after_a_failed_save_none_is_written(tmp_path, monkeypatch):
    with Saver(tmp_path, {}, keep=3, world=ALONE) as saver, monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full_disk)
        saver.save(1, {"model": {"w": torch.ones(2)}})
        with pytest.raises(OSError, match="No space left"):
            saver.wait()
        patch.undo()
        saver.save(2, {"model": {"w": torch.ones(2)}})
        assert saver.failed == FAILED
        assert not writers()
    assert not steps_of(tmp_path)


@pytest.mark.promise("R8")
def test_an_error_of_another_kind_is_told_beside_that_of_a_save(tmp_path, run_toy, write, caplog):
    write(lambda step: time.sleep(0.3) or full_disk())
    with pytest.raises(RuntimeError, match="killed"):
        run_toy(tmp_path, killed_at=3, save_every=3)
    assert "No space left" in caplog.text


def test_a_bad_loss_names_the_checkpoint_that_was_being_written(tmp_path, run_toy, toy_task, write):
    write(lambda step: time.sleep(0.3))
    with pytest.raises(NonFiniteLoss, match=r"The last good checkpoint is .*step_00000006"):
        run_toy(tmp_path, toy_task(bad_step=6), save_every=6, log_every=1, bad_steps=1)


def test_what_ends_a_run_waits_for_what_is_being_written(tmp_path, run_toy, write):
    write(lambda step: time.sleep(0.3))
    with pytest.raises(RuntimeError, match="killed"):
        run_toy(tmp_path, killed_at=3, save_every=3)
    assert steps_of(tmp_path) == [3]
    assert not writers()


@pytest.mark.promise("R7")
def test_a_strict_evaluation_that_fails_leaves_what_was_trained(tmp_path, run_toy, toy_task, write):
    write(lambda step: time.sleep(0.3))
    task = toy_task()
    task.evaluate = lambda model: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_toy(tmp_path, task, evaluate_every=1.2, strict=True)
    assert steps_of(tmp_path) == [3]


def test_an_evaluation_runs_beside_the_writing_and_ends_after_it(
    tmp_path, run_toy, toy_task, write
):
    task, evaluating, seen = toy_task(), threading.Event(), {}
    task.evaluate = lambda model: evaluating.set() or {"one": 1.0}
    write(lambda step: seen.setdefault(step, evaluating.wait(30)) and time.sleep(0.3))
    task.on_step = lambda step: (
        seen.setdefault("at step 11", steps_of(tmp_path)) if step == 10 else 0
    )
    run_toy(tmp_path, task, evaluate_every=2.0, accumulate=1)  # after 10 steps of 4 images of 20
    assert seen == {10: True, "at step 11": [10], 12: True}


@pytest.mark.promise("R10")
def test_sigterm_while_one_is_written_ends_the_run_with_both_whole(
    tmp_path, run_toy, toy_task, write
):
    task = toy_task()
    write(lambda step: time.sleep(0.3))
    task.on_step = lambda step: writers() and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"SIGTERM after step 4; the checkpoint is saved"):
        run_toy(tmp_path / "parts", task, save_every=3)
    assert steps_of(tmp_path / "parts") == [3, 4]
    assert not writers()
    run_toy(tmp_path / "parts", save_every=3)
    run_toy(tmp_path / "whole")
    assert_the_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.promise("R11", "R23")
def test_a_second_ctrl_c_does_not_wait_and_the_folder_is_not_free_yet(
    tmp_path, run_toy, toy_task, write
):
    task, goes_on = toy_task(), threading.Event()
    write(lambda step: step == 6 and goes_on.wait(30))

    def on_step(step):
        if step == 6:  # of one micro-batch
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    task.on_step = on_step
    try:
        with pytest.raises(KeyboardInterrupt):
            run_toy(tmp_path / "parts", task, save_every=3, accumulate=1)
        (writer,) = writers()
        assert load_newest(tmp_path / "parts").step == 3
        with pytest.raises(ValueError, match="in use by process"):
            run_toy(tmp_path / "parts")
    finally:
        goes_on.set()
    writer.join()
    assert steps_of(tmp_path / "parts") == [3, 6]
    run_toy(tmp_path / "parts", save_every=3, accumulate=1)
    run_toy(tmp_path / "whole", accumulate=1)
    assert_the_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.promise("R11")
def test_the_command_ends_at_once_though_one_is_being_written():
    code = (
        "import threading, time\n"
        "from beit_fast import cli\n"
        "def run(config):\n"
        "    threading.Thread(target=time.sleep, args=(60,), name='checkpoint').start()\n"
        "    raise KeyboardInterrupt\n"
        "cli.WITHOUT_RECIPE['convert'] = (lambda arguments: None, lambda: run)\n"
        "raise SystemExit(cli.main(['convert']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=50, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr == "beit-fast: interrupted; the last checkpoint is whole\n"
