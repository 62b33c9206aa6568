"""Bad steps: seen on the device, and not taken by any rank.

    bad    loss or gradient norm not finite on any rank, or with `run.spike` k
           loss > mean + k deviation, of the last `run.spike_window` good steps
    row    so many bad steps in a row; from `run.bad_steps` on nothing is learnt any more

Nothing here asks the device: what the optimiser skips by is a tensor, and what is to be told of a
step is one more output of it, read at the next check (bad_steps.py). So a CUDA graph captures it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beit_fast.train.config import RunConfig
from beit_fast.train.world import World

_SCALARS = 6  # what comes before the losses of micro-batches in what `watch` gives
PREFIX = "sentinel/"


@dataclass(frozen=True)
class Noted:
    """What one rank knows of a step. Numbers may be NaN or infinite.

    bad: of itself, and not for the row before it. own_loss: of this rank; loss: the mean over
    ranks, where all are finite. mean, deviation: of good losses before; NaN where spikes are not
    looked for or there were too few.
    """

    bad: bool
    own_loss: float
    loss: float
    grad_norm: float
    mean: float
    deviation: float
    losses: list[float]  # of each micro-batch, a mean over its own things
    grad_norms: list[float]  # of each gradient, or what this rank keeps of it


def read_note(values: Sequence[float], num_losses: int) -> Noted:
    """What `Sentinel.watch` gave of a step of so many micro-batches."""
    bad, *scalars = values[:_SCALARS]
    end = _SCALARS + num_losses
    return Noted(bool(bad), *scalars, list(values[_SCALARS:end]), list(values[end:]))


class Sentinel:
    """Keeps the optimiser from taking a bad step, on all ranks. `lost`, fp32 (), is 1 where the
    last step was not taken; `row`, (), how many bad ones in a row there are."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World, run: RunConfig) -> None:
        self._world, self._limit, self._spike = world, run.bad_steps, run.spike
        optimizer.found_inf = self.lost = torch.zeros((), device=world.device)
        self.row = torch.zeros_like(self.lost)
        # The newest is last; NaN until there are as many, and no loss is above a mean of these.
        self._good = torch.full((run.spike_window,), torch.nan, device=world.device)
        self._unknown = torch.full((2,), torch.nan, device=world.device)

    def watch(self, losses: Sequence[Tensor], loss: Tensor, norm: Tensor, norms: Tensor) -> Tensor:
        """Look at a step, before the optimiser uses its gradients; what `read_note` reads, fp32.

        losses: of each micro-batch, fp32 (); loss, norm: of the step on this rank; norms (T,): of
        each gradient. A loss may be bad on one rank alone; none takes the step then. Two numbers
        are exchanged, and the host waits for nothing.
        """
        own = torch.stack((loss, norm)).float()
        bad = (own - own != 0).any()  # of NaN and infinity the difference is NaN
        if self._world.size > 1:
            told = self._world.sum(torch.stack((bad, own[0])).nan_to_num(0.0, 0.0, 0.0))
            bad, loss = told[0] > 0, told[1] / self._world.size
        else:
            loss = own[0]
        before = self._unknown
        if self._spike is not None:
            deviation, mean = torch.std_mean(self._good, correction=0)
            before = torch.stack((mean, deviation))
            bad = bad | (loss > mean + self._spike * deviation)
            kept = torch.cat((self._good[1:], loss[None]))
            self._good.copy_(torch.where(bad, self._good, kept))
        lost = bad | (self.row >= self._limit)
        self.row.add_(1).mul_(lost)
        self.lost.copy_(lost)
        scalars = torch.stack((bad, own[0], loss, own[1]))
        return torch.cat((scalars, before, torch.stack((*losses,)).float(), norms.float()))

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to judge as this one; nothing in a run without faults or spikes,
        whose checkpoints are as ever. The same on every rank. Syncs."""
        state = {"row": self.row} if float(self.row) else {}
        if self._spike is not None:
            state["good"] = self._good
        return {f"{PREFIX}{name}": value for name, value in state.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Of a window of another length, the newest that fit."""
        if (row := tensors.get(f"{PREFIX}row")) is not None:
            self.row.copy_(row)
        if (good := tensors.get(f"{PREFIX}good")) is not None:
            count = min(len(self._good), len(good))
            self._good[len(self._good) - count :] = good[len(good) - count :]


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
