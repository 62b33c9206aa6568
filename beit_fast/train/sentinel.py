"""Bad steps: seen on the device, and not taken by any rank.

    bad    loss or gradient norm not finite on any rank, or with `run.spike` k
           loss > mean + k deviation, of the last `run.spike_window` good steps
    row    so many bad steps in a row; from `run.bad_steps` on nothing is learnt any more

Nothing here asks the device: what the optimiser skips by is a tensor, and what is to be told of a
bad step waits in one until the next check (bad_steps.py). So a CUDA graph captures it all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beit_fast.train.config import RunConfig
from beit_fast.train.world import World

ROWS = 64  # bad steps between two checks that are told in full; of more, the first and the last
_SCALARS = ("step", "own_loss", "loss", "grad_norm", "mean", "deviation")
PREFIX = "sentinel/"


@dataclass(frozen=True)
class Noted:
    """What one rank knows of a bad step. Numbers may be NaN or infinite.

    loss: the mean over ranks, of those whose own is finite; own_loss: of this one. mean, deviation:
    of good losses before, NaN where spikes are not looked for or there were too few.
    """

    step: int  # from 0
    own_loss: float
    loss: float
    grad_norm: float
    mean: float
    deviation: float
    losses: list[float]  # of each micro-batch, a mean over its own things
    grad_norms: list[float]  # of each gradient, or what this rank keeps of it


@dataclass(frozen=True)
class Reading:
    """row: bad steps in a row up to now, and first, from 0, the step it began at; skipped: all
    since the last reading, of which `noted` are told."""

    row: int
    first: int
    skipped: int
    noted: list[Noted]


class Sentinel:
    """Keeps the optimiser from taking a bad step, on all ranks, and notes it."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, world: World, start: int, run: RunConfig
    ) -> None:
        self._world, self._limit, self._spike = world, run.bad_steps, run.spike
        self._rows_kept = min(ROWS, run.log_every)
        number = torch.zeros((), dtype=torch.float64, device=world.device)
        self._step = number + start
        self._row, self._first, self._skipped, self._num_noted = (number.clone() for _ in range(4))
        self._good = torch.full((run.spike_window,), torch.nan).to(number)  # the newest is last
        self._rows: Tensor | None = None
        self._num_losses = 0
        optimizer.found_inf = self.lost = torch.zeros((), device=world.device)

    def watch(self, losses: Sequence[Tensor], loss: Tensor, norm: Tensor, norms: Tensor) -> None:
        """Look at a step, before the optimiser uses its gradients; then `lost` is 1, fp32 (), where
        it is not to be taken.

        losses: of each micro-batch, (); loss, norm: of the step on this rank; norms (T,): of each
        gradient. A loss may be bad on one rank alone; none takes the step then. Three numbers are
        exchanged, and the host waits for nothing.
        """
        own_loss, norm = loss.double(), norm.double()
        fine = torch.isfinite(own_loss)
        told = torch.stack((fine, torch.isfinite(norm), torch.where(fine, own_loss, 0.0)))
        told = self._world.sum(told)
        loss = told[2] / self._world.size
        bad = told[:2].sum() < 2 * self._world.size
        mean = deviation = torch.full_like(loss, torch.nan)
        if self._spike is not None:
            # NaN until there are as many as the window holds, and no loss is above that.
            mean, deviation = self._good.mean(), self._good.std(correction=0)
            bad = bad | (loss > mean + self._spike * deviation)
            self._good.copy_(torch.where(bad, self._good, torch.cat((self._good[1:], loss[None]))))
        over = self._row >= self._limit
        lost = bad | over
        self.lost.copy_(lost)
        self._first.copy_(torch.where(lost & (self._row == 0), self._step, self._first))
        self._row.copy_(torch.where(lost, self._row + 1, 0.0))
        self._skipped += lost
        scalars = torch.stack((self._step, own_loss, loss, norm, mean, deviation))
        self._note(bad & ~over, torch.cat((scalars, torch.stack((*losses,)), norms)))
        self._num_losses = len(losses)
        self._step += 1

    def _note(self, bad: Tensor, row: Tensor) -> None:
        if self._rows is None:
            self._rows = row.new_zeros((self._rows_kept, len(row)))
        place = self._num_noted.clamp(max=self._rows_kept - 1).long()[None]
        before = self._rows.index_select(0, place)
        self._rows.index_copy_(0, place, torch.where(bad, row[None], before))
        self._num_noted += bad

    def read(self) -> Reading:
        """What was skipped since the last reading. Syncs."""
        numbers = torch.stack((self._row, self._first, self._skipped, self._num_noted))
        row, first, skipped, num_noted = map(int, numbers.tolist())
        noted: list[Noted] = []
        if num_noted:
            assert self._rows is not None
            noted = [self._noted(values) for values in self._rows[:num_noted].tolist()]
        self._skipped.zero_()
        self._num_noted.zero_()
        return Reading(row, first, skipped, noted)

    def _noted(self, values: list[float]) -> Noted:
        step, *scalars = values[: len(_SCALARS)]
        rest = values[len(_SCALARS) :]
        return Noted(int(step), *scalars, rest[: self._num_losses], rest[self._num_losses :])

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to judge as this one; nothing in a run without faults or spikes,
        whose checkpoints are as ever. The same on every rank. Syncs."""
        state = {}
        if float(self._row):
            state = {"row": self._row, "first": self._first}
        if self._spike is not None:
            state["good"] = self._good
        return {f"{PREFIX}{name}": value for name, value in state.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Of a window of another length, the newest that fit."""
        for name, ours in (("row", self._row), ("first", self._first), ("good", self._good)):
            theirs = tensors.get(f"{PREFIX}{name}")
            if theirs is None:
                continue
            if ours.ndim:
                count = min(len(ours), len(theirs))
                ours[len(ours) - count :] = theirs[len(theirs) - count :]
            else:
                ours.copy_(theirs)


class Statistics:
    """The buffers of batch norms, which a forward pass changes whatever becomes of the step."""

    def __init__(self, module: nn.Module) -> None:
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for norm in norms:
            for buffer in norm.buffers(recurse=False):
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())

    def of_now(self) -> list[Tensor]:
        """A copy, flat, one for each dtype; nothing where there are no batch norms."""
        return [torch.cat([b.reshape(-1) for b in buffers]) for buffers in self._buffers]

    def restore(self, before: Sequence[Tensor], lost: Tensor) -> None:
        """Put back what `of_now` gave where `lost` is not 0."""
        for buffers, then in zip(self._buffers, before, strict=True):
            now = torch.cat([buffer.reshape(-1) for buffer in buffers])
            parts = torch.where(lost > 0, then, now).split([b.numel() for b in buffers])
            shaped = [part.view_as(b) for part, b in zip(parts, buffers, strict=True)]
            torch._foreach_copy_(buffers, shaped)
