"""Fine-tuning a pre-trained encoder as a classifier (BEiT section 3.1).

loss = cross-entropy of the mean of the patches, normed, under labels smoothed and mixed; learning
rates fall from the head down to the embeddings.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from beit_fast.data.loader import Loader
from beit_fast.data.sources.folder import ImageSource
from beit_fast.data.sources.opening import labelled_images
from beit_fast.data.sources.subset import Subset, split
from beit_fast.data.views.augment import AugmentedSample
from beit_fast.data.views.mixing import erase_boxes, mix, mixed_loss
from beit_fast.data.views.statistics import STATISTICS
from beit_fast.data.views.two_views import normalize
from beit_fast.files import replace_text
from beit_fast.model.fp8 import use_fp8
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.tasks.check_images import check_test_images
from beit_fast.tasks.drop_path import DropPathDraws
from beit_fast.tasks.evaluate.checkpoints import statistics_of
from beit_fast.tasks.evaluate.evaluation import (
    Classification,
    default_crop_pct,
    evaluate_classifier,
)
from beit_fast.tasks.finetune.config import FinetuneConfig, LabelledDataConfig
from beit_fast.tasks.finetune.init import starting_point
from beit_fast.tasks.layer_decay import layer_decay_groups
from beit_fast.tasks.sources import (
    describe_source,
    held_out_anew,
    indexing,
    say,
    task_settings,
    unseen_batches,
)
from beit_fast.train.aside import Aside
from beit_fast.train.log import METRICS, plain_console, read_metrics
from beit_fast.train.loop import SAVED, Outcome, train
from beit_fast.train.parallel import compile_blocks
from beit_fast.train.preflight import check_run
from beit_fast.train.start import open_run
from beit_fast.train.stop import stop_signals
from beit_fast.train.world import World
from beit_fast.viz.curves import draw_curves
from beit_fast.viz.reconstruction import draw_columns

NUM_PICTURES = 8
RESULT = "result.json"


@dataclass(frozen=True)
class FinetuneOutcome:
    """Where a finished run left things, and what it came to on the test images."""

    train: Outcome
    classes: list[str]
    raw: Classification | None  # None without test images
    ema: Classification | None  # of the averaged weights, where the run keeps them


class FinetuneTask:
    """Classification as a task of the loop.

    Raises ValueError for folders that do not fit each other or the model, and as `starting_point`
    does.
    """

    name = "finetune"

    def __init__(self, config: FinetuneConfig, world: World) -> None:
        data = config.data
        source, self._labels, self.classes, self._test = open_labelled(data)
        if config.run.evaluate_every is not None and self._test is None:
            raise ValueError(
                "run.evaluate_every is set and there are no test images: pass --data.test with a "
                "folder of the same classes, --data.held_out 0.2 to keep a fifth of them out of "
                "training, or --run.evaluate_every null"
            )
        check_statistics(config)
        if config.model.in_chans != 3:
            raise ValueError(
                f"model.in_chans is {config.model.in_chans}: images here have 3 channels, pass "
                "--model.in_chans 3"
            )
        self.start = starting_point(
            *(config.model, config.init, config.init_key, self.classes, config.run.seed),
            output=Path(config.run.output),
        )
        self.model = self.start.model
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        self.config = replace(config, model=self.model.config)
        self.blocks = tuple(self.model.blocks)
        self.world, self.counters = world, {}
        self._statistics = STATISTICS[config.statistics]
        self._loss = self._loss_of
        self.loader = Loader(
            source,
            AugmentedSample(self.config.model.image_pixels, config.augment, self._statistics[0]),
            batch_size=data.batch_size,
            seed=config.run.seed,
            rank=world.rank,
            world_size=world.size,
            num_threads=data.num_threads,
            max_bad_share=data.max_bad_share,
            reads=data,
            window=data.shards_at_once,
        )
        self.batches_per_epoch = self.loader.batches_per_epoch
        self.num_images, self.images = len(source), self.loader.images
        if data.held_out is not None:
            self.images.caution = held_out_anew()
        self.images_per_batch = data.batch_size
        self._drop_path = DropPathDraws(self.model, config.run, data.batch_size, world)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        if self.config.run.precision == "fp8":
            use_fp8(self.model, device)
        self._labels = self._labels.to(device)

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        return self._drop_path.added_to(self.loader.batches(start), start)

    def take_rank(self, world: World) -> None:
        self.loader = self.loader.of_rank(world.rank, world.size)
        self._drop_path = self._drop_path.of_rank(world)

    def sample_name(self, index: int) -> str:
        return self.loader.source.name(index)

    def compile(self, mode: str, *, by_block: bool = False) -> None:
        if by_block:
            compile_blocks(self.blocks, mode)
            return
        self._loss = torch.compile(self._loss_of, fullgraph=True, dynamic=False, mode=mode)

    def begin_step(self, step: int) -> None:
        """Nothing here changes over the run."""

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pixels normalised, and labels: of the images really read, where one replaced another."""
        prepared = {k: v for k, v in batch.items() if k not in ("images", "sample_index")}
        prepared["pixels"] = normalize(batch["images"], *self._statistics)
        return prepared | {"labels": self._labels[batch["sample_index"]]}

    def count(self, batch: dict[str, Tensor]) -> None:
        """As many images in every batch."""

    def stand_in(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, num_correct = self._loss(**batch)
        if self.config.augment.mixes:
            return loss, {}  # an image of two classes is neither right nor wrong
        return loss, {"accuracy": num_correct / len(batch["labels"])}

    def _loss_of(
        self,
        pixels: Tensor,
        labels: Tensor,
        keep: Tensor | None = None,
        mix_weights: Tensor | None = None,
        **drawn: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Loss, and how many images are predicted right."""
        logits = self.model(erase_and_mix(pixels, mix_weights=mix_weights, **drawn), keep=keep)
        loss = mixed_loss(logits, labels, self.config.augment.label_smoothing, mix_weights)
        return loss, (logits.argmax(dim=1) == labels).sum()

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layer_decay_groups(
            self.model,
            weight_decay,
            self.config.layer_decay,
            spare_tables=not self.config.weight_decay_on_rel_pos_bias,
        )

    def report(self, counters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def describe_images(self) -> list[str]:
        """A line for each folder."""
        lines = [f"images: {describe_source(self.loader.source, self.classes)}"]
        if self.has_test:
            lines.append(f"test images: {describe_source(self._test[0], self.classes)}")
        return lines

    @property
    def has_test(self) -> bool:
        return self._test is not None

    def check_test_images(self) -> None:
        """Raise ValueError on every rank for test images that cannot be used."""
        if self.has_test:
            data, folder = self.config.data, Path(self.config.run.output)
            check_test_images(
                self._test[0],
                num_threads=data.num_threads,
                world=self.world,
                folder=folder,
                reads=data,
            )

    def classify(self, model: BeitForImageClassification) -> Classification:
        """Evaluate `model` on every test image once, over all ranks."""
        assert self.has_test, "a run without test images evaluates nothing"
        source, labels = self._test
        crop_pct = self.config.crop_pct
        if crop_pct is None:
            crop_pct = default_crop_pct(self.config.model.image_pixels)
        return evaluate_classifier(
            model,
            source,
            labels,
            num_classes=len(self.classes),
            statistics=self._statistics,
            crop_pct=crop_pct,
            precision="fp32" if self.config.run.precision == "fp32" else "bf16",
            batch_size=self.config.data.batch_size,
            num_threads=self.config.data.num_threads,
            world=self.world,
            reads=self.config.data,
        )

    def evaluate(self, model: BeitForImageClassification) -> dict[str, float]:
        found = self.classify(model)
        return {"top1": found.top1, "top5": found.top5, "loss": found.loss}

    @torch.no_grad()
    def picture(self, model: BeitForImageClassification, path: Path) -> None:
        """Training images as they are read, and as the model gets them."""
        device = next(model.parameters()).device
        (batch,) = unseen_batches(self.loader, 1, device)
        prepared = self.prepare(batch)
        generators = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(generators):  # noise of no step
            torch.manual_seed(self.config.run.seed)
            pixels = erase_and_mix(**{k: v for k, v in prepared.items() if k != "labels"})
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in self._statistics)
        columns = {
            "augmented": batch["images"].permute(0, 3, 1, 2).float() / 255,
            "as the model gets it": pixels * std + mean,
        }
        draw_columns({k: v[:NUM_PICTURES] for k, v in columns.items()}, path)


def erase_and_mix(
    pixels: Tensor,
    *,
    erase: Tensor | None = None,
    mix_weights: Tensor | None = None,
    mix_box: Tensor | None = None,
) -> Tensor:
    """Normalised images (B, 3, height, width) erased and mixed, as far as numbers for it came."""
    if erase is not None:
        pixels = erase_boxes(pixels, erase)
    return pixels if mix_weights is None else mix(pixels, mix_weights, mix_box)


def run_finetuning(config: FinetuneConfig) -> FinetuneOutcome:
    """Train as `config` says, resume where it was left, evaluate, and print where the results are.

    There is no best checkpoint: the last one counts, for one chosen on the test images would have
    seen them. Raises ValueError (also CheckpointError), OSError, NonFiniteLoss, CaptureError,
    Interrupted.
    """
    with open_run(config, config.run.output) as world, stop_signals() as stop:
        task = FinetuneTask(config, world)
        for line in task.describe_images():
            say(line, world)
        console = plain_console(quiet=not world.is_main)
        console.print(task.start.report)
        run = (task, config.optim, config.run)
        check_run(*run, settings=settings_of(task), world=world)
        task.check_test_images()
        outcome = train(*run, settings=settings_of(task), world=world, config=config)
        raw = ema = None
        if task.has_test:
            raw = _classified(task, outcome.trained, outcome)
            if config.run.ema_decay is not None:
                ema = _classified(task, outcome.model, outcome)
        result = FinetuneOutcome(train=outcome, classes=task.classes, raw=raw, ema=ema)
        if world.is_main:
            _write_result(task, result)
            aside = Aside(world, strict=config.run.strict)
            with aside.work("the summary"):
                _summarise(task, result, console)
        stop.leave(world, f"after step {outcome.num_steps}", SAVED)
        return result


def _classified(task: FinetuneTask, model: BeitForImageClassification, outcome: Outcome):
    try:
        return task.classify(model)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}. Training is finished and saved in {outcome.checkpoint}: the same command "
            "evaluates it again"
        ) from error


def settings_of(task: FinetuneTask) -> dict[str, Any]:
    """What the weights depend on; the checkpoint they start from by its weights, for it may move.

    With the classes it is also what `beit-fast evaluate` and `predict` need to know.
    """
    return task_settings(task.config) | {"init": task.start.digest, "classes": task.classes}


def open_labelled(
    data: LabelledDataConfig,
) -> tuple[ImageSource, Tensor, list[str], tuple[ImageSource, Tensor] | None]:
    """Images to train on, their labels (n,), the classes, and images and labels to test on.

    Which images are held out depends on them alone, so runs of other seeds compare. Raises
    ValueError as `labelled_images` does, and for folders of other classes.
    """
    if not data.path:
        raise ValueError("no images were named: pass --data.path with a folder of classes")
    source, labels, classes = labelled_images(
        data.path, follow_links=data.follow_links, reads=data, progress=indexing()
    )
    if data.test:
        test, test_labels, test_classes = labelled_images(
            data.test,
            follow_links=data.follow_links,
            fewest=1,
            reads=data,
            progress=indexing(),
        )
        if different := sorted(set(classes) ^ set(test_classes)):
            raise ValueError(
                f"{data.path} has {len(classes)} classes and {data.test} {len(test_classes)}; only "
                f"one has {', '.join(different[:5])}: give folders of the same classes"
            )
        return source, labels, classes, (test, test_labels)
    if data.held_out is None:
        return source, labels, classes, None
    kept, held_out = split(labels, data.held_out)
    test = Subset(source, held_out), labels[held_out]
    return Subset(source, kept), labels[kept], classes, test


def check_statistics(config: FinetuneConfig) -> None:
    """Raise ValueError where the checkpoint is known to have seen pixels in other units."""
    stated = statistics_of(config.init) if config.init is not None else None
    theirs = next((name for name, value in STATISTICS.items() if stated in (name, value)), None)
    if theirs not in (None, config.statistics):
        raise ValueError(
            f"{config.init} was trained with statistics {theirs} and this run has "
            f"{config.statistics}: pass --statistics {theirs}"
        )


def _found(result: FinetuneOutcome) -> dict[str, Classification]:
    found = {name: getattr(result, name) for name in ("raw", "ema")}
    return {name: value for name, value in found.items() if value is not None}


def _write_result(task: FinetuneTask, result: FinetuneOutcome) -> None:
    plain = {name: _plain(value) for name, value in _found(result).items()}
    content = {"classes": result.classes, "num_steps": result.train.num_steps, **plain}
    path = Path(task.config.run.output) / RESULT
    replace_text(path, json.dumps(content, indent=1))


def _summarise(task: FinetuneTask, result: FinetuneOutcome, console: Console) -> None:
    output, found = Path(task.config.run.output), _found(result)
    console.print(f"\nAfter {result.train.num_steps} steps", style="bold")
    for name, value in found.items():
        console.print(
            f"  {'weights' if name == 'raw' else 'averaged weights':18}top-1 {value.top1:.2%}  "
            f"top-5 {value.top5:.2%}  loss {value.loss:.4f}  on {value.num_images} test images"
        )
    if not found:
        console.print("  not evaluated: neither --data.test nor --data.held_out was given")
    if bad := task.loader.bad_samples:
        console.print(f"  {len(bad)} images could not be used and were replaced: {', '.join(bad)}")
    for failed in result.train.failed:
        console.print(f"  failed, beside training: {failed}")
    curve = draw_curves(read_metrics(output / METRICS), output / "curve.png")
    for name, path in (
        ("checkpoint", result.train.checkpoint),
        ("result", output / RESULT),
        ("metrics", output / METRICS),
        ("curve", curve),
        ("picture", result.train.picture),
    ):
        console.print(f"  {name:10} {path}")


def _plain(found: Classification) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(found).items()}
