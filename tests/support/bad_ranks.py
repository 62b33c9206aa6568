"""Bad steps of the toy, planted, on the ranks that torchrun starts: `bad_ranks.py FOLDER`.

Each run has a folder below it, with what each rank saw in `rank_R.json`: `states`, a digest of
weights and moments before each step and at the end, and the `error` that ended it.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from beit_fast.train import loop
from beit_fast.train.bad_steps import NonFiniteLoss
from beit_fast.train.stop import Interrupted
from beit_fast.train.world import World, open_world
from beit_fast_main import _end_rank
from faults import Injector
from toy import ToyTask, train_toy

STEPS = 9
# Of each run: faults as RANK:MICRO-BATCH:FAULT, and what is set.
RUNS = {
    **{
        f"position_{place}": (
            [f"1:{3 * 3 + place + 1}:{fault}"],
            {"accumulate": 3, "save_every": 5},
        )
        for place, fault in enumerate(("nan", "inf", "nan_value"))
    },
    "three": (["1:4:nan_value", "1:5:nan_value", "1:6:inf"], {"save_every": 1}),
    "first": (["1:4:nan_value"], {"bad_steps": 1, "log_every": 1}),
    "gradient": (["0:4:nan_gradient"], {}),
    "fsdp": (["1:8:nan", "0:13:inf"], {"parallel": "fsdp", "accumulate": 2}),
    "spike": (["1:2:spike", "1:6:spike"], {"spike": 4.0, "spike_window": 3}),
    "whole": (["1:4:nan", "0:5:inf", "1:8:spike"], {"spike": 4.0, "spike_window": 3}),
    "parts": (["1:4:nan", "0:5:inf", "1:8:spike"], {"spike": 4.0, "spike_window": 3}),
    "row": (["1:4:nan", "0:5:inf", "1:6:nan"], {}),
}
STOPPED = {"parts": 5, "row": 5}  # by a signal in that step, and started again


class BadTask(ToyTask):
    """The toy with faults in a micro-batch's loss or gradient, by its number from 1 on."""

    def __init__(self, output: Path, world: World, faults: list[str], accumulate: int) -> None:
        super().__init__(world=world, dropout=0.0)
        self._injector = Injector(output, faults, rank=world.rank)
        self._accumulate, self._number = accumulate, 0
        self.states: list[str] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.stops_in: int | None = None
        self.model[-1].weight.register_hook(
            lambda gradient: self._injector.meet("gradient", self._number, gradient)
        )

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._number = step * self._accumulate
        self.states.append(self.digest())
        if step + 1 == self.stops_in:
            os.kill(os.getpid(), signal.SIGTERM)

    def loss(self, batch):
        self._number += 1
        loss, metrics = super().loss(batch)
        return self._injector.meet("loss", self._number, loss), metrics

    def digest(self) -> str:
        """Of weights and moments, of this rank's parts."""
        digest = hashlib.sha256()
        assert self.optimizer is not None
        values = [*self.model.state_dict().values()]
        for parameter in self.model.parameters():
            state = self.optimizer.state[parameter]
            values += [state[name] for name in sorted(state)]
        for value in values:
            value = value.to_local() if hasattr(value, "to_local") else value
            digest.update(value.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()


def bad_run(
    output: Path,
    faults: list[str],
    world: World,
    *,
    stops_in: int | None = None,
    accumulate: int = 1,
    **changes,
) -> dict:
    """Train the toy for nine steps; what this rank saw."""
    output.mkdir(exist_ok=True, parents=True)
    task = BadTask(output, world, faults, accumulate)
    task.stops_in, build = stops_in, loop.build_optimizer

    def built(*args):
        task.optimizer = build(*args)
        return task.optimizer

    changes = {"steps": STEPS, "log_every": 3, "keep": 20, "ema_decay": None} | changes
    error = ""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
        patch.setattr(loop, "build_optimizer", built)
        try:
            train_toy(output, task, world, accumulate=accumulate, **changes)
        except NonFiniteLoss as problem:
            error = str(problem)
    return {"states": [*task.states, task.digest()], "error": error}


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        for name, (faults, changes) in RUNS.items():
            output = folder / name
            if name in STOPPED:
                bad_run(output, faults, world, stops_in=STOPPED[name], **changes)
            saw = bad_run(output, faults, world, **changes)
            (output / f"rank_{world.rank}.json").write_text(json.dumps(saw))
    return 0


if __name__ == "__main__":
    _end_rank(main(Path(sys.argv[1])))
