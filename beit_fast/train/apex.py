"""NVIDIA apex's FusedAdam in the place of torch's fused AdamW, where it is installed.

The package called apex on PyPI is another one. Source: github.com/NVIDIA/apex,
`apex/optimizers/fused_adam.py`
"""

from typing import Any

import torch
from torch import Tensor

from beit_fast.flags import flag


def apex_adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """AdamW by apex, capturable: rate and step count are device tensors.

    As with torch's, a tensor assigned to `found_inf` makes `step()` skip where it is 1, and the
    state of a parameter holds `exp_avg`, `exp_avg_sq` and `step`. Raises ValueError where NVIDIA's
    apex is not installed, and for weights that are not on a GPU.
    """
    for device in {p.device for group in groups for p in group["params"]}:
        check_apex(device)
    fused_adam = _import_fused_adam()
    return _subclass(fused_adam)(groups, adam_w_mode=True, capturable=True, **options)


def check_apex(device: torch.device) -> None:
    """Raise ValueError where `apex_adamw` cannot train weights of this device."""
    _import_fused_adam()
    if device.type != "cuda":
        raise ValueError(
            f"optim.backend is apex, which needs a GPU: pass {flag('optim.backend')} torch"
        )


def _import_fused_adam() -> type[torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            f"optim.backend is apex, and NVIDIA's apex is not installed ({error}; PyPI's package "
            "of that name is an unrelated one): build it from github.com/NVIDIA/apex with its CUDA "
            f"extensions, or pass {flag('optim.backend')} torch"
        ) from error
    return FusedAdam


def _subclass(fused_adam: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    class ApexAdamW(fused_adam):
        found_inf: Tensor | None = None

        def step(self) -> None:
            for group in self.param_groups:  # apex counts by group, checkpoints by parameter
                loaded = [self.state[p] for p in group["params"] if "step" in self.state[p]]
                if loaded and "step" not in group:
                    group["step"] = loaded[0]["step"].to(torch.int)
            super().step(grad_scaler=None if self.found_inf is None else _Verdict(self.found_inf))
            for group in self.param_groups:
                for parameter in group["params"]:
                    if self.state[parameter]:
                        self.state[parameter]["step"] = group["step"]

    return ApexAdamW


class _Verdict:
    """What apex asks of a gradient scaler: whether to skip, and a scale of 1."""

    def __init__(self, found_inf: Tensor) -> None:
        self._found_inf = found_inf.reshape(1)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict:
        return {p.device: self._found_inf for g in optimizer.param_groups for p in g["params"]}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self._found_inf)
