"""Schedule, clipping and the optimiser's state."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.optim import (
    Schedule,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    warmup_steps,
    weight_decay_at,
)


def test_the_schedule_has_the_values_of_the_original():
    optim = OptimConfig(lr=1.5e-3, min_lr=1e-5, warmup_epochs=10)
    total = RunConfig(output="x", epochs=800).num_steps(625)
    assert total == 500_000
    warmup = warmup_steps(optim, total, 625)
    assert warmup == 6250

    def lr(step):
        return lr_at(step, optim, total, warmup)

    assert lr(0) == 0
    assert lr(1) == pytest.approx(2.4004e-7, rel=1e-4)
    assert lr(6249) == lr(6250) == pytest.approx(1.5e-3)
    assert lr(250_000) == pytest.approx(7.6981e-4, rel=1e-4)
    assert lr(499_999) == pytest.approx(1.0000000015e-5, rel=1e-9)


def test_the_rate_stays_the_same_tensor(model):
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)
    optimizer = build_optimizer([{"params": model.parameters()}], optim, torch.device("cpu"))
    rate = optimizer.param_groups[0]["lr"]
    schedule = Schedule(optimizer, optim, num_steps=6, warmup=2, start=0)
    for step in range(6):
        assert float(rate) == pytest.approx(lr_at(step, optim, 6, 2), rel=1e-6)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate


def test_a_schedule_started_late_has_the_rate_of_that_step(model):
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)
    optimizer = build_optimizer([{"params": model.parameters()}], optim, torch.device("cpu"))
    Schedule(optimizer, optim, num_steps=9, warmup=2, start=5)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr_at(5, optim, 9, 2), rel=1e-6)


def test_a_group_with_a_scale_has_its_share_of_the_rate(model):
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=0)
    groups = [{"params": [model.weight], "lr_scale": 0.1}, {"params": [model.bias]}]
    optimizer = build_optimizer(groups, optim, torch.device("cpu"))
    Schedule(optimizer, optim, num_steps=9, warmup=0, start=4)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * lr_at(4, optim, 9, 0), lr_at(4, optim, 9, 0)], rel=1e-6)


def test_the_decay_may_end_before_the_run():
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=0, decay_steps=10)
    assert lr_at(5, optim, 100, 0) == pytest.approx(5.5e-3)
    assert lr_at(10, optim, 100, 0) == lr_at(99, optim, 100, 0) == pytest.approx(1e-3)


@pytest.mark.parametrize(("power", "min_lr"), [(1.0, 0.0), (0.9, 0.0), (2.0, 1e-4)])
def test_the_poly_schedule_is_mmcvs_at_every_step_of_every_group(model, power, min_lr):
    """Against mmcv's hook as it goes, a step after the other, in double precision."""
    num_steps, warmup, base = 60, 15, 1e-2
    optim = OptimConfig(
        lr=base, min_lr=min_lr, schedule="poly", poly_power=power, warmup_steps=warmup
    )
    groups = [{"params": [model.weight], "lr_scale": 0.65**3}, {"params": [model.bias]}]
    optimizer = build_optimizer(groups, optim, torch.device("cpu"))
    schedule = Schedule(optimizer, optim, num_steps=num_steps, warmup=warmup, start=0)
    done = Fraction(0)  # of the run
    for step in range(num_steps):
        decayed = float(1 - done) ** power * (base - min_lr) + min_lr
        to_come = 1 - min(step, warmup) / warmup  # of the warm-up
        regular = decayed - decayed * to_come * 0.999999
        assert lr_at(step, optim, num_steps, warmup) == pytest.approx(regular, rel=1e-12)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        assert rates == pytest.approx([regular * 0.65**3, regular], rel=2e-7)  # fp32's rounding
        optimizer.step()
        schedule.step()
        done += Fraction(1, num_steps)
    assert lr_at(0, optim, num_steps, warmup) == pytest.approx(base * 1e-6)
    assert lr_at(num_steps, optim, num_steps, warmup) == min_lr == lr_at(99, optim, num_steps, 15)


def test_the_published_poly_schedule_has_the_originals_values():
    optim = OptimConfig(lr=3e-5, min_lr=0.0, schedule="poly", warmup_steps=1500)

    def lr(step):
        return lr_at(step, optim, 160_000, 1500)

    assert lr(0) == pytest.approx(3e-11)
    assert lr(750) == pytest.approx(3e-5 * (1 - 750 / 160_000) * 0.5000005)
    assert lr(1500) == pytest.approx(3e-5 * 158.5 / 160)
    assert lr(80_000) == pytest.approx(1.5e-5)
    assert lr(159_999) == pytest.approx(3e-5 / 160_000)
    assert lr_at(0, optim, 160_000, 0) == 3e-5  # without a warm-up


