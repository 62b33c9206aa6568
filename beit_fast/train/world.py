"""One process or many: torchrun's variables and the process group.

Control messages (stop, digest of the settings) go over gloo on the CPU, so that agreeing on them
never waits for the GPU.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit_fast.flags import flag

TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class World:
    """This process among `size` ones; `control` is the CPU group for flags (None if alone)."""

    rank: int
    size: int
    device: torch.device
    control: "dist.ProcessGroup | None" = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any_of(self, flag: int) -> int:
        """The largest `flag` of all ranks: how they agree to stop after the same step."""
        if self.size == 1:
            return flag
        value = torch.tensor(flag)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over ranks, in rank order of summation fixed by the backend."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks, a new one. Whole numbers in fp64 are summed exactly."""
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def same(self, digest: str) -> None:
        """Raise ValueError unless every rank passes the same `digest`."""
        digests = self.gather(digest)
        if different := [rank for rank, other in enumerate(digests) if other != digests[0]]:
            raise ValueError(f"ranks {different} run other settings or code than rank 0")

    def gather(self, value: Any) -> list[Any]:
        """What every rank passes, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


@contextlib.contextmanager
def open_world(
    device: str, cpu_threads: int | None = None, *, named: str = "run.device"
) -> Iterator[World]:
    """The world that torchrun describes, or this process alone. `device`: auto, cpu or cuda.

    On a CPU, torch has `cpu_threads` threads inside (None: as many as before). Raises ValueError
    where cuda is asked for and there is none, and for more threads than the machine has cores.
    named: the setting that names the device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"the device is cuda and torch sees no GPU: pass {flag(named)} cpu")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    threads_before = torch.get_num_threads()
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    elif cpu_threads is not None:
        if cpu_threads > (cores := os.cpu_count() or cpu_threads):
            raise ValueError(
                f"{flag('run.cpu_threads')} is {cpu_threads} and this machine has {cores} cores: "
                f"pass {cores} or less, or null"
            )
        torch.set_num_threads(cpu_threads)
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        control = dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None
        yield World(rank, size, chosen, control)
    finally:
        if size > 1:
            dist.destroy_process_group()
        torch.set_num_threads(threads_before)
