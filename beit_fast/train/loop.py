"""The one training loop: fetch, schedule, forward, backward, clip, step, log, save.

A task says what is trained. The loop knows nothing of it but five methods. Randomness is a
function of (seed, step, micro-batch, rank), data of the micro-batch's number, so a resumed run is
the same run: on a CPU, to the last bit.
"""

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.log import Log, Meter
from beit_fast.train.optim import (
    build_optimizer,
    build_schedule,
    clip_gradients,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    warmup_steps,
)
from beit_fast.train.parallel import World, data_parallel, gradient_sync
from beit_fast.train.state import (
    Checkpoint,
    CheckpointError,
    check_settings,
    checkpoint_paths,
    load_newest,
    save_checkpoint,
)
from beit_fast.train.stop import Interrupted, sole_user, stop_signals

NEVER = 2**62  # a step number that no run reaches
# Fields of RunConfig that may change over a resume: none of them touches weights or data.
HABITS = frozenset(
    {"output", "device", "log_every", "save_every", "keep", "picture_every", "resume", "fallback"}
)


class NonFiniteLoss(RuntimeError):
    """Loss or gradient norm became NaN or infinite; no step was taken from there on."""


class Task(Protocol):
    """What is trained.

    `model` is the raw module, trained and saved. `counters` are further device tensors that belong
    to the state of the run (running counts, for example); the task updates them in place.
    """

    name: str
    model: nn.Module
    counters: dict[str, Tensor]
    num_images: int  # in the data set
    batches_per_epoch: int  # micro-batches of one rank in one pass, rounded down
    images_per_batch: int

    def to(self, device: torch.device) -> None:
        """Move the model and whatever else `loss` needs."""

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        """Micro-batches of this rank from number `start` on, endless, on the CPU."""

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and scalar metrics of a batch on the device. No host sync."""

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for AdamW."""

    def report(self) -> dict[str, Tensor]:
        """Scalars read at each log line besides the means of the metrics."""

    def picture(self, model: nn.Module, path: Path) -> None:
        """Draw what `model` (the raw or the averaged one) does, as a PNG."""


@dataclass(frozen=True)
class Outcome:
    """Where a finished run left things. `model` has the averaged weights if there are any."""

    model: nn.Module
    checkpoint: Path
    picture: Path
    num_steps: int


