"""One step: what it sums, what it skips, what it leaves behind."""

import pytest
import torch
from torch import nn

from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.optim import build_optimizer
from beit_fast.train.sentinel import Sentinel
from beit_fast.train.shares import shares_of
from beit_fast.train.step import TrainStep
from task_runs import ALONE

CPU = torch.device("cpu")


class Squares(nn.Module):
    """loss = mean (w x)^2; the metric is the largest x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -1.0]))

    def forward(self, batch):
        return (batch["x"] * self.weight).square().mean(), {"largest": batch["x"].max()}


def step_of(module, **optim):
    optim = OptimConfig(lr=0.1, min_lr=0.1, warmup_steps=0, weight_decay=0.0, **optim)
    optimizer = build_optimizer([{"params": module.parameters()}], optim, CPU)
    run = RunConfig(output="x", steps=1, precision="fp32", bad_steps=1)
    sentinel = Sentinel(optimizer, ALONE, run)
    shares = shares_of(lambda batch: None, run, ALONE)
    return TrainStep(module, optimizer, sentinel, shares=shares, optim=optim, run=run, device=CPU)


def test_micro_batches_average_to_the_step_of_the_whole_batch():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    whole, parts = Squares(), Squares()
    scalars = step_of(whole)([{"x": x}])
    split = step_of(parts)([{"x": part} for part in x.split(2)])
    torch.testing.assert_close(whole.weight, parts.weight)
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(scalars[name], split[name])
    expected = torch.stack([part.max() for part in x.split(2)]).mean()
    torch.testing.assert_close(split["largest"], expected)


def test_the_norm_that_is_reported_is_that_before_clipping():
    module = Squares()
    x = torch.full((1, 2), 10.0)
    scalars = step_of(module, clip_grad=1e-3)([{"x": x}])
    assert float(scalars["grad_norm"]) == pytest.approx(100 * 5**0.5, rel=1e-5)


def test_a_step_leaves_no_gradients_and_a_bad_one_no_change():
    module = Squares()
    take = step_of(module)
    fine = [{"x": torch.ones(1, 2)}] * 2
    take(fine)
    assert module.weight.grad is None
    before = module.weight.detach().clone()
    scalars = take([{"x": torch.ones(1, 2)}, {"x": torch.full((1, 2), torch.inf)}])
    assert not torch.isfinite(scalars["loss"])
    assert torch.equal(module.weight, before)
    take(fine)
    assert torch.equal(module.weight, before)  # nothing is learnt from there on
