"""The one training loop: fetch, schedule, take a step, log, evaluate, save.

A task says what is trained; the loop knows nothing of it but the methods of `Task` (task.py).
Randomness is a function of (seed, step, rank), data of the micro-batch's number, so a resumed run
is the same run: on a CPU, to the last bit. What belongs to a sample (crop, mask, drop path) comes
with its batch, the same on whatever rank.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from beit_fast.train.agreement import flat
from beit_fast.train.aside import Aside
from beit_fast.train.average import Average
from beit_fast.train.bad_steps import BadSteps
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.graph import graphed, preparation
from beit_fast.train.images import follow
from beit_fast.train.kept_config import write_config
from beit_fast.train.length import Length, run_length
from beit_fast.train.lock import sole_user
from beit_fast.train.log import METRICS, Log, Meter, read_metrics
from beit_fast.train.memory import sizes_told
from beit_fast.train.optim import (
    Schedule,
    build_optimizer,
    lr_at,
)
from beit_fast.train.parallel import begin_alike, check_parallel, parallel
from beit_fast.train.prefetch import InFlight, device_batches
from beit_fast.train.progress import progress, unhurried
from beit_fast.train.resume import Resume, find_resume
from beit_fast.train.run_state import RunState
from beit_fast.train.saving import Saver
from beit_fast.train.seeds import step_seed
from beit_fast.train.sentinel import Sentinel
from beit_fast.train.settings import complete_settings, start_of
from beit_fast.train.shares import shares_of
from beit_fast.train.step import WATCHED, TrainStep
from beit_fast.train.stop import Interrupted, stop_signals
from beit_fast.train.task import Task, TaskLoss
from beit_fast.train.world import World

SAVED = "the checkpoint is saved"
UNTRAINED = "nothing was trained yet, and the same command begins anew"


@dataclass(frozen=True)
class Outcome:
    """Where a finished run left things. `model` has the averaged weights if there are any,
    `trained` those of the last step; both are whole and plain, however many ranks there were."""

    model: nn.Module
    trained: nn.Module
    checkpoint: Path
    picture: Path
    num_steps: int
    failed: tuple[str, ...] = ()  # work beside training that went wrong, see aside.py


def train(
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    *,
    settings: Mapping[str, Any],
    world: World,
    config: Any = None,
) -> Outcome:
    """Train `task` to the end of `run` and save checkpoints, metrics and pictures below its output.

    `config`, a dataclass, is what the command line made, if it did: it is kept as kept_config.py
    says.

    `settings` is the whole resolved configuration of the task as plain data; it is saved with
    every checkpoint, and a resume is refused under settings that make it another run (changes.py).
    Evaluation, pictures and logs take nothing down (aside.py). Raises Interrupted after a stop
    signal, NonFiniteLoss, CaptureError, CheckpointError, ValueError.
    """
    output, device = Path(run.output), world.device
    images_per_step = task.images_per_batch * run.accumulate * world.size
    settings = complete_settings(task, optim, run, settings, world)
    check_parallel(run, optim, world)
    world.agree(flat(settings))
    aside = Aside(world, strict=run.strict)

    with _claim(output, world) as lock, stop_signals() as stop, contextlib.ExitStack() as stack:
        stack.enter_context(world.watching(f"preparing the training of {task.name}", output))
        resume = find_resume(output, run, settings, world, task.images)
        world.agree(start_of(resume, task))
        if config is not None and world.is_main:
            write_config(output, task.name, config)
        length = run_length(task, optim, run, settings, resume and resume.manifest)
        num_steps = length.num_steps
        task.to(device)
        images = follow(task, resume, output, images_per_step, world)
        begin_alike(task.model, world)
        start = resume.checkpoint.step if resume else 0
        meter = Meter(device)
        ema = Average(task.model, run.ema_decay) if run.ema_decay is not None else None
        state = RunState(task, meter, ema, world)
        if resume:
            state.load_weights(resume)
        ranks = parallel(run, world, task.model)
        if (mode := compile_mode(run, device)) != "off":
            task.compile(mode, by_block=ranks.by_block)
        module = ranks.wrap(TaskLoss(task), task.blocks)
        if ema:
            ranks.share(ema.module)
        optimizer = build_optimizer(task.param_groups(optim.weight_decay), optim, device)
        sentinel = Sentinel(optimizer, world, run)
        if resume:
            state.load_rest(optimizer, sentinel, resume.checkpoint.tensors)
        schedule = Schedule(
            optimizer, optim, num_steps=num_steps, warmup=length.warmup_steps, start=start
        )
        bad_steps = BadSteps(
            *(task, optimizer.param_groups, run, world, aside),
            start=start,
            row=int(sentinel.row),
        )
        shares = shares_of(task.count, run, world)
        take = TrainStep(
            module, optimizer, sentinel, shares=shares, optim=optim, run=run, device=device
        )
        take = graphed(take, run, world)
        log = Log(output, title=task.name, start=start, num_steps=num_steps, enabled=world.is_main)
        if resume:
            _say_resume(task, resume, length, log)

        def models() -> list[nn.Module]:
            """Trained and, where there is one, averaged, whole; called on every rank."""
            return [ranks.plain(m) for m in (task.model, *([ema.module] if ema else []))]

        saver = stack.enter_context(
            Saver(
                output,
                settings,
                keep=run.keep,
                world=world,
                beside=run.save_async,
                bears=run.failed_saves,
                lock=lock,
                schedule=asdict(length),
                history=resume.history if resume else [],
                images=images,
            )
        )

        def draw(name: str) -> Path:
            path = output / name
            model = ranks.plain(ema.module if ema else task.model)
            if world.is_main:
                with aside.work(f"drawing {path}"), unhurried("drawing a picture"):
                    task.picture(model, path)
            return path

        def evaluate(step: int) -> None:
            """Beside the writing of what was trained, which is on the disk when this ends."""
            progress("evaluating")
            with log.aside(), aside.work(f"evaluation after step {step}", everywhere=True):
                values = _evaluate(task, models())
                with aside.work("the log"):
                    log.evaluation(step, values)
            saver.wait()
            stop.leave(world, f"evaluating after step {step}", SAVED)

        def save(step: int) -> None:
            with log.aside(), unhurried("saving a checkpoint"):
                saver.save(step, state.tensors(optimizer, sentinel))

        def heed(done: int) -> None:
            """Leave on all ranks, saved, if one had a signal, or a save has failed."""
            signum = world.any_of(max(stop.received, saver.failed))
            saver.check(signum)
            if not signum:
                return
            if done == start:
                raise Interrupted(signum, f"before step {done + 1}", SAVED if start else UNTRAINED)
            if not saver.has(done):
                bad_steps.check(saver)
                save(done)
            saver.finish()
            raise Interrupted(signum, f"after step {done}", SAVED)

        def falls_due(step: int) -> bool:
            """Whether the last of `step` steps reached a multiple of `run.evaluate_every`."""
            if run.evaluate_every is None or step >= num_steps:
                return False
            samples = ((step - 1) * images_per_step, step * images_per_step)
            before, now = (int(task.images.epochs(s, run.evaluate_every)) for s in samples)
            return now > before

        task.model.train()
        micro_batches = task.batches(start * run.accumulate) if start < num_steps else iter(())
        micro_batches = bad_steps.noting(micro_batches, start * run.accumulate)
        micro_batches = stop.until_told(micro_batches)
        prepare = preparation(task, run, device)
        batches = device_batches(micro_batches, device, prepare, ahead=run.prepare_ahead)
        in_flight = InFlight(device)
        owed = False
        try:
            if start and falls_due(start) and _lacks_evaluation(output, start, world):
                evaluate(start)  # it was left at a stop signal, or failed
            for step in range(start, num_steps):
                progress("waiting for a batch", step + 1)
                step_batches = [*islice(batches, run.accumulate)]
                heed(step)  # with batches, or told before they came
                progress("taking the step")
                task.begin_step(step)
                torch.manual_seed(step_seed(run.seed, step, world.rank))
                with sizes_told(step + 1, step_batches, run, images=task.images_per_batch):
                    scalars = take(step_batches)
                bad_steps.add(scalars.pop(WATCHED))
                meter.add(sentinel.lost, **scalars)
                schedule.step()
                if ema:
                    ema.update(task.model)
                progress("waiting for the device")
                in_flight.add()
                done = step + 1
                log.tick(images_per_step)

                evaluates = falls_due(done)
                draws = run.picture_every and done % run.picture_every == 0
                prints = done % run.log_every == 0 or done == num_steps or evaluates
                saves = done == num_steps
                owed = owed or done % run.save_every == 0 or evaluates
                if prints or owed or bad_steps.is_full:
                    bad_steps.check(saver)
                # The last checkpoint of a run that bad steps end is from before their row.
                saves, owed = saves or (owed and not bad_steps.in_row), owed and bad_steps.in_row
                if prints:
                    means = meter.means()
                    of_all = task.report({k: world.sum(v) for k, v in task.counters.items()})
                    values = [*world.mean(torch.stack([*means.values()])), *of_all.values()]
                    values = torch.stack([value.double() for value in values]).tolist()
                    line = dict(zip([*means, *of_all], values, strict=True))
                    line["lr"] = lr_at(step, optim, num_steps, length.warmup_steps)
                    line["epoch"] = task.images.epochs(done * images_per_step)
                    with aside.work("the log"):
                        log.line(done, line)
                if saves:
                    save(done)
                if evaluates or draws or done == num_steps:
                    heed(done)  # before what takes long
                if evaluates:
                    evaluate(done)
                if draws:
                    draw(f"picture_{done:08d}.png")
            picture = draw("picture.png")
            kept = saver.finish()
            stop.leave(world, f"after step {num_steps}", SAVED)
        finally:
            batches.close()
            with aside.work("closing the log"):
                log.close()
        finished = models()
        return Outcome(
            model=finished[-1],
            trained=finished[0],
            checkpoint=kept[-1],
            picture=picture,
            num_steps=max(start, num_steps),  # a run may have been asked for fewer than it has
            failed=tuple(aside.failed),
        )


def _say_resume(task: Task, resume: Resume, length: Length, log: Log) -> None:
    path, start = resume.checkpoint.path, resume.checkpoint.step
    lines = [f"{task.name}: resumes from {path}"]
    if start < length.num_steps:
        lines += [f"{task.name}: from step {start} on, {change}" for change in resume.changes]
        lines += [f"{task.name}: {task.images.note}"] if task.images.note else []
    elif resume.changes:
        told = "; ".join(map(str, resume.changes))
        lines.append(f"{task.name}: all {start} steps are done, what changed has no effect: {told}")
    log.console.print("\n".join(lines), soft_wrap=True, markup=False)


def _lacks_evaluation(output: Path, step: int, world: World) -> bool:
    """Whether the metrics, which the main rank has, hold no evaluation of this step."""
    lacks = False
    if world.is_main:
        records = read_metrics(output / METRICS) if (output / METRICS).exists() else []
        names = {name for record in records if record["step"] == step for name in record}
        lacks = not any(name.startswith("test_") for name in names)
    return bool(world.any_of(int(lacks)))


def _evaluate(task: Task, models: list[nn.Module]) -> dict[str, float]:
    values = {}
    for prefix, model in zip(("test", "test_ema"), models, strict=False):
        values |= {f"{prefix}_{name}": value for name, value in task.evaluate(model).items()}
    return values


def compile_mode(run: RunConfig, device: torch.device) -> str:
    """What `run.compile` comes to on this device."""
    if run.compile != "auto":
        return run.compile
    return "default" if device.type == "cuda" else "off"


def _claim(output: Path, world: World) -> contextlib.AbstractContextManager[TextIO | None]:
    return sole_user(output) if world.is_main else contextlib.nullcontext()
