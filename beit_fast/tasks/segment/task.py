"""`beit-fast segment`: train, evaluate, and say where the results are."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from beit_fast.files import replace_text
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.tasks.segment.config import SegmentConfig
from beit_fast.tasks.segment.evaluation import Segmentation
from beit_fast.tasks.segment.training import SegmentTask, settings_of, statistics_note
from beit_fast.tasks.sources import say
from beit_fast.train.aside import Aside
from beit_fast.train.log import METRICS, plain_console, read_metrics
from beit_fast.train.loop import SAVED, Outcome, train
from beit_fast.train.preflight import check_run
from beit_fast.train.start import open_run
from beit_fast.train.stop import stop_signals
from beit_fast.viz.curves import draw_curves

RESULT = "result.json"


@dataclass(frozen=True)
class SegmentOutcome:
    """Where a finished run left things, and what it came to on the test images."""

    train: Outcome
    classes: tuple[str, ...]
    raw: Segmentation | None  # None without test images
    ema: Segmentation | None  # of the averaged weights, where the run keeps them


def run_segmentation(config: SegmentConfig) -> SegmentOutcome:
    """Train as `config` says, resume where it was left, evaluate, and print where the results are.

    There is no best checkpoint: the last one counts, for one chosen on the test images would have
    seen them. Raises ValueError (also CheckpointError), OSError, NonFiniteLoss, CaptureError,
    Interrupted.
    """
    with open_run(config, config.run.output) as world, stop_signals() as stop:
        task = SegmentTask(config, world)
        for line in (*task.describe_images(), statistics_note(config)):
            say(line, world)
        console = plain_console(quiet=not world.is_main)
        console.print(task.start.report)
        run = (task, config.optim, config.run)
        check_run(*run, settings=settings_of(task), world=world)
        task.check_images()
        outcome = train(*run, settings=settings_of(task), world=world, config=config)
        raw = ema = None
        if task.test is not None:
            raw = _segmented(task, outcome.trained, outcome)
            if config.run.ema_decay is not None:
                ema = _segmented(task, outcome.model, outcome)
        result = SegmentOutcome(train=outcome, classes=task.classes, raw=raw, ema=ema)
        if world.is_main:
            _write_result(task, result)
            aside = Aside(world, strict=config.run.strict)
            with aside.work("the summary"):
                _summarise(task, result, console)
        stop.leave(world, f"after step {outcome.num_steps}", SAVED)
        return result


def _segmented(
    task: SegmentTask, model: BeitForSemanticSegmentation, outcome: Outcome
) -> Segmentation:
    try:
        return task.segment(model)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}. Training is finished and saved in {outcome.checkpoint}: the same command "
            "evaluates it again"
        ) from error


def _found(result: SegmentOutcome) -> dict[str, Segmentation]:
    found = {name: getattr(result, name) for name in ("raw", "ema")}
    return {name: value for name, value in found.items() if value is not None}


def _write_result(task: SegmentTask, result: SegmentOutcome) -> None:
    plain = {name: plain_of(value) for name, value in _found(result).items()}
    content = {"classes": result.classes, "num_steps": result.train.num_steps, **plain}
    path = Path(task.config.run.output) / RESULT
    replace_text(path, json.dumps(content, indent=1))


def plain_of(found: Segmentation) -> dict[str, Any]:
    """For JSON, which has no NaN: a measure of a class that is nowhere is null."""
    measures = {name: getattr(found, name) for name in ("miou", "macc", "aacc")}
    by_class = {name: getattr(found, name).tolist() for name in ("iou", "acc")}
    return {
        **{name: _number(value) for name, value in measures.items()},
        **{name: [_number(value) for value in values] for name, values in by_class.items()},
        "confusion": found.confusion.tolist(),
        "num_images": found.num_images,
        "images_per_second": found.images_per_second,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _summarise(task: SegmentTask, result: SegmentOutcome, console: Console) -> None:
    output, found = Path(task.config.run.output), _found(result)
    console.print(f"\nAfter {result.train.num_steps} steps", style="bold")
    for name, value in found.items():
        console.print(
            f"  {'weights' if name == 'raw' else 'averaged weights':18}mIoU {value.miou:.2%}  "
            f"mAcc {value.macc:.2%}  aAcc {value.aacc:.2%}  on {value.num_images} test images"
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
