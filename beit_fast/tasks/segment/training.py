"""Training a segmenter on images with masks (BEiT section 3.2).

loss = cross-entropy of the pixels' classes + 0.4 of that of a second head; learning rates fall from
the heads and the pyramid down to the embeddings. Source: unilm beit `semantic_segmentation`.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.loader import Loader
from beit_fast.data.sources.segmentation import SegmentationSource
from beit_fast.data.views.segmentation import SegmentationSample, normalize_padded
from beit_fast.data.views.statistics import STATISTICS
from beit_fast.flags import flag
from beit_fast.model.fp8 import use_fp8
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.tasks.check_images import check_segmentation
from beit_fast.tasks.drop_path import DropPathDraws
from beit_fast.tasks.evaluate.checkpoints import statistics_of
from beit_fast.tasks.layer_decay import layer_decay_groups
from beit_fast.tasks.segment.config import SegmentConfig
from beit_fast.tasks.segment.data import open_masked
from beit_fast.tasks.segment.evaluation import Segmentation, evaluate_segmenter, read_pair
from beit_fast.tasks.segment.init import starting_point
from beit_fast.tasks.segment.sliding import segment_image
from beit_fast.tasks.sources import describe_source, held_out_anew, task_settings
from beit_fast.train.batch_norm import synchronize_batch_norm
from beit_fast.train.parallel import compile_blocks
from beit_fast.train.world import World
from beit_fast.viz.segmentation import draw_comparison, palette

NUM_PICTURES = 4
OF_HEADS = ("fpn1", "fpn2", "fpn3", "fpn4", "decode_head", "auxiliary_head")


class SegmentTask:
    """Segmentation as a task of the loop.

    Raises ValueError for data, model and settings that do not fit each other, and as
    `starting_point` does.
    """

    name = "segment"

    def __init__(self, config: SegmentConfig, world: World) -> None:
        data = config.data
        self.source, self.test = open_masked(data)
        self.classes = self.source.classes
        if config.run.evaluate_every is not None and self.test is None:
            raise ValueError(
                f"{flag('run.evaluate_every')} is set and there are no images to evaluate on: pass "
                f"{flag('data.test')} with some of the same classes, {flag('data.held_out')} 0.2 "
                f"to keep a fifth out of training, or {flag('run.evaluate_every')} null"
            )
        if config.model.in_chans != 3:
            raise ValueError(
                f"model.in_chans is {config.model.in_chans}: images here have 3 channels, pass "
                f"{flag('model.in_chans')} 3"
            )
        check_batch(config, world)
        self.start = starting_point(
            *(config.model, config.init, config.init_key, self.classes, config.run.seed),
            output=Path(config.run.output),
        )
        model = synchronize_batch_norm(self.start.model, world)
        assert isinstance(model, BeitForSemanticSegmentation)
        self.model, self.blocks = model, tuple(model.blocks)
        model.set_grad_checkpointing(config.grad_checkpointing)
        self._frozen = freeze(model, encoder=config.freeze_encoder)
        self.config = replace(config, model=model.config)
        config.evaluation.strides(model.config.image_pixels)  # refused before the first step
        self.world, self.counters = world, {}
        self._statistics = STATISTICS[config.statistics]
        self._loss, self._encode = self._loss_of, model.encode
        self.loader = Loader(
            self.source,
            SegmentationSample(model.config.image_pixels, config.augment, self.source.labels),
            batch_size=data.batch_size,
            seed=config.run.seed,
            rank=world.rank,
            world_size=world.size,
            num_threads=data.num_threads,
            max_bad_share=data.max_bad_share,
            reads=data,
        )
        self.batches_per_epoch = self.loader.batches_per_epoch
        self.num_images, self.images = len(self.source), self.loader.images
        if data.held_out is not None:
            self.images.caution = held_out_anew()
        self.images_per_batch = data.batch_size
        self._drop_path = DropPathDraws(model, config.run, data.batch_size, world)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        if self.config.run.precision == "fp8":
            use_fp8(self.model, device)

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        return self._drop_path.added_to(self.loader.batches(start), start)

    def take_rank(self, world: World) -> None:
        self.loader = self.loader.of_rank(world.rank, world.size)
        self._drop_path = self._drop_path.of_rank(world)

    def sample_name(self, index: int) -> str:
        return self.source.name(index)

    def compile(self, mode: str, *, by_block: bool = False) -> None:
        """All of it; under several ranks the encoder, for their batch norms wait for one another
        in every convolution of the pyramid and the heads."""
        if by_block:
            compile_blocks(self.blocks, mode)
            return
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
        if self.world.size == 1:
            self._loss = compiled(self._loss_of)
        else:
            self._encode = compiled(self.model.encode)

    def begin_step(self, step: int) -> None:
        """Parts that are not trained draw no random numbers: no layer of theirs is dropped."""
        for part in self._frozen:
            part.eval()

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = normalize_padded(batch["images"], batch["extent"], *self._statistics)
        prepared = {"pixels": pixels, "labels": batch["labels"]}
        return prepared | {name: batch[name] for name in ("keep",) if name in batch}

    def count(self, batch: dict[str, Tensor]) -> None:
        """As many pixels, those without a class among them in every batch."""

    def stand_in(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, accuracy = self._loss(**batch)
        return loss, {"accuracy": accuracy}

    def _loss_of(
        self, pixels: Tensor, labels: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss, and the share of the labelled pixels that are right."""
        weight = self.config.auxiliary_weight
        encoded = self._encode(pixels, keep=keep)
        return self.model.loss_of(encoded, labels, auxiliary_weight=weight)

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layer_decay_groups(self.model, weight_decay, self.config.layer_decay)

    def report(self, counters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def describe_images(self) -> list[str]:
        """A line for those to train on and for those to evaluate on."""
        lines = [f"images: {describe_source(self.source, self.classes)}"]
        if self.test is not None:
            lines.append(f"test images: {describe_source(self.test, self.classes)}")
        return lines

    def check_images(self) -> None:
        """Raise ValueError on every rank for images and masks that cannot be used."""
        data = self.config.data
        shared = {
            "num_threads": data.num_threads,
            "world": self.world,
            "folder": Path(self.config.run.output),
            "reads": data,
        }
        check_segmentation(self.source, "training", max_bad_share=data.max_bad_share, **shared)
        if self.test is not None:
            check_segmentation(self.test, "test", **shared)

    def segment(self, model: BeitForSemanticSegmentation) -> Segmentation:
        """Evaluate `model` on every test image once, over all ranks."""
        assert self.test is not None, "a run without test images evaluates nothing"
        return evaluate_segmenter(
            model,
            self.test,
            slide=self.config.evaluation,
            statistics=self._statistics,
            precision=self._precision,
            num_threads=self.config.data.num_threads,
            world=self.world,
            reads=self.config.data,
        )

    def evaluate(self, model: BeitForSemanticSegmentation) -> dict[str, float]:
        found = self.segment(model)
        return {"miou": found.miou, "macc": found.macc, "aacc": found.aacc}

    def picture(self, model: BeitForSemanticSegmentation, path: Path) -> None:
        """Images, truth and prediction; of test images where there are some."""
        source: SegmentationSource = self.source if self.test is None else self.test
        apart = np.linspace(0, len(source) - 1, min(NUM_PICTURES, len(source)))
        pairs = [read_pair(source, int(index)) for index in apart.round()]
        with in_eval_mode(model):
            said = [
                segment_image(model, image, self.config.evaluation, self._statistics, "fp32")
                for image, _ in pairs
            ]
        draw_comparison(
            [image.numpy() for image, _ in pairs],
            [labels.numpy() for _, labels in pairs],
            [ids.cpu().numpy() for ids in said],
            classes=self.classes,
            colours=np.array(self.source.palette or palette(len(self.classes)), np.uint8),
            path=path,
        )

    @property
    def _precision(self) -> str:
        return "fp32" if self.config.run.precision == "fp32" else "bf16"


@contextlib.contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_batch(config: SegmentConfig, world: World) -> None:
    """Raise ValueError for a batch that UPerNet's batch norm cannot take: it pools to one value."""
    if config.model.head == "upernet" and config.data.batch_size * world.size == 1:
        raise ValueError(
            f"{flag('data.batch_size')} is 1 in one process, and UPerNet's batch norm of a map "
            f"pooled to 1x1 needs more than one value: pass {flag('data.batch_size')} 2, more "
            f"ranks, or {flag('model.head')} linear"
        )


def freeze(model: BeitForSemanticSegmentation, *, encoder: bool) -> list[torch.nn.Module]:
    """Keep from training what no loss reaches, blocks behind the last that is read, and with
    `encoder` all but pyramid and heads. Returns the modules."""
    unread = list(model.blocks[max(model.config.tapped) + 1 :])
    frozen = unread
    if encoder:
        frozen = [part for name, part in model.named_children() if name not in OF_HEADS]
        for parameter in model.parameters(recurse=False):  # [CLS], positions
            parameter.requires_grad_(False)
    for part in frozen:
        part.requires_grad_(False)
    return frozen


def statistics_note(config: SegmentConfig) -> str:
    """In which units pixels are, where the checkpoint is known to have seen them in others."""
    stated = statistics_of(config.init) if config.init is not None else None
    theirs = next((name for name, value in STATISTICS.items() if stated in (name, value)), None)
    if theirs in (None, config.statistics):
        return f"pixels: {config.statistics} statistics"
    return (
        f"pixels: {config.statistics} statistics, and {config.init} was trained with {theirs}: as "
        f"in the original, whose segmenters have imagenet's (--statistics {theirs} changes it)"
    )


def settings_of(task: SegmentTask) -> dict[str, Any]:
    """What the weights depend on; the checkpoint they start from by its weights, for it may move.

    With classes and colours it is also what evaluation and prediction need to know.
    """
    of_data = {"classes": list(task.classes), "palette": task.source.palette}
    return task_settings(task.config) | {"init": task.start.digest} | of_data
