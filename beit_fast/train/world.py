"""One process or many: the process group, and what happens when it breaks.

Control messages (stop, what ranks agree on) go over gloo on the CPU, so that they never wait for
the GPU.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from beit_fast.errors import ToldElsewhere
from beit_fast.flags import flag
from beit_fast.train import once
from beit_fast.train.agreement import compare, names
from beit_fast.train.board import Board, digest_of, meet
from beit_fast.train.launch import Launch, read_launch
from beit_fast.train.progress import begin_stage, note, progress, waiting_for_ranks
from beit_fast.train.watch import Watch

TIMEOUT, STARTUP_TIMEOUT = 300.0, 1800.0  # seconds; of a run they are settings
# Collectives end by themselves only where the watch has not ended the process before.
BACKSTOP = 60.0
LOOKS = 6.0  # seconds in which the reason of a broken collective is looked for
PARTS, ERROR_PARTS = 5.0, 0.5  # seconds that ranks wait for each other at the end

AGAIN = "the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class World:
    """This process among `size` ones; `control` is the CPU group for flags (None if alone)."""

    rank: int
    size: int
    device: torch.device
    control: "dist.ProcessGroup | None" = None
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any_of(self, flag: int) -> int:
        """The largest `flag` of all ranks: how they agree to stop after the same step.

        After each step it is a signal's number, or FAILED of saving.py, which is larger than any.
        """
        if self.size == 1:
            return flag
        value = torch.tensor(flag)
        with waiting_for_ranks():
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over ranks, in rank order of summation fixed by the backend."""
        if self.size > 1:
            with waiting_for_ranks():
                dist.all_reduce(values)
            values = values / self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks, a new one. Whole numbers in fp64 are summed exactly."""
        total = values.clone()
        if self.size > 1:
            with waiting_for_ranks():
                dist.all_reduce(total)
        return total

    def agree(self, fields: Mapping[str, Any]) -> None:
        """Raise ValueError, on every rank, unless all pass the same `fields`: plain data, whose
        names the message has."""
        if len(set(self.gather(digest_of(fields)))) > 1:
            compare(self.gather(dict(fields)))

    @contextlib.contextmanager
    def watching(self, place: str, folder: Path) -> Iterator[None]:
        """Inside, training makes steps, the first of which compiles: one process alone is watched
        here, ranks always. folder: where the stacks of one that stands still go."""
        begin_stage(place)
        if self.watch is None:
            yield
            return
        before, self.watch.armed, self.watch.folder = self.watch.armed, True, folder
        try:
            yield
            begin_stage("finishing the run")  # after an error the step is still to be told
        finally:
            self.watch.armed = before

    def gather(self, value: Any) -> list[Any]:
        """What every rank passes, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with waiting_for_ranks():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            with waiting_for_ranks():
                dist.barrier(group=self.control)


@contextlib.contextmanager
def open_world(
    device: str,
    cpu_threads: int | None = None,
    *,
    named: str = "run.device",
    timeout: float = TIMEOUT,
    startup_timeout: float = STARTUP_TIMEOUT,
) -> Iterator[World]:
    """The world that torchrun describes, or this process alone. `device`: auto, cpu or cuda.

    On a CPU, torch has `cpu_threads` threads inside (None: as many as before). named: the setting
    that names the device. timeout, startup_timeout: seconds without progress, later and until the
    first step is done, that end the run (watch.py).

    Raises ValueError where cuda is asked for and there is none, for more threads than the machine
    has cores, and for variables that are missing or contradict; StartError where ranks do not come.
    Out of the block come, where a collective broke, `ToldElsewhere` and `RankLost`.
    """
    launch = read_launch()
    chosen = _device(device, named, launch)
    threads_before = torch.get_num_threads()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif cpu_threads is not None:
        if cpu_threads > (cores := os.cpu_count() or cpu_threads):
            raise ValueError(
                f"{flag('run.cpu_threads')} is {cpu_threads} and this machine has {cores} cores: "
                f"pass {cores} or less, or null"
            )
        torch.set_num_threads(cpu_threads)
    ranks = _alone if launch.size == 1 else _ranks
    try:
        with ranks(launch, chosen, timeout, startup_timeout) as world:
            yield world
    finally:
        torch.set_num_threads(threads_before)


