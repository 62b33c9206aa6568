"""Drop path as a property of the sample: it comes with the batch, the same on whatever rank.

    keep[branch, place] = [uniform(seed, step)[place, branch] < 1 - p] / (1 - p)

p is the rate of the branch's block, place that of the sample in the step's batch of all ranks and
micro-batches: micro-batch a of rank r has (a R + r) B and the following, as in data/loader.py.
However a step is split, a sample skips the same branches.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from beit_fast.data.seeds import counter_seed
from beit_fast.model.beit import Beit
from beit_fast.train.config import RunConfig
from beit_fast.train.prefetch import Batch
from beit_fast.train.world import World


class DropPathDraws:
    """Adds keep, fp32 (2 depth, B) as `Beit.forward_features` takes it, to a rank's batches.

    Nothing where nothing is dropped. Nor with `drop_path_compact`, whose blocks keep a fixed number
    of each micro-batch and draw that themselves, on each rank apart.
    """

    def __init__(self, model: Beit, run: RunConfig, batch_size: int, world: World) -> None:
        rates = [block.drop_path_rate for block in model.blocks for _ in range(2)]
        self._adds = any(rates) and not model.config.drop_path_compact
        self._keep_rates = 1 - torch.tensor(rates, dtype=torch.float64)
        self._seed, self._accumulate = run.seed, run.accumulate
        self._batch_size, self._world = batch_size, world

    def of_rank(self, world: World) -> "DropPathDraws":
        """Those of another rank."""
        draws = copy.copy(self)
        draws._world = world
        return draws

    def added_to(self, batches: Iterator[Batch], start: int) -> Iterator[Batch]:
        """`batches`, of which the first is this rank's micro-batch number `start`; closing this
        closes them."""
        try:
            if not self._adds:
                yield from batches
                return
            drawn, keep = None, None
            for number, batch in enumerate(batches, start):
                step, micro = divmod(number, self._accumulate)
                if step != drawn:
                    drawn, keep = step, self._of_step(step)
                place = (micro * self._world.size + self._world.rank) * self._batch_size
                yield batch | {"keep": keep[:, place : place + self._batch_size].contiguous()}
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def _of_step(self, step: int) -> Tensor:
        """(2 depth, samples of the step)."""
        generator = torch.Generator().manual_seed(counter_seed("drop path", self._seed, step))
        num_samples = self._accumulate * self._world.size * self._batch_size
        uniform = torch.rand(num_samples, len(self._keep_rates), generator=generator)
        return ((uniform < self._keep_rates) / self._keep_rates).float().T
