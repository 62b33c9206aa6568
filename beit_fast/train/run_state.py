"""What a checkpoint holds of a run, besides its settings: weights, averages, optimiser, counts."""

import torch
from torch import Tensor, nn

from beit_fast.flags import flag
from beit_fast.train.average import Average
from beit_fast.train.log import Meter
from beit_fast.train.optim import load_optimizer_tensors, optimizer_tensors
from beit_fast.train.parallel import whole
from beit_fast.train.resume import Resume
from beit_fast.train.sentinel import Sentinel
from beit_fast.train.state import CheckpointError
from beit_fast.train.task import Task
from beit_fast.train.world import World

Tensors = dict[str, dict[str, Tensor]]  # of a checkpoint: file stem, name


class RunState:
    """The parts of a run that change, and how a checkpoint's tensors become them.

    Weights are loaded first, for what is made of them (averages, wrappers for several ranks, the
    optimiser); the rest once there is an optimiser. Counters are saved as the sum of all ranks',
    and each rank's unread metrics beside one another: both mean the same on any number of ranks.
    """

    def __init__(self, task: Task, meter: Meter, ema: Average | None, world: World) -> None:
        self._task, self._meter, self._ema, self._world = task, meter, ema, world

    def tensors(self, optimizer: torch.optim.Optimizer, sentinel: Sentinel) -> Tensors:
        """Those of a checkpoint on the main rank, whole; called on every rank, none elsewhere.

        What is kept in parts is on the CPU, put together one tensor after the other; the rest is on
        whatever device it is. Counters are summed and unread metrics gathered.
        """
        task, world = self._task, self._world
        counters = {f"counter/{name}": world.sum(v) for name, v in task.counters.items()}
        meter = self._meter.state(world)
        tensors = {
            "model": task.model.state_dict(),
            "optimizer": optimizer_tensors(optimizer, task.model),
            "run": meter | counters | sentinel.state(),
        }
        if self._ema is not None:
            tensors["ema"] = self._ema.module.state_dict()
        collected: Tensors = {stem: {} for stem in tensors} if world.is_main else {}
        for stem, values in tensors.items():
            for name, value in values.items():
                of_all = whole(value)
                if world.is_main:
                    collected[stem][name] = of_all if of_all is value else of_all.cpu()
        return collected

    def load_weights(self, resume: Resume) -> None:
        """Raises CheckpointError for weights of another model."""
        tensors = resume.checkpoint.tensors
        _load_weights(self._task.model, resume, tensors["model"])
        if self._ema is not None:  # without averages, they start at the weights of now
            _load_weights(self._ema.module, resume, tensors.get("ema", tensors["model"]))

    def load_rest(
        self, optimizer: torch.optim.Optimizer, sentinel: Sentinel, tensors: Tensors
    ) -> None:
        """Optimiser and counts. Raises ValueError as `load_optimizer_tensors` does."""
        sentinel.load_state(tensors["run"])
        load_optimizer_tensors(optimizer, self._task.model, tensors["optimizer"])
        self._meter.load_state(tensors["run"], self._world)
        for name, counter in self._task.counters.items():
            counter.zero_()
            if self._world.is_main:  # once: what is read is the sum of all ranks'
                counter.copy_(tensors["run"][f"counter/{name}"])


def _load_weights(model: nn.Module, resume: Resume, tensors: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the weights of {resume.checkpoint.path} are not of the model that the settings "
            f"describe ({why}): give the settings of that run, or another {flag('run.output')}"
        ) from error
