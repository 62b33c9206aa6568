"""What each micro-batch's mean counts for in the step's, so that a step can be split at will.

    share(a, r) = n(a, r) R / sum of n over all micro-batches a and ranks r

n is how many things the loss of a micro-batch is a mean over, R the number of ranks. Ranks average
their gradients, so the sum of all micro-batches' shares, divided by R, is 1: the loss is the mean
over all things of the step. The authors' code instead takes the mean of the ranks' means.
Source: unilm beit `engine_for_pretraining.py`, DDP's average (spec 2.6 and 5)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from beit_fast.train.config import RunConfig
from beit_fast.train.prefetch import Batch
from beit_fast.train.world import World

Shares = Callable[[Sequence[Batch]], Sequence[float | Tensor]]


def shares_of(count: Callable[[Batch], Tensor | None], run: RunConfig, world: World) -> Shares:
    """A function of a step's micro-batches on this rank that gives the share of each.

    `count` says how many things a batch's loss is a mean over, () on the device, or None: as many
    in every batch. One exchange of one number a step, and no wait for the device. Where there is
    nothing in the whole step all shares are 0.
    """

    def equal(micro_batches: Sequence[Batch]) -> list[float]:
        return [1 / len(micro_batches)] * len(micro_batches)

    def by_count(micro_batches: Sequence[Batch]) -> Sequence[float | Tensor]:
        counts = [count(batch) for batch in micro_batches]
        if counts[0] is None:
            return equal(micro_batches)
        counts_A = torch.stack(counts)
        total = world.sum(counts_A.sum())
        return (counts_A * world.size / total.clamp(min=1)).unbind()

    return equal if run.loss_mean == "rank" else by_count
