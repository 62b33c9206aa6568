"""The toy as the command runs it, on ranks, with faults planted:
`faulty_ranks.py OUTPUT [RANK:STEP:FAULT ...] [--timeout SECONDS] ...`.

RANK meets FAULT in STEP (from 1), once: the file OUTPUT/fired_RANK:STEP:FAULT says
when. The numbers of all processes are in OUTPUT/pids.
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
from beit_fast.train.stop import heed_stop
from beit_fast.train.world import open_world

ARGUMENTS = argparse.ArgumentParser()
ARGUMENTS.add_argument("output", type=Path)
ARGUMENTS.add_argument("faults", nargs="*")
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
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hang": hang,
    "loader": hang,
    "lock": hang_with_lock,
    "slow": slowly,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "error": fail,
    "fault": lambda: 1 / 0,
}


class FaultyTask(ToyTask):
    """The toy that meets faults, each once: in a step, or while it waits for that step's batch."""

    def plant(self, output: Path, faults: list[str]) -> None:
        self.output, self.faults = output, faults
        self.on_step = lambda done: self.meet(done + 1, "in the step")

    def meet(self, step: int, where: str) -> None:
        for planted in self.faults:
            rank, at, fault = planted.split(":")
            mark = self.output / f"fired_{planted}"
            here = (where == "before it") == (fault == "loader")
            if here and (int(rank), int(at)) == (self.world.rank, step) and not mark.exists():
                time.sleep(0.6)  # the watch has seen that the first step is over
                mark.write_text(str(time.time()))
                FAULTS[fault]()

    def batches(self, start: int):
        for number, batch in enumerate(super().batches(start), start + 1):
            self.meet(number, "before it")
            yield batch


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    output = arguments.output
    output.mkdir(exist_ok=True, parents=True)
    limits = {"timeout": arguments.timeout, "startup_timeout": arguments.startup_timeout}
    with open_world("cpu", **limits) as world:
        with (output / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")
        task = FaultyTask(world=world, dropout=0.0)
        task.plant(output, arguments.faults)
        train_toy(output, task, world, accumulate=1, steps=arguments.steps, save_every=2)


if __name__ == "__main__":
    cli.WITHOUT_RECIPE["toy"] = (ARGUMENTS.parse_args, lambda: run)
    sys.argv[1:1] = ["toy"]
    sys.exit(beit_fast_main.main())
