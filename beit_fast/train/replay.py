"""A step of a run again, on one process, from the newest checkpoint before it. Writes nothing.

The images, masks and skipped branches of a step are the same however it is split. What a rank draws
besides, for its dropout and the noise of its codes, comes from a generator of its own: here each
rank's micro-batches follow one another, and its generator is put in place before them. Where ranks
share the statistics of a batch norm, theirs are one batch, of which each draws its part.

The step is taken as training takes it, so that on a CPU its loss is the run's to the last bit; only
one that is not finite is taken again, watched by first_bad.py.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.train.bad_steps import label_parameters
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.first_bad import Finding, FirstBad
from beit_fast.train.length import Length
from beit_fast.train.log import Meter
from beit_fast.train.optim import Schedule, build_optimizer
from beit_fast.train.prefetch import Batch, device_batches
from beit_fast.train.resume import Resume
from beit_fast.train.run_state import RunState
from beit_fast.train.seeds import step_seed
from beit_fast.train.sentinel import Sentinel
from beit_fast.train.shares import shares_of
from beit_fast.train.state import Checkpoint, checkpoint_paths, load_checkpoint
from beit_fast.train.step import TrainStep, autocast
from beit_fast.train.stop import heed_stop
from beit_fast.train.task import Task, TaskLoss
from beit_fast.train.world import World


@dataclass(frozen=True)
class Replayed:
    """Of a step, from 1: what it came to here. losses: of each micro-batch as `batches` says them,
    (rank, micro-batch, samples); where ranks are one batch, rank is None."""

    step: int
    start: int  # steps that were done where it began
    loss: float
    grad_norm: float
    grad_norms: dict[str, float]
    losses: list[float]
    batches: list[tuple[int | None, int, list[int]]]
    found: Finding | None
    found_in: int | None  # index of the micro-batch; None: in what they add up to

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def newest_before(output: Path, step: int) -> Checkpoint | None:
    """The checkpoint that step `step`, from 1, is reached from; None: the run's beginning.

    Raises CheckpointError for one that is damaged."""
    before = [p for p in checkpoint_paths(output) if p.name < f"step_{step:08d}"]
    return load_checkpoint(before[-1]) if before else None


class _Seen(Sentinel):
    """Keeps what it last looked at."""

    def watch(self, losses: Sequence[Tensor], loss: Tensor, norm: Tensor, norms: Tensor) -> Tensor:
        self.seen = [value.tolist() for value in (torch.stack((*losses,)), loss, norm, norms)]
        return super().watch(losses, loss, norm, norms)


class _Ranks(nn.Module):
    """The loss, with the generator of the rank whose micro-batch comes.

    ranks: of each micro-batch of a step in their order; None: one batch of all, of which each draws
    its part in the layers `apart`, and else from the first's.
    """

    def __init__(self, loss: nn.Module, seed: int, ranks: Sequence[int | None], size: int) -> None:
        super().__init__()
        self.loss, self._seed, self._ranks, self._size = loss, seed, ranks, size
        self._states: list[list[Tensor]] = []
        self._number = 0
        if ranks[0] is None:
            for module in loss.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.forward = self._by_rank(module.forward)

    def begin(self, step: int) -> None:
        self._number, self._step = 0, step
        self._states = []
        for rank in range(self._size):
            torch.manual_seed(step_seed(self._seed, step, rank))
            self._states.append(_generators())
        torch.manual_seed(step_seed(self._seed, step, 0))

    def forward(self, batch: Batch) -> Any:
        rank = self._ranks[self._number]
        if rank is not None and rank not in self._ranks[: self._number]:
            torch.manual_seed(step_seed(self._seed, self._step, rank))
        self._number += 1
        return self.loss(batch)

    def _by_rank(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def drawn(x: Tensor) -> Tensor:
            parts = []
            for rank, part in enumerate(x.chunk(self._size)):
                _set_generators(self._states[rank])
                parts.append(forward(part))
                self._states[rank] = _generators()
            return torch.cat(parts)

        return drawn


def _generators() -> list[Tensor]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def _set_generators(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


class Replay:
    """Steps of `task` again, from a checkpoint or, None, the run's beginning.

    run: with the accumulation that each rank had; ranks: how many there were; as_one: `task` has
    batches of all ranks, as large as theirs together. Raises ValueError and CheckpointError as a
    resume does.
    """

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        run: RunConfig,
        checkpoint: Checkpoint | None,
        *,
        ranks: int,
        as_one: bool,
        world: World,
        length: Length,
    ) -> None:
        self._task, self._world, self._ranks = task, world, ranks
        self._run = replace(run, compile="off", cuda_graph=False, prepare_ahead=False)
        self.start = 0 if checkpoint is None else checkpoint.step
        if not as_one:
            task.take_rank(World(0, ranks, world.device))  # whose images codes start from
        task.to(world.device)
        state = RunState(task, Meter(world.device), None, world)
        if checkpoint is not None:
            state.load_weights(Resume(checkpoint, [], []))
        optimizer = build_optimizer(task.param_groups(optim.weight_decay), optim, world.device)
        self._sentinel = _Seen(optimizer, world, run)
        if checkpoint is not None:
            state.load_rest(optimizer, self._sentinel, checkpoint.tensors)
        self._labels = label_parameters(task.model, optimizer.param_groups)
        self._schedule = Schedule(
            optimizer,
            optim,
            num_steps=length.num_steps,
            warmup=length.warmup_steps,
            start=self.start,
        )
        accumulate = run.accumulate
        each = [None] if as_one else range(ranks)
        self._places = [(rank, micro) for rank in each for micro in range(accumulate)]
        self._module = _Ranks(TaskLoss(task), run.seed, [rank for rank, _ in self._places], ranks)
        self._shares = shares_of(task.count, run, world)
        self._take = TrainStep(
            self._module,
            optimizer,
            self._sentinel,
            shares=self._shares,
            optim=optim,
            run=self._run,
            device=world.device,
        )
        self._optimizer = optimizer

    def step(self, number: int, told: Callable[[int], None] = lambda step: None) -> Replayed:
        """Step `number`, from 1, after those before it; `told` is called with each that is done."""
        self._task.model.train()
        with contextlib.closing(self._batches()) as batches:
            for step in range(self.start, number - 1):
                heed_stop(f"before step {number}")
                self._task.begin_step(step)
                self._module.begin(step)
                self._take([batch for batch, _ in next(batches)])
                self._schedule.step()
                told(step + 1)
            mine = next(batches)
        step_batches = [batch for batch, _ in mine]
        self._task.begin_step(number - 1)
        self._module.begin(number - 1)
        statistics = {k: v.clone() for k, v in self._task.model.named_buffers()}
        self._take(step_batches)
        losses, loss, norm, norms = self._sentinel.seen
        found, found_in = None, None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            for name, buffer in self._task.model.named_buffers():
                buffer.copy_(statistics[name])
            self._module.begin(number - 1)
            found, found_in = self._search(step_batches)
        squares: dict[str, float] = {}
        for (_, group), value in zip(self._labels, norms, strict=True):
            squares[group] = squares.get(group, 0.0) + value**2
        return Replayed(
            step=number,
            start=self.start,
            loss=loss,
            grad_norm=norm,
            grad_norms={group: math.sqrt(square) for group, square in squares.items()},
            losses=losses,
            batches=[
                (rank, micro, samples)
                for (rank, micro), (_, samples) in zip(self._places, mine, strict=True)
            ],
            found=found,
            found_in=found_in,
        )

    def _batches(self) -> Iterator[list[tuple[Batch, list[int]]]]:
        """The micro-batches of a step after the other, prepared, with the numbers of their
        samples."""
        task, accumulate = self._task, self._run.accumulate
        device = self._world.device
        prepare = autocast(self._run, device)(task.prepare)
        streams, samples = {}, {}
        try:
            for rank in dict.fromkeys(rank for rank, _ in self._places):
                if rank is not None:
                    task.take_rank(World(rank, self._ranks, device))
                samples[rank] = []
                raw = _noted(task.batches(self.start * accumulate), samples[rank])
                streams[rank] = device_batches(raw, device, prepare)
            while True:
                yield [
                    (next(streams[rank]), samples[rank].pop(0) if samples[rank] else [])
                    for rank, _ in self._places
                ]
        finally:
            for stream in streams.values():
                stream.close()

    def _search(self, step_batches: Sequence[Batch]) -> tuple[Finding | None, int | None]:
        """The step that was not taken, watched."""
        with FirstBad(self._task.model) as watch, warnings.catch_warnings():
            # That modules which are hooked are called one by one, which is meant.
            warnings.simplefilter("ignore", UserWarning)
            for i, (batch, share) in enumerate(
                zip(step_batches, self._shares(step_batches), strict=True)
            ):
                with autocast(self._run, self._world.device):
                    loss, _ = self._module(batch)
                watch.look_at_loss(loss)
                if watch.found is None:
                    (loss * share).backward()
                if watch.found is not None:
                    return watch.found, i
                watch.next_batch()
            watch.look_at_gradients()
            return watch.found, None


def _noted(batches: Iterator[Batch], samples: list[list[int]]) -> Iterator[Batch]:
    try:
        for batch in batches:
            samples.append(batch["sample_index"].tolist())
            yield batch
    finally:
        batches.close()
