"""The optimiser and its schedule.

cosine
    lr(s) = lr * s / (W - 1)                                          s < W    warm-up
    lr(s) = min_lr + (lr - min_lr) / 2 * (1 + cos(pi (s - W) / (S - W)))
poly
    p(s)  = min_lr + (lr - min_lr) * (1 - s / S)^power
    lr(s) = p(s) * (1 - (1 - s / W) * (1 - 1e-6))                     s < W    warm-up
    lr(s) = p(s)
both
    lr(s) = min_lr                                                    s >= S
    wd(s) = wd_end + (wd - wd_end) / 2 * (1 + cos(pi s / S))

S optimiser steps (the run's, unless `decay_steps` is given), the first W of them warm-up.
Source: unilm beit `cosine_scheduler` (spec 6); mmcv's `PolyLrUpdaterHook`, whose decay counts from
the first step and whose warm-up multiplies it, with unilm's warmup_ratio (spec 9.2).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from beit_fast.flags import flag
from beit_fast.train.apex import apex_adamw
from beit_fast.train.config import OptimConfig
from beit_fast.train.parallel import own_part, part_like, whole

POLY_WARMUP_RATIO = 1e-6  # of the rate at the first step


def lr_at(step: int, optim: OptimConfig, num_steps: int, warmup_steps: int) -> float:
    """Learning rate of 0-based optimiser step `step`; a cosine's first warm-up step has rate 0."""
    end = num_steps if optim.decay_steps is None else optim.decay_steps
    if optim.schedule == "poly":
        left = max(0.0, 1 - step / end) ** optim.poly_power
        rate = optim.min_lr + (optim.lr - optim.min_lr) * left
        cold = max(0.0, 1 - step / warmup_steps) if warmup_steps else 0.0
        return rate * (1 - cold * (1 - POLY_WARMUP_RATIO))
    if step < warmup_steps:
        return optim.lr * step / max(1, warmup_steps - 1)
    progress = min(1.0, (step - warmup_steps) / max(1, end - warmup_steps))
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress))


def weight_decay_at(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Weight decay of 0-based optimiser step `step`."""
    if optim.weight_decay_end is None:
        return optim.weight_decay
    progress = min(1.0, step / max(1, num_steps))
    span = optim.weight_decay - optim.weight_decay_end
    return optim.weight_decay_end + 0.5 * span * (1 + math.cos(math.pi * progress))


def warmup_steps(optim: OptimConfig, num_steps: int, steps_per_epoch: float) -> int:
    """Warm-up in optimiser steps. Raises ValueError if it leaves no step to train."""
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = int(optim.warmup_epochs * steps_per_epoch)
    if warmup >= num_steps:
        raise ValueError(
            f"the warm-up takes {warmup} of {num_steps} steps: shorten it "
            f"({flag('optim.warmup_steps')} or {flag('optim.warmup_epochs')}) or train longer"
        )
    return warmup


def build_optimizer(
    groups: Iterable[dict], optim: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW in one launch over all weights: torch's, or apex's where `optim.backend` says so.

    The rate is a device tensor, so a captured graph sees it change; so is the weight decay where it
    is scheduled, at the price of one more pass over the weights. A group's `lr_scale` (timm's name;
    1 where absent) multiplies its rate over the whole run. A tensor assigned to
    `optimizer.found_inf` makes `step()` skip on the device where it is 1. Raises ValueError as
    `apex_adamw` does.
    """
    groups = [{**group, "lr": torch.tensor(optim.lr, device=device)} for group in groups]
    if optim.weight_decay_end is not None:
        for group in groups:
            if group.get("weight_decay", optim.weight_decay):
                group["decay"] = torch.tensor(optim.weight_decay, device=device)
                group["weight_decay"] = 0.0
    options = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.backend == "apex":
        optimizer = apex_adamw(groups, lr=optim.lr, **options)
    else:
        lr = torch.tensor(optim.lr, device=device)
        optimizer = torch.optim.AdamW(
            groups, lr=lr, fused=True, capturable=device.type == "cuda", **options
        )
    optimizer.register_step_pre_hook(_decay)
    return optimizer


def _decay(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Multiply weights by 1 - lr wd, as AdamW does, where the decay is a tensor."""
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if p.grad is not None]
        if "decay" in group and weights:
            factor = 1 - group["lr"] * group["decay"]
            if getattr(optimizer, "found_inf", None) is not None:
                factor = torch.where(optimizer.found_inf > 0, 1.0, factor)
            with torch.no_grad():
                torch._foreach_mul_(weights, factor)


class Schedule:
    """Fills the tensors of learning rate and weight decay in place, as a captured graph needs."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
        *,
        num_steps: int,
        warmup: int,
        start: int,
    ) -> None:
        self._optimizer, self._optim = optimizer, optim
        self._num_steps, self._step = num_steps, start
        for group in optimizer.param_groups:
            peak = optim.lr * group.get("lr_scale", 1.0)
            group["initial_lr"] = torch.full_like(group["lr"], peak)
        self._rates = LambdaLR(
            optimizer,
            lambda step: lr_at(step, optim, num_steps, warmup) / optim.lr,
            last_epoch=start - 1,
        )
        self._fill_decay()

    def step(self) -> None:
        """Go on to the next optimiser step."""
        self._step += 1
        self._rates.step()
        self._fill_decay()

    def _fill_decay(self) -> None:
        for group in self._optimizer.param_groups:
            if "decay" in group:
                group["decay"].fill_(weight_decay_at(self._step, self._optim, self._num_steps))


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Scale the gradients to a global L2 norm of at most `max_norm`.

    Returns the norm before, a scalar, and those that it is made of, (T,): of each parameter, or of
    what this rank keeps of it; 0 for one without a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients, 2)  # as torch's `get_total_norm` goes about it
    norm = whole(torch.linalg.vector_norm(torch.stack(norms), 2))
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    found, none = iter(norms), torch.zeros_like(norm)
    return norm, torch.stack(
        [none if p.grad is None else own_part(next(found)) for p in parameters]
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `<kind>/<parameter name>` -> tensor, ready for safetensors.

    In the same order on every rank, for parts are gathered in it: files are read in any.
    """
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in sorted(optimizer.state.get(parameter, {}).items())
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`. Raises ValueError naming what is unknown or missing."""
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            raise ValueError(f"optimiser state for {name!r}: the model has no such parameter")
        state.setdefault(name, {})[kind] = value
    trained = {
        name
        for name, parameter in parameters.items()
        if any(parameter is p for group in optimizer.param_groups for p in group["params"])
    }
    if missing := sorted(trained - state.keys()):
        raise ValueError(
            f"no optimiser state for {len(missing)} parameters: {', '.join(missing[:4])}"
        )
    for name, values in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            kind: _laid_out_as(parameter, value) for kind, value in values.items()
        }


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` on the parameter's device; with its strides too where the shapes agree.

    The fused optimiser walks through memory, so a channels-last weight needs channels-last moments.
    Of a weight that ranks keep in parts, this rank's part.
    """
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    value = part_like(parameter, value)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
