"""How ranks share a model: what they cannot, and the parts that need no other rank.

Whole runs on two ranks are in tests/tasks/test_parallel.py.
"""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from beit_fast.train.average import Average
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.parallel import check_parallel, forward_exchanges, parallel
from beit_fast.train.world import World
from task_runs import ALONE

TWO = World(0, 2, torch.device("cpu"))


def check(world=TWO, backend="torch", **run):
    check_parallel(RunConfig(output="x", steps=1, **run), OptimConfig(backend=backend), world)


def test_graphs_of_the_compiler_are_refused_where_gradients_are_exchanged():
    options = {"compile": "reduce-overhead"}
    with pytest.raises(ValueError, match=r"2 processes .*: pass --run\.compile default$"):
        check(**options)
    check(ALONE, **options)
    check(compile="default")


def test_apex_is_refused_for_weights_in_parts():
    options = {"parallel": "fsdp", "backend": "apex"}
    with pytest.raises(ValueError, match=r"backend torch, or --run\.parallel ddp$"):
        check(**options)
    check(ALONE, **options)
    check(**options | {"backend": "torch"})
    check(**options | {"parallel": "ddp"})


def test_what_ranks_cannot_do_together_is_refused_before_the_first_step(tmp_path, run_toy):
    with pytest.raises(ValueError, match="apex"):
        run_toy(tmp_path, world=TWO, parallel="fsdp", optim=OptimConfig(backend="apex"))


def test_one_process_shares_with_nobody(tmp_path, run_toy):
    """Whatever the settings say, it trains the plain module, to the last bit."""
    run_toy(tmp_path / "plain")
    task, outcome = run_toy(tmp_path / "alone", parallel="fsdp", gradient_dtype="bf16")
    assert outcome.trained is task.model
    plain, _ = run_toy(tmp_path / "plain")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, task.model.state_dict()[name])
    module = nn.Linear(2, 2)
    ways = parallel(RunConfig(output="x", steps=1, parallel="fsdp"), ALONE, module)
    assert ways.wrap(module) is module


def test_averages_are_timms():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    ours, theirs = Average(model, 0.9), ModelEmaV3(model, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 2, 3, 3))
        ours.update(model)
        theirs.update(model)
    for name, value in theirs.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], value), name
    assert not ours.module.training
    assert not torch.equal(ours.module[0].weight, model[0].weight)


def test_ranks_wait_for_each_other_in_the_forward_pass_where_batch_norm_is_of_all():
    assert forward_exchanges(nn.Sequential(nn.SyncBatchNorm(2)))
    assert not forward_exchanges(nn.Sequential(nn.BatchNorm2d(2)))
