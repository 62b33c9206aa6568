"""The toy as the command runs it, on the ranks that torchrun starts, with a fault planted:
`faulty_ranks.py OUTPUT RANK STEP FAULT [--timeout SECONDS] [--steps STEPS] ...`.

RANK meets FAULT in STEP (from 1), once: a file OUTPUT/fired says that it did.
"""

import argparse
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import ToyTask, train_toy  # this file's folder leads sys.path

import beit_fast_main
from beit_fast import cli
from beit_fast.train.progress import tick
from beit_fast.train.stop import heed_stop
from beit_fast.train.world import open_world

ARGUMENTS = argparse.ArgumentParser()
ARGUMENTS.add_argument("output", type=Path)
ARGUMENTS.add_argument("rank", type=int)
ARGUMENTS.add_argument("step", type=int)
ARGUMENTS.add_argument("fault")
ARGUMENTS.add_argument("--timeout", type=float, default=300.0)
ARGUMENTS.add_argument("--startup_timeout", type=float, default=120.0)
ARGUMENTS.add_argument("--steps", type=int, default=12)


def hang() -> None:
    """Deaf to SIGTERM, as what waits for a disk is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def hang_with_lock() -> None:
    """Inside an extension that keeps Python's lock, and that no signal wakes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ctypes.PyDLL(None).sleep(600)


def slowly() -> None:
    """Seven seconds of work in parts."""
    for _ in range(35):
        time.sleep(0.2)
        heed_stop("while working")


def fail() -> None:
    raise ValueError("a disk of this node is gone: mount it")


FAULTS = {
    "none": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hang": hang,
    "loader": hang,
    "lock": hang_with_lock,
    "slow": slowly,
    "error": fail,
    "fault": lambda: 1 / 0,
}


class FaultyTask(ToyTask):
    """The toy that meets `fault` once, in the step, or while it waits for that step's batch."""

    def plant(self, output: Path, rank: int, step: int, fault: str) -> None:
        self.mark, self.rank, self.at, self.fault = output / "fired", rank, step, fault
        self.on_step = lambda done: self.meet("step", done + 1)

    def meet(self, where: str, step: int) -> None:
        mine = self.world.rank == self.rank and step == self.at
        if not mine or (where == "batch") != (self.fault == "loader") or self.mark.exists():
            return
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        self.mark.touch()
        (self.mark.parent / "fired_at").write_text(str(time.time()))
        FAULTS[self.fault]()

    def batches(self, start: int):
        for number, batch in enumerate(super().batches(start), start + 1):
            self.meet("batch", number)
            yield batch


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    limits = {"timeout": arguments.timeout, "startup_timeout": arguments.startup_timeout}
    with open_world("cpu", **limits) as world:
        task = FaultyTask(world=world, dropout=0.0)
        task.plant(arguments.output, arguments.rank, arguments.step, arguments.fault)
        tick()
        train_toy(arguments.output, task, world, accumulate=1, steps=arguments.steps, save_every=2)
        print(f"rank {world.rank} is done", flush=True)


if __name__ == "__main__":
    cli.WITHOUT_RECIPE["toy"] = (ARGUMENTS.parse_args, lambda: run)
    code = cli.main(["toy", *sys.argv[1:]])
    (ARGUMENTS.parse_args().output / f"left_{os.environ['RANK']}").write_text(str(time.time()))
    beit_fast_main._end_rank(code)
