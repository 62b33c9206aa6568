"""apex's optimiser behind our interface, with a stand-in for the package."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from beit_fast.train import apex
from beit_fast.train.config import OptimConfig
from beit_fast.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors

CPU = torch.device("cpu")


class FusedAdam(torch.optim.Optimizer):
    """The calls and the state of apex's: a step count for each group, skipping by a scaler."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, capturable):
        assert adam_w_mode
        assert capturable
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, grad_scaler=None):
        for group in self.param_groups:
            group.setdefault("step", torch.zeros(1, dtype=torch.int))
            found = grad_scaler._check_inf_per_device(self) if grad_scaler else {}
            if any(bool(flag) for flag in found.values()):
                continue
            group["step"] += 1
            n, (b1, b2) = int(group["step"]), group["betas"]
            for p in group["params"]:
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = (state["exp_avg_sq"] / (1 - b2**n)).sqrt() + group["eps"]
                p.sub_(group["lr"] * state["exp_avg"] / (1 - b1**n) / root)


@pytest.fixture
def installed(monkeypatch):
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


@pytest.fixture
def on_cpu(monkeypatch):
    """The adapter without its check of the device."""

    def build(groups, **options):
        made = apex._subclass(apex._import_fused_adam())
        return made(groups, adam_w_mode=True, capturable=True, **options)

    monkeypatch.setattr("beit_fast.train.optim.apex_adamw", build)


def build(model, backend):
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, backend=backend)
    return build_optimizer([{"params": list(model.parameters())}], optim, CPU)


def learn(model, optimizer, steps):
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_without_apex_the_error_says_which_package_and_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match=r"github\.com/NVIDIA/apex.*--optim\.backend torch"):
        build(nn.Linear(4, 3), "apex")


def test_the_unrelated_package_is_told_from_nvidias(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # has no optimizers
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    with pytest.raises(ValueError, match="PyPI's package of that name is an unrelated one"):
        build(nn.Linear(4, 3), "apex")


@pytest.mark.usefixtures("installed")
def test_weights_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match=r"needs a GPU: pass --optim\.backend torch"):
        build(nn.Linear(4, 3), "apex")


@pytest.mark.usefixtures("installed", "on_cpu")
def test_it_learns_skips_and_resumes_as_torchs_does():
    models = {}
    for backend in ("torch", "apex"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = build(model, backend)
        optimizer.found_inf = torch.zeros(())
        learn(model, optimizer, 3)
        optimizer.found_inf.fill_(1)
        learn(model, optimizer, 2)
        saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, model).items()}
        assert float(saved["step/weight"]) == 3
        resumed = build(model, backend)
        load_optimizer_tensors(resumed, model, saved)
        learn(model, resumed, 2)
        assert float(optimizer_tensors(resumed, model)["step/bias"]) == 5
        models[backend] = model
    torch.testing.assert_close(models["torch"].weight, models["apex"].weight)
