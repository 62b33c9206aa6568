"""The toy as the command runs it, on ranks, with faults planted:
`faulty_ranks.py OUTPUT [RANK:STEP:FAULT ...] [--timeout SECONDS] ...`.

The faults are those of faults.py. The numbers of all processes are in OUTPUT/pids.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

import beit_fast_main
from beit_fast import cli
from beit_fast.train import saving
from beit_fast.train.world import open_world
from faults import Injector
from toy import ToyTask, train_toy

ARGUMENTS = argparse.ArgumentParser()
ARGUMENTS.add_argument("output", type=Path)
ARGUMENTS.add_argument("faults", nargs="*")
ARGUMENTS.add_argument("--timeout", type=float, default=300.0)
ARGUMENTS.add_argument("--startup_timeout", type=float, default=120.0)
ARGUMENTS.add_argument("--steps", type=int, default=12)
# Seconds before a fault: the watch has seen that the first step is over.
ARGUMENTS.add_argument("--settle", type=float, default=0.6)


class FaultyTask(ToyTask):
    """The toy that meets faults, each once: in a step, or while it waits for that step's batch."""

    def plant(self, injector: Injector) -> None:
        self.injector = injector
        self.on_step = lambda done: injector.meet("step", done + 1)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(batch)
        return self.injector.meet("loss", self.step + 1, loss), metrics

    def batches(self, start: int):
        for number, batch in enumerate(super().batches(start), start + 1):
            self.injector.meet("batch", number)
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
        injector = Injector(output, arguments.faults, rank=world.rank, settle=arguments.settle)
        task.plant(injector)
        write = saving.save_checkpoint
        saving.save_checkpoint = lambda folder, step, *a, **k: (
            injector.meet("save", step) or write(folder, step, *a, **k)
        )
        train_toy(output, task, world, accumulate=1, steps=arguments.steps, save_every=2)


if __name__ == "__main__":
    cli.WITHOUT_RECIPE["toy"] = (ARGUMENTS.parse_args, lambda: run)
    sys.argv[1:1] = ["toy"]
    sys.exit(beit_fast_main.main())
