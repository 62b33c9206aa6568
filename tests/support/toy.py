"""A task of a few hundred parameters that draws random numbers: enough to test the loop."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from beit_fast.data.run_images import RunImages
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.loop import train
from beit_fast.train.stop import Interrupted
from beit_fast.train.world import World
from loaded import Numbers
from task_runs import ALONE


class ToyTask:
    """Regression with dropout on data that is a function of the batch's number."""

    name = "toy"
    num_images = 20

    def __init__(
        self,
        bad_step: int | None = None,
        world: World = ALONE,
        dropout: float = 0.3,
        images_per_batch: int = 4,
    ) -> None:
        self.images_per_batch = images_per_batch
        self.batches_per_epoch = self.num_images // images_per_batch
        self.images = RunImages(Numbers(self.num_images))
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(dropout), nn.Linear(16, 1))
        self.blocks = (self.model[0],)
        self.counters = {"seen": torch.zeros((), dtype=torch.float64)}
        self.bad_step, self.world = bad_step, world
        self.fetched: list[int] = []
        self.on_step = lambda step: None
        self.compiled: str | None = None
        self.bad_gradients = True  # in the bad step

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.bad = torch.ones((), device=device)
        self.counters = {name: counter.to(device) for name, counter in self.counters.items()}

    def batches(self, start: int):
        number = start
        while True:
            generator = torch.Generator().manual_seed(number * self.world.size + self.world.rank)
            self.fetched.append(number)
            first = (number * self.world.size + self.world.rank) * self.images_per_batch
            yield {
                "x": torch.randn(self.images_per_batch, 8, generator=generator),
                "sample_index": torch.arange(first, first + self.images_per_batch),
            }
            number += 1

    def take_rank(self, world: World) -> None:
        self.world = world

    def sample_name(self, index: int) -> str:
        return f"image_{index}"

    def compile(self, mode: str, *, by_block: bool = False) -> None:
        self.compiled = mode

    def begin_step(self, step: int) -> None:
        self.bad.fill_(torch.nan if step == self.bad_step else 1.0)
        self.step = step

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch | {"target": batch["x"].sum(1)}

    def count(self, batch: dict[str, Tensor]) -> None:
        """As many in every batch."""

    def stand_in(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.on_step(self.step)
        self.counters["seen"] += len(batch["x"])
        loss = (self.model(batch["x"]).squeeze(1) - batch["target"]).square().mean()
        shown = loss * self.bad if self.bad_gradients else loss + (self.bad - 1)
        return shown, {"error": loss.detach().sqrt()}

    def param_groups(self, weight_decay: float) -> list[dict]:
        return [{"params": list(self.model.parameters()), "weight_decay": weight_decay}]

    def report(self, counters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"seen": counters["seen"]}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"weight": float(model[0].weight.detach().sum())}

    def picture(self, model: nn.Module, path: Path) -> None:
        path.write_bytes(b"png")


def train_toy(
    output: Path,
    task: ToyTask | None = None,
    world: World = ALONE,
    optim: OptimConfig | None = None,
    killed_at: int | None = None,
    stop_at: int | None = None,
    **changes,
):
    """Train the toy for 12 steps; `changes` go to RunConfig. `killed_at`: an error in the step
    after so many; `stop_at`: a signal in the last of so many."""
    task = task or ToyTask()
    run = {
        "output": str(output),
        "steps": 12,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 4,
        "save_every": 100,
        "ema_decay": 0.9,
        "accumulate": 2,
    }
    if killed_at is not None:

        def kill(step: int) -> None:
            if step == killed_at:
                raise RuntimeError("killed")

        task.on_step = kill
    if stop_at is not None:
        task.on_step = lambda step: step == stop_at - 1 and os.kill(os.getpid(), signal.SIGTERM)
    optim = optim or OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3)
    run = RunConfig(**run | changes)
    with pytest.raises(Interrupted) if stop_at is not None else contextlib.nullcontext():
        return task, train(task, optim, run, settings={"toy": 1}, world=world)
    return task, None
