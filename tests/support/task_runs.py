"""What the tests of several tasks share: parts of a run, and what two runs have in common."""

import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.train.log import read_metrics
from beit_fast.train.state import checkpoint_paths, load_checkpoint
from beit_fast.train.stop import Interrupted
from beit_fast.train.world import World

ALONE = World(0, 1, torch.device("cpu"))
SUPPORT = Path(__file__).parent  # of scripts that tests start
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def with_fields(config, /, **changes):
    """The configuration with fields replaced; `section={field: value}` replaces those of one."""
    sections = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(config, **sections)


def take_batches(batched, count: int, start: int = 0) -> list[dict]:
    """Of a task or a loader."""
    with contextlib.closing(batched.batches(start)) as batches:
        return [next(batches) for _ in range(count)]


def first_batch(batched) -> dict:
    (batch,) = take_batches(batched, 1)
    return batch


def first_images(batch: dict, count: int) -> dict:
    """Of a batch; the draws of drop path have a column for each."""
    return {k: v[:, :count] if k == "keep" else v[:count] for k, v in batch.items()}


def records_of(output: Path) -> list[dict]:
    """A run's metrics, all but its speed."""
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def steps_of(output: Path) -> list[int]:
    """Those of which a run has checkpoints."""
    return [int(path.name.removeprefix("step_")) for path in checkpoint_paths(output)]


@contextlib.contextmanager
def stopped_in_step(task_class: type, number: int) -> Iterator[None]:
    """A run inside gets a signal in that step of its task, and ends with its code."""
    begin_step = task_class.begin_step

    def stop(self, step: int) -> None:
        if step == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        begin_step(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_class, "begin_step", stop)
        with pytest.raises(Interrupted) as raised:
            yield
    assert raised.value.exit_code == 143


@contextlib.contextmanager
def told_in_a_read(kind: type, number: int) -> Iterator[None]:
    """The read of that number, from 1, of sources of this kind hangs; then SIGTERM comes, and the
    run inside ends with its code, soon."""
    read, calls, released = kind.read, itertools.count(1), threading.Event()

    def hang(self, index: int) -> object:
        if next(calls) == number:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            released.wait(60)
        return read(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "read", hang)
        began = time.monotonic()
        try:
            with pytest.raises(Interrupted) as raised:
                yield
        finally:
            released.set()
    assert next(calls) > number, "it ended before that read"
    assert raised.value.exit_code == 143
    assert time.monotonic() - began < 30  # half of what a read may take


def assert_the_same_run(ours: Path, theirs: Path) -> None:
    """Bit for bit, in all that the newest checkpoints hold, and in the metrics."""
    one, other = (load_checkpoint(checkpoint_paths(output)[-1]) for output in (ours, theirs))
    assert one.step == other.step
    assert one.tensors.keys() == other.tensors.keys()
    for stem, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[stem].keys()
        for name, value in tensors.items():
            assert torch.equal(value, other.tensors[stem][name]), (stem, name)
    assert records_of(ours) == records_of(theirs)


def assert_compiles_to_one_graph(
    train: Callable[..., object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train(**fields of RunConfig)`: compiled or not it logs the same losses."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses = {}
    for mode in ("off", "default"):
        torch._dynamo.utils.counters.clear()
        train(compile=mode, output=str(folder / mode))
        losses[mode] = [record["loss"] for record in records_of(folder / mode)]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (mode == "default")
    assert losses["default"] == pytest.approx(losses["off"], rel=1e-5)


class RefuseSyncs(TorchDispatchMode):
    """Fails on whatever makes the host wait for a value of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert func not in waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
