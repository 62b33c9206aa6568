"""Averaged weights: an exponential moving average over steps, of buffers too.

    average = decay average + (1 - decay) weights

Source: timm's `ModelEmaV3`, without its warm-up; here also of weights that ranks keep in parts,
each of which averages its own.
"""

import copy

import torch
from torch import nn

from beit_fast.train.parallel import own_part


class Average:
    """`module` is a copy of the model, in eval mode, which `update` moves towards the model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Once after each step. Whole numbers, as counts of batches, are copied."""
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        averages, weights = [], []
        for average, weight in pairs:
            if average.is_floating_point():
                averages.append(own_part(average))
                weights.append(own_part(weight))
            else:
                average.copy_(weight)
        torch._foreach_lerp_(averages, weights, weight=1 - self._decay)
