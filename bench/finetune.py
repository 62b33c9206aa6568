"""Whole fine-tuning steps of the same task and loop, around our model or another library's.

`python bench/model.py --finetune` times them. A step takes a batch that the loader has augmented:
normalise, erase, mix, forward, loss under smoothed and mixed labels, backward, AdamW with a
learning rate for each layer. All of that is `beit_fast.tasks.finetune`'s for everyone; only the
model in the middle differs. All start from the same weights, and nothing is timed unless their
losses and gradients agree.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from beit_fast.kernels.exact_fp32 import exact_fp32
from beit_fast.model.config import BeitConfig
from beit_fast.tasks.finetune.config import FinetuneConfig, LabelledDataConfig
from beit_fast.tasks.finetune.task import FinetuneTask
from beit_fast.tasks.layer_decay import layer_decay_groups
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.optim import Schedule, build_optimizer
from beit_fast.train.sentinel import Sentinel
from beit_fast.train.shares import shares_of
from beit_fast.train.step import TrainStep
from beit_fast.train.task import TaskLoss
from beit_fast.train.world import World
from beit_fast.weights.layouts import from_house

Batch = dict[str, Tensor]
COMPILE_MODE = "default"


@dataclass(frozen=True)
class Peer:
    """A library's classifier: images to logits, and what its state dict is called in layouts.py."""

    model: nn.Module
    logits: Callable[[nn.Module, Tensor], Tensor]
    layout: str


class PeerTask(FinetuneTask):
    """The task with a library's model in place of ours, with the same weights."""

    def __init__(self, config: FinetuneConfig, world: World, peer: Peer) -> None:
        super().__init__(config, world)
        with torch.no_grad():
            peer.model.load_state_dict(from_house(self.model.state_dict(), peer.layout))
        self.model = _Logits(peer)

    def compile(self, mode: str) -> None:
        """Unlike ours, the graph may break where the library breaks it."""
        self._loss = torch.compile(self._loss_of, mode=mode, dynamic=False)

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        renamed = _HouseNames(self.model, self.config.model.depth)
        return layer_decay_groups(renamed, weight_decay, self.config.layer_decay)


class _Logits(nn.Module):
    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self.model, self._logits = peer.model, peer.logits

    def forward(self, images: Tensor, *, keep: Tensor | None = None) -> Tensor:
        del keep  # the library draws its own
        return self._logits(self.model, images)


class _HouseNames:
    """Parameters under names from which `layer_decay_groups` finds their layers."""

    def __init__(self, model: nn.Module, depth: int) -> None:
        self.model, self.blocks = model, range(depth)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            block = re.search(r"\.(?:blocks|layers)\.(\d+)\.", name)
            part = "patch_embed" if re.search("embed|cls_token", name) else "head"
            yield f"blocks.{block[1]}.{name}" if block else f"{part}.{name}", parameter

    def no_weight_decay(self) -> set[str]:
        return {n for n, p in self.named_parameters() if p.ndim == 3}  # cls_token, positions


class FinetuneStep:
    """One optimiser step of the loop after the other, on the same batch, in one process."""

    def __init__(self, config: FinetuneConfig, peer: Peer | None, compiled: bool) -> None:
        device = torch.device(config.run.device)
        world = World(0, 1, device)
        self.task = FinetuneTask(config, world) if peer is None else PeerTask(config, world, peer)
        self.task.to(device)
        self.task.model.train()
        if compiled:
            self.task.compile(COMPILE_MODE)
        optim, run = config.optim, config.run
        optimizer = build_optimizer(self.task.param_groups(optim.weight_decay), optim, device)
        self._schedule = Schedule(optimizer, optim, num_steps=2**31, warmup=0, start=0)
        sentinel = Sentinel(optimizer, world, run)
        shares = shares_of(self.task.count, run, world)
        self._take = TrainStep(
            *(TaskLoss(self.task), optimizer, sentinel),
            shares=shares,
            optim=optim,
            run=run,
            device=device,
        )
        batches = self.task.batches(0)
        batch = next(batches)
        batches.close()
        self.batch = self.task.prepare({name: value.to(device) for name, value in batch.items()})

    def __call__(self) -> None:
        self._take([self.batch])
        self._schedule.step()

    @torch.no_grad()
    def forward(self) -> None:
        self.task.loss(self.batch)


def finetune_config(
    model: BeitConfig, folder: Path, batch: int, device: str, precision: str
) -> FinetuneConfig:
    """Fine-tuning of BEiT on ImageNet-1K (spec 7.1), its rate so small that it changes nothing."""
    return FinetuneConfig(
        model=model,
        data=LabelledDataConfig(path=str(folder), batch_size=batch),
        optim=OptimConfig(lr=1e-8, min_lr=1e-8, warmup_steps=0, clip_grad=None),
        run=RunConfig(output="unused", steps=1, precision=precision, device=device),
    )


def make_step(
    model: BeitConfig,
    peer: Peer | None,
    *,
    batch: int,
    device: str,
    precision: str,
    compiled: bool,
) -> FinetuneStep:
    """Steps of ours (no peer) or of a library's model, on noise of as many classes as it has."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_noise(Path(name), model.num_classes)
        config = finetune_config(model, folder, batch, device, precision)
        return FinetuneStep(config, peer, compiled)


def write_noise(folder: Path, num_classes: int) -> Path:
    """A small image of noise in each of `num_classes` folders."""
    rng = np.random.default_rng(0)
    for label in range(num_classes):
        (folder / f"{label:05}").mkdir()
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{label:05}" / "0.png")
    return folder


def check(build_peer: Callable[[BeitConfig], Peer], name: str, device: str) -> None:
    """Raise SystemExit unless loss and gradients of a small model of a peer are ours."""
    model = BeitConfig(
        img_size=64, embed_dim=128, depth=2, num_heads=2, num_classes=8,
        use_rel_pos_bias=True, use_shared_rel_pos_bias=False,
    )  # fmt: skip
    found = []
    for peer in (None, build_peer(model)):
        step = make_step(model, peer, batch=4, device=device, precision="fp32", compiled=False)
        # No noise of the eraser, which draws anew in each step.
        batch = {n: v for n, v in step.batch.items() if n != "erase"}
        with exact_fp32():
            loss, _ = step.task.loss(batch)
            loss.backward()
        gradients = [p.grad for p in step.task.model.parameters() if p.grad is not None]
        found.append((loss.item(), nn.utils.get_total_norm(gradients).item()))
    for what, ours, theirs in zip(("loss", "gradient"), *found, strict=True):
        if not abs(theirs / ours - 1) <= 1e-4:
            raise SystemExit(
                f"{name}'s {what} is {theirs:.6g} and ours {ours:.6g} for the same weights and "
                "batch: nothing is timed"
            )