class _Loss(nn.Module):
    """The task's loss as a module, so that DDP can wrap it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.loss = task.loss

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch, step)


class _Sentinel:
    """Notes the first non-finite step on the device, and keeps the optimiser from taking it."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._first_bad = torch.tensor(float(NEVER), dtype=torch.float64, device=device)
        optimizer.found_inf = self._flag = torch.zeros((), device=device)

    def watch(self, loss: Tensor, norm: Tensor, step: int) -> None:
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self._first_bad.clamp_(max=torch.where(bad, float(step), float(NEVER)))
        self._flag.clamp_(min=bad.float())  # stays set: nothing is learnt after a bad step

    def check(self, world: World, output: Path, since: int, done: int) -> None:
        """Raise NonFiniteLoss on every rank if any met a non-finite value. Syncs."""
        first = -world.any_of(-int(min(float(self._first_bad), NEVER)))
        if first == NEVER:
            return
        kept = checkpoint_paths(output)
        raise NonFiniteLoss(
            f"loss or gradient norm is not finite between steps {since + 1} and {done}, first at "
            f"step {first + 1}: no weight was changed from there on. "
            + (f"The last good checkpoint is {kept[-1]}. " if kept else "There is no checkpoint. ")
            + "Lower optim.lr, lengthen the warm-up or clip harder, then resume"
        )


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of torch's generators for one micro-batch."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro, rank), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def train(
    task: Task, optim: OptimConfig, run: RunConfig, *, settings: Mapping[str, Any], world: World
) -> Outcome:
    """Train `task` to the end of `run` and save checkpoints, metrics and pictures below its output.

    `settings` is the whole resolved configuration of the task as plain data; it is saved with
    every checkpoint, and a resume under other settings is refused. Raises Interrupted after a stop
    signal, NonFiniteLoss, CheckpointError, ValueError.
    """
    output, device = Path(run.output), world.device
    num_steps = run.num_steps(task.batches_per_epoch)
    images_per_step = task.images_per_batch * run.accumulate * world.size
    warmup = warmup_steps(optim, num_steps, task.batches_per_epoch / run.accumulate)
    # Through JSON, so that what is compared at a resume is what a manifest can hold.
    settings = json.loads(
        json.dumps({**settings, "optim": asdict(optim), "run": _decisive(run, task, world)})
    )
    world.same(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest())

    with _claim(output, world), stop_signals() as stop:
        task.to(device)
        checkpoint = _checkpoint_to_resume(output, run, settings)
        start = checkpoint.step if checkpoint else 0
        if checkpoint:
            task.model.load_state_dict(checkpoint.tensors["model"])
        module = data_parallel(_Loss(task), world)
        ema = ModelEmaV3(task.model, decay=run.ema_decay) if run.ema_decay is not None else None
        optimizer = build_optimizer(task.param_groups(optim.weight_decay), optim, device)
        meter = Meter(device)
        if checkpoint:
            load_optimizer_tensors(optimizer, task.model, checkpoint.tensors["optimizer"])
            meter.load_state(checkpoint.tensors["run"])
            for name, counter in task.counters.items():
                counter.copy_(checkpoint.tensors["run"][f"counter/{name}"])
            if ema:
                ema.module.load_state_dict(checkpoint.tensors["ema"])
        schedule = build_schedule(optimizer, optim, num_steps=num_steps, warmup=warmup, start=start)
        sentinel = _Sentinel(optimizer, device)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        log = Log(output, title=task.name, start=start, num_steps=num_steps, enabled=world.is_main)
        if checkpoint:
            log.console.print(f"{task.name}: resumes from {checkpoint.path}", soft_wrap=True)

        def save(step: int) -> None:
            if world.is_main:
                tensors = {
                    "model": task.model.state_dict(),
                    "optimizer": optimizer_tensors(optimizer, task.model),
                    "run": meter.state() | {f"counter/{k}": v for k, v in task.counters.items()},
                }
                if ema:
                    tensors["ema"] = ema.module.state_dict()
                save_checkpoint(output, step, tensors, settings, keep=run.keep)
            world.barrier()

        def draw(name: str) -> Path:
            path = output / name
            if world.is_main:
                task.picture(ema.module if ema else task.model, path)
            return path

        task.model.train()
        batches = task.batches(start * run.accumulate) if start < num_steps else iter(())
        checked, in_bf16 = start, run.precision == "bf16"
        try:
            for step in range(start, num_steps):
                step_loss = torch.zeros((), device=device)
                for micro in range(run.accumulate):
                    batch = _to_device(next(batches), device)
                    torch.manual_seed(step_seed(run.seed, step, micro, world.rank))
                    last = micro == run.accumulate - 1
                    with gradient_sync(module, last=last):
                        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                            loss, metrics = module(batch, step)
                        loss = loss / run.accumulate
                        loss.backward()
                    step_loss += loss.detach()
                    meter.add(**metrics)
                norm = clip_gradients(parameters, optim.clip_grad)
                meter.add(loss=step_loss, grad_norm=norm)
                sentinel.watch(step_loss, norm, step)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if ema:
                    ema.update(task.model)
                done = step + 1
                log.tick(images_per_step)

                signum = world.any_of(stop.received)
                prints = done % run.log_every == 0 or done == num_steps
                saves = done % run.save_every == 0 or done == num_steps or signum
                if prints or saves:
                    sentinel.check(world, output, checked, done)
                    checked = done
                if prints:
                    scalars = {**meter.means(), **task.report()}
                    values = world.mean(torch.stack([v.double() for v in scalars.values()]))
                    line = dict(zip(scalars, values.tolist(), strict=True))
                    line["lr"] = lr_at(step, optim, num_steps, warmup)
                    line["epoch"] = done * images_per_step / task.num_images
                    log.line(done, line)
                if saves:
                    save(done)
                if signum:
                    raise Interrupted(signum, done)
                if run.picture_every and done % run.picture_every == 0:
                    draw(f"picture_{done:08d}.png")
            picture = draw("picture.png")
        finally:
            if hasattr(batches, "close"):
                batches.close()
            log.close()
        return Outcome(
            model=ema.module if ema else task.model,
            checkpoint=checkpoint_paths(output)[-1],
            picture=picture,
            num_steps=num_steps,
        )


def _decisive(run: RunConfig, task: Task, world: World) -> dict[str, Any]:
    """The settings of a run that its weights and metrics depend on."""
    decisive = {key: value for key, value in asdict(run).items() if key not in HABITS}
    return decisive | {
        "world_size": world.size,
        "images_per_batch": task.images_per_batch,
        "num_images": task.num_images,  # of whatever folder: data may move
    }


def _claim(output: Path, world: World) -> contextlib.AbstractContextManager:
    return sole_user(output) if world.is_main else contextlib.nullcontext()


def _checkpoint_to_resume(
    output: Path, run: RunConfig, settings: Mapping[str, Any]
) -> Checkpoint | None:
    if run.resume == "never":
        if checkpoint_paths(output):
            raise CheckpointError(
                f"{output} holds checkpoints and run.resume is never: give another --run.output, "
                "or delete that folder"
            )
        return None
    checkpoint = load_newest(output, fallback=run.fallback)
    if checkpoint is None and run.resume == "must":
        raise CheckpointError(f"{output} holds no checkpoint and run.resume is must")
    if checkpoint is not None:
        check_settings(checkpoint, settings)
    return checkpoint


def _to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cpu":
        return batch
    return {k: v.pin_memory().to(device, non_blocking=True) for k, v in batch.items()}