def _device(device: str, named: str, launch: Launch) -> torch.device:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not there:
        raise ValueError(f"the device is cuda and torch sees no GPU: pass {flag(named)} cpu")
    kind = ("cuda" if there else "cpu") if device == "auto" else device
    if kind == "cpu":
        return torch.device("cpu")
    if launch.local_rank >= there:
        raise ValueError(
            f"LOCAL_RANK is {launch.local_rank} and torch sees {there} GPU{'s' * (there != 1)}: "
            f"start at most as many processes on a node (--nproc_per_node={there}), or show more "
            "GPUs (CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", launch.local_rank)


def _watch(board: Board | None, launch: Launch, timeout: float, startup_timeout: float) -> Watch:
    """Started. Its advice is made here, for threads do not know of `flags_of`."""
    once.speaks_through(board)
    advice = (
        "The same command goes on from the last checkpoint; how long a run may stand still is "
        f"{flag('run.timeout')}, and {flag('run.startup_timeout')} until its first step is done"
    )
    limits = {"timeout": timeout, "startup_timeout": startup_timeout}
    watch = Watch(board, launch.rank, **limits, advice=advice, end=once.end_with)
    watch.start()
    return watch


@contextlib.contextmanager
def _alone(
    launch: Launch, device: torch.device, timeout: float, startup_timeout: float
) -> Iterator[World]:
    """This process, with a watch that `World.watching` arms."""
    watch = _watch(None, launch, timeout, startup_timeout)
    try:
        yield World(0, 1, device, watch=watch)
    finally:
        watch.close()


@contextlib.contextmanager
def _ranks(
    launch: Launch, device: torch.device, timeout: float, startup_timeout: float
) -> Iterator[World]:
    """The process group of all ranks, with its watch; what breaks it is explained."""
    store = meet(launch, startup_timeout)
    board = Board(store, launch)
    watch = _watch(board, launch, timeout, startup_timeout)
    limit = timedelta(seconds=timeout + startup_timeout + BACKSTOP)
    try:
        progress("opening the process group", waits=True)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.size,
            timeout=limit,
        )
        control = dist.new_group(backend="gloo", timeout=limit)
        progress("preparing the run")
        yield World(launch.rank, launch.size, device, control, watch)
    except Exception as error:
        once.leave_to_us()
        watch.leave(once.text_of(error))
        if once.broke(error):
            _explain(error, board, watch)
        with contextlib.suppress(RuntimeError):
            told = isinstance(error, ToldElsewhere)
            board.write("failure", {"text": once.text_of(error), "broken": told})
        _part(board, ERROR_PARTS)
        raise
    else:
        _part(board, PARTS)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        watch.close()


def _explain(error: Exception, board: Board, watch: Watch) -> NoReturn:
    """Raise what a broken collective comes from: ToldElsewhere where another rank has failed and
    says why, RankLost where some are gone; else the error itself."""
    where = "before the first step" if note.step is None else f"at step {note.step}"
    said = next(iter(str(error).splitlines()), "")[:200]
    try:
        board.write("failure", {"text": "", "broken": True})
        until = time.monotonic() + LOOKS
        lost = {}
        while time.monotonic() < until:
            failures = board.read("failure")
            if any(failure and not failure["broken"] for failure in failures):
                raise ToldElsewhere(f"another rank failed: {said}") from error
            lost = watch.lost()
            lost = {rank: seen for rank, seen in lost.items() if not failures[rank]}
            if lost:
                break
            time.sleep(0.1)
    except RuntimeError as problem:
        if isinstance(problem, ToldElsewhere):
            raise
        who = f"the store at {board.address} does not answer any more, nor do other ranks"
        raise once.RankLost(f"{who} ({where}): {AGAIN}") from error
    if not lost:
        raise once.RankLost(
            f"the exchange between ranks failed {where}, and none of them is gone ({said}): see "
            f"the network between the nodes; {AGAIN}"
        ) from error
    who = names(list(lost))
    ended = all(seen.gone for seen in lost.values())
    how = "has ended" if ended else "is gone without a word (killed, or cut off)"
    how = how if len(lost) == 1 else how.replace("has", "have").replace("is gone", "are gone")
    raise once.RankLost(f"{who} {how} {where}: {AGAIN}") from error


def _part(board: Board, within: float) -> None:
    """Wait until the other ranks have come here too, but not for long: one that closes its
    connections first may break the last collective of the others."""
    with contextlib.suppress(RuntimeError):
        board.write("parts", True)
        until = time.monotonic() + within
        while not all(board.read("parts")) and time.monotonic() < until:
            time.sleep(0.01)
