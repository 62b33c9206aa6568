"""One optimiser step: forward and backward of each micro-batch, clip, update. Nothing waits.

All that differs from one step to the next (batches, learning rate, the task's schedules, random
state) lies in device tensors or in torch's generators, so the same step can be captured once in a
CUDA graph and replayed (graph.py).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from beit_fast.errors import RunError
from beit_fast.flags import flag
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.optim import clip_gradients
from beit_fast.train.parallel import forward_exchanges, gradient_sync
from beit_fast.train.progress import progress
from beit_fast.train.saving import Saver
from beit_fast.train.shares import Shares
from beit_fast.train.world import World

NEVER = 2**62  # a step number that no run reaches


class NonFiniteLoss(RunError):
    """Loss or gradient norm became NaN or infinite; no step was taken from there on."""


class Sentinel:
    """Notes the first non-finite step on the device, and keeps the optimiser from taking it."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World, start: int) -> None:
        self._world = world
        self._step = torch.tensor(float(start), dtype=torch.float64, device=world.device)
        self._never = torch.full_like(self._step, NEVER)
        self._first_bad = self._never.clone()
        optimizer.found_inf = self._flag = torch.zeros((), device=world.device)

    def watch(self, loss: Tensor, norm: Tensor) -> None:
        """Look at a step's loss and gradient norm, before the optimiser uses the gradients.

        A loss may be bad on one rank alone; none takes the step then. Of any number of ranks one
        number is exchanged, and the host waits for nothing.
        """
        bad = self._world.sum((~(torch.isfinite(loss) & torch.isfinite(norm))).float()) > 0
        self._first_bad.clamp_(max=torch.where(bad, self._step, self._never))
        self._flag.clamp_(min=bad.float())  # stays set: nothing is learnt after a bad step
        self._step += 1

    def check(self, saver: Saver, since: int, done: int) -> None:
        """Raise NonFiniteLoss, on every rank, if there was a non-finite value. Syncs.

        The checkpoints that it names are on the disk: raises as `Saver.wait` does.
        """
        first = int(min(float(self._first_bad), NEVER))
        if first == NEVER:
            return
        kept = saver.wait()
        back = f"go back with {flag('run.resume_from')} ({_steps(kept)}), or "
        back = back if len(kept) > 1 else ""
        raise NonFiniteLoss(
            f"loss or gradient norm is not finite between steps {since + 1} and {done}, first at "
            f"step {first + 1}: no weight was changed from there on. "
            + (f"The last good checkpoint is {kept[-1]}. " if kept else "There is no checkpoint. ")
            + f"The same command meets the same numbers: lower {flag('optim.lr')}, lengthen the "
            f"warm-up ({flag('optim.warmup_steps')}) or clip harder ({flag('optim.clip_grad')}), "
            "and it goes on from there. Where that ends here again, the weights had gone off "
            f"before: {back}start over in another {flag('run.output')}"
        )


def _steps(paths: list[Path]) -> str:
    return ", ".join(str(int(path.name.removeprefix("step_"))) for path in paths)


def autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """The precision of a run's forward pass, as a context."""
    emulated = run.precision == "fp8" and device.type == "cpu"  # in fp32
    enabled = run.precision != "fp32" and not emulated
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class TrainStep:
    """Called with the micro-batches of a step, it takes the step and returns its scalars.

    `module` maps a micro-batch to (loss, metrics), and `shares` says what each counts for. The
    scalars are `loss`, `grad_norm` and the metrics, weighted as the loss is; on the device,
    detached.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        sentinel: Sentinel,
        *,
        shares: Shares,
        optim: OptimConfig,
        run: RunConfig,
        device: torch.device,
    ) -> None:
        self._module, self._optimizer, self._sentinel = module, optimizer, sentinel
        self._shares = shares
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._clip_grad, self._run, self._device = optim.clip_grad, run, device
        self._waits = forward_exchanges(module)

    def __call__(self, micro_batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        shares = self._shares(micro_batches)
        sums: dict[str, Tensor] = {}
        for i, (batch, share) in enumerate(zip(micro_batches, shares, strict=True)):
            with gradient_sync(self._module, last=i == len(micro_batches) - 1):
                with autocast(self._run, self._device):
                    progress("in the forward pass", waits=self._waits)
                    loss, metrics = self._module(batch)
                loss = loss * share
                progress("in the backward pass, which exchanges gradients", waits=True)
                loss.backward()
            scalars = {"loss": loss.detach()} | {k: v.detach() * share for k, v in metrics.items()}
            sums = {name: sums[name] + v if sums else v for name, v in scalars.items()}
        progress("updating the weights")
        norm = clip_gradients(self._parameters, self._clip_grad)
        self._sentinel.watch(sums["loss"], norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return sums | {"grad_norm": norm}
