"""One optimiser step: forward and backward of each micro-batch, clip, update. Nothing waits.

All that differs from one step to the next (batches, learning rate, the task's schedules, random
state) lies in device tensors or in torch's generators, so the same step can be captured once in a
CUDA graph and replayed (graph.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.optim import clip_gradients
from beit_fast.train.parallel import forward_exchanges, gradient_sync
from beit_fast.train.progress import progress
from beit_fast.train.sentinel import Sentinel, Statistics
from beit_fast.train.shares import Shares

WATCHED = "watched"


def autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """The precision of a run's forward pass, as a context."""
    emulated = run.precision == "fp8" and device.type == "cpu"  # in fp32
    enabled = run.precision != "fp32" and not emulated
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class TrainStep:
    """Called with the micro-batches of a step, it takes the step and returns its scalars.

    `module` maps a micro-batch to (loss, metrics), and `shares` says what each counts for. The
    scalars are `loss`, `grad_norm` and the metrics, weighted as the loss is; on the device,
    detached. Besides, under WATCHED, what the sentinel noted.
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
        self._statistics = Statistics(module)

    def __call__(self, micro_batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        shares = self._shares(micro_batches)
        statistics = self._statistics.of_now()
        sums: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for i, (batch, share) in enumerate(zip(micro_batches, shares, strict=True)):
            with gradient_sync(self._module, last=i == len(micro_batches) - 1):
                with autocast(self._run, self._device):
                    progress("in the forward pass", waits=self._waits)
                    loss, metrics = self._module(batch)
                losses.append(loss.detach())
                loss = loss * share
                progress("in the backward pass, which exchanges gradients", waits=True)
                loss.backward()
            scalars = {"loss": loss.detach()} | {k: v.detach() * share for k, v in metrics.items()}
            sums = {name: sums[name] + v if sums else v for name, v in scalars.items()}
        progress("updating the weights")
        norm, norms = clip_gradients(self._parameters, self._clip_grad)
        watched = self._sentinel.watch(losses, sums["loss"], norm, norms)
        self._statistics.restore(statistics, self._sentinel.lost)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return sums | {"grad_norm": norm, WATCHED: watched}