def test_a_poly_schedule_may_end_before_the_run_and_a_cosine_has_no_power():
    optim = OptimConfig(lr=1e-2, min_lr=0.0, schedule="poly", warmup_steps=0, decay_steps=10)
    assert lr_at(5, optim, 100, 0) == pytest.approx(5e-3)
    assert lr_at(10, optim, 100, 0) == lr_at(99, optim, 100, 0) == 0
    with pytest.raises(ValueError, match=r"poly_power is 0\.9 .* --optim\.schedule poly, or leave"):
        OptimConfig(poly_power=0.9)
    assert OptimConfig(schedule="poly", poly_power=0.9).poly_power == 0.9
    assert OptimConfig(poly_power=1.0) == OptimConfig()


def test_gradients_are_clipped_to_the_global_norm(model):
    model(torch.ones(2, 4)).sum().mul(100).backward()
    parameters = list(model.parameters())
    whole = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    each = [0.0 if p.grad is None else float(p.grad.norm()) for p in parameters]
    norm, norms = clip_gradients(parameters, 1.0)
    assert norm > 1
    assert torch.equal(norm, whole)
    assert norms.tolist() == pytest.approx(each)
    left = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(left) == pytest.approx(1.0, rel=1e-4)


def test_optimiser_state_survives_a_round_trip_by_name(model):
    optim = OptimConfig(lr=1e-2, min_lr=1e-3)
    optimizer = build_optimizer([{"params": model.parameters()}], optim, torch.device("cpu"))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer, model)
    assert {"exp_avg/weight", "exp_avg_sq/bias", "step/weight"} <= tensors.keys()
    other = build_optimizer([{"params": model.parameters()}], optim, torch.device("cpu"))
    load_optimizer_tensors(other, model, tensors)
    for name, value in optimizer_tensors(other, model).items():
        assert torch.equal(value, tensors[name])
    with pytest.raises(ValueError, match="no such parameter"):
        load_optimizer_tensors(other, model, tensors | {"exp_avg/x": torch.ones(1)})
    with pytest.raises(ValueError, match="no optimiser state for 1 parameters: bias"):
        load_optimizer_tensors(
            other, model, {k: v for k, v in tensors.items() if not k.endswith("bias")}
        )


def test_loaded_moments_lie_in_memory_as_their_weights_do():
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(
        [{"params": model.parameters()}], OptimConfig(lr=1e-2, min_lr=1e-3), torch.device("cpu")
    )
    model(torch.ones(2, 4, 5, 5)).sum().backward()
    optimizer.step()
    saved = {name: v.contiguous() for name, v in optimizer_tensors(optimizer, model).items()}
    load_optimizer_tensors(optimizer, model, saved)
    assert optimizer.state[model.weight]["exp_avg"].stride() == model.weight.stride()
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], saved["exp_avg/weight"])


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="the warm-up takes 10 of 10 steps"):
        warmup_steps(OptimConfig(warmup_steps=10), 10, 5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 1, "epochs": 1}, "--run.steps is 1 and --run.epochs is 1: give exactly one"),
        ({}, "give exactly one"),
        ({"steps": 0}, "steps is 0: give a whole number"),
        ({"steps": 1, "log_every": 0}, "log_every is 0"),
    ],
)
def test_an_impossible_run_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(output="x", **wrong)


def test_more_epochs_than_a_checkpoint_can_name_are_refused():
    run = RunConfig(output="x", epochs=1e6, accumulate=2)
    assert run.num_steps(199) == 99_500_000
    with pytest.raises(ValueError, match=r"--run\.epochs 1e\+06 are 100000000 steps: at"):
        run.num_steps(200)


@pytest.fixture
def model():
    return nn.Linear(4, 3)


def test_a_scheduled_decay_is_adamws_with_the_decay_of_each_step(model):
    optim = OptimConfig(
        lr=1e-2, min_lr=1e-3, warmup_steps=2, weight_decay=0.5, weight_decay_end=0.1
    )
    expected = copy.deepcopy(model)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, optim, torch.device("cpu"))
    optimizer.found_inf = torch.zeros(())
    schedule = Schedule(optimizer, optim, num_steps=6, warmup=2, start=0)
    plain = torch.optim.AdamW(
        [{"params": [expected.weight]}, {"params": [expected.bias]}], lr=1e-2, fused=True
    )
    for step in range(6):
        decay = weight_decay_at(step, optim, 6)
        for group, value in zip(plain.param_groups, (decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = lr_at(step, optim, 6, 2), value
        for m, o in ((model, optimizer), (expected, plain)):
            m(torch.full((2, 4), 0.1 * step)).square().sum().backward()
            o.step()
            o.zero_grad()
        schedule.step()
    torch.testing.assert_close(model.weight, expected.weight)
    torch.testing.assert_close(model.bias, expected.bias)
    assert weight_decay_at(0, optim, 6) == 0.5
    assert weight_decay_at(6, optim, 6) == pytest.approx(0.1)
    before = model.weight.detach().clone()
    optimizer.found_inf.fill_(1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before)  # neither decayed nor updated
