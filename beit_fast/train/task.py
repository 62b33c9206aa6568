"""What the loop asks of whatever is trained."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from beit_fast.train.images import Images
from beit_fast.train.world import World


class Task(Protocol):
    """What is trained.

    `model` is the raw module, trained and saved. `counters` are further device tensors that belong
    to the state of the run (running counts, for example); the task updates them in place.
    """

    name: str
    model: nn.Module
    counters: dict[str, Tensor]
    blocks: Sequence[nn.Module]  # parts of the model that FSDP gathers one by one; (): all at once
    num_images: int  # in the data set
    images: Images  # which, and how `batches` goes on where the folder changes
    batches_per_epoch: int  # micro-batches of one rank in one pass, rounded down
    images_per_batch: int

    def to(self, device: torch.device) -> None:
        """Move the model and whatever else `loss` needs."""

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        """Micro-batches of this rank from number `start` on, endless: on the CPU, but for pixels
        that are made on the device."""

    def take_rank(self, world: World) -> None:
        """Give the batches of this rank from now on, though there is one process: for a replay."""

    def sample_name(self, index: int) -> str:
        """What to call the image of this `sample_index` of a batch: the path of its file."""

    def compile(self, mode: str, *, by_block: bool = False) -> None:
        """Have torch.compile make the large part of `loss`; `mode` is torch's. `by_block`: the
        forward of each of `blocks` on its own, where there are some."""

    def begin_step(self, step: int) -> None:
        """Fill the device tensors that change over the run, before each step."""

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `loss` takes, from a batch on the device: all that needs neither gradients nor
        random numbers, in the run's precision. No host sync."""

    def count(self, batch: dict[str, Tensor]) -> Tensor | None:
        """How many things the loss of a prepared batch is a mean over, fp32 () on its device; None:
        as many in every batch."""

    def stand_in(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with whatever `prepare` cannot make yet, for a look at shapes alone."""

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and scalar metrics of a prepared batch. No host sync, fixed shapes."""

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for AdamW."""

    def report(self, counters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars read at each log line besides the means of the metrics; `counters` are those of
        all ranks, summed."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What `model` comes to on data that it is not trained on; called on every rank."""

    def picture(self, model: nn.Module, path: Path) -> None:
        """Draw what `model` (the raw or the averaged one) does, as a PNG."""


class TaskLoss(nn.Module):
    """The task's loss as a module, so that DDP can wrap it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.loss = task.loss

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch)
