"""A segmenter of any layout on images with masks: IoU and accuracy of every class, and means."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from beit_fast.data.sources import ade20k
from beit_fast.data.sources.segmentation import SegmentationSource, open_segmentation
from beit_fast.files import naming
from beit_fast.tasks.check_images import warn_of_turned
from beit_fast.tasks.segment.checkpoints import open_segmenter
from beit_fast.tasks.segment.config_evaluation import EvaluateSegmentationConfig
from beit_fast.tasks.segment.evaluation import Segmentation, evaluate_segmenter
from beit_fast.tasks.sources import describe_source
from beit_fast.train.log import plain_console
from beit_fast.train.preflight import check_output_file
from beit_fast.train.state import environment
from beit_fast.train.stop import stop_signals
from beit_fast.train.world import open_world


def run_segmentation_evaluation(config: EvaluateSegmentationConfig) -> dict[str, Any]:
    """Evaluate, print the table of all classes, write `config.output`.

    Returns what the file holds, on every rank. Raises ValueError, OSError, Interrupted.
    """
    with open_world(config.device, named="device") as world, stop_signals():
        output = Path(config.output)
        check_output_file(output)
        console = plain_console(quiet=not world.is_main)
        segmenter = open_segmenter(config)
        window = segmenter.model.config.image_pixels
        source, known = open_masks(config, segmenter.model.config.num_classes)
        names, how = match_names(source.classes if known else None, segmenter.classes)
        names = segmenter.names if names is None else names
        console.out(f"images: {describe_source(source, source.classes)}")
        console.out(f"classes: {how}")
        found = evaluate_segmenter(
            segmenter.model.to(world.device),
            source,
            slide=segmenter.slide,
            statistics=segmenter.statistics,
            precision=config.precision,
            num_threads=config.num_threads,
            world=world,
            reads=config,
        )
        if world.is_main:
            warn_of_turned(found.turned, found.num_images, "images")
        result = _result_of(found, names) | {
            "checkpoint": segmenter.path,
            "weights": config.weights,
            "folder": config.folder,
            "data": asdict(config.data),
            "classes_are": how,
            "window": list(window),
            "stride": list(segmenter.slide.strides(window)),
            "scale": list(segmenter.slide.sides(window)),
            "multi_scale": list(segmenter.slide.multi_scale),
            "flip": segmenter.slide.flip,
            "statistics": segmenter.statistics,
            "precision": config.precision,
            "device": world.device.type,
            "num_ranks": world.size,
            "environment": environment(),
        }
        if world.is_main:
            with naming(output):
                output.write_text(json.dumps(result, indent=1), encoding="utf-8")
            _show(result, config, console)
        return result


def open_masks(
    config: EvaluateSegmentationConfig, num_classes: int
) -> tuple[SegmentationSource, bool]:
    """The images with their masks, and whether these come with names of their classes.

    Where they do not, they have as many as the model. Raises ValueError as `open_segmentation`
    does.
    """
    data = config.data
    is_folder = Path(config.folder).is_dir()
    known = bool(data.classes_file) or not is_folder
    known |= not data.masks and num_classes == len(ade20k.CLASSES)
    source = open_segmentation(
        config.folder,
        masks=data.masks,
        part=data.part,
        classes_file=data.classes_file,
        ignore=data.ignore,
        num_classes=None if known else num_classes,
        follow_links=data.follow_links,
        reads=config,
    )
    return source, known


def match_names(
    of_masks: tuple[str, ...] | None, of_checkpoint: tuple[str, ...] | None
) -> tuple[tuple[str, ...] | None, str]:
    """Names of the classes, None where nobody has any, and in words whose they are.

    Classes are the same by their numbers. Raises ValueError where both have the same names in
    another order: what is one number then means two things.
    """
    if of_masks is None or of_checkpoint is None:
        if of_masks is of_checkpoint:
            return None, "by number, nothing names them"
        whose = "the checkpoint" if of_masks is None else "the masks"
        return of_checkpoint if of_masks is None else of_masks, f"by number, names are of {whose}"
    if of_masks == of_checkpoint:
        return of_masks, "the same in the masks and in the checkpoint"
    if len(of_masks) != len(of_checkpoint):  # which the evaluation refuses
        return of_masks, f"{len(of_masks)} in the masks and {len(of_checkpoint)} in the checkpoint"
    pairs = enumerate(zip(of_masks, of_checkpoint, strict=True))
    number, (theirs, ours) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    if sorted(of_masks) == sorted(of_checkpoint):
        raise ValueError(
            f"the classes have the same names in another order: {number} is {theirs!r} in the "
            f"masks and {ours!r} in the checkpoint: pass --data.classes_file with a JSON list of "
            '{"name": ..., "id": ...}, in which the ids are those of the masks'
        )
    return of_masks, (
        f"by number, though names differ: {number} is {theirs!r} in the masks and {ours!r} in the "
        "checkpoint"
    )


def _result_of(found: Segmentation, names: tuple[str, ...]) -> dict[str, Any]:
    confusion = found.confusion
    rows = zip(
        names,
        found.iou.tolist(),
        found.acc.tolist(),
        confusion.sum(1).tolist(),
        confusion.sum(0).tolist(),
        strict=True,
    )
    return {
        "num_images": found.num_images,
        "miou": _plain(found.miou),
        "macc": _plain(found.macc),
        "aacc": _plain(found.aacc),
        "images_per_second": found.images_per_second,
        "classes": [
            {
                "name": name,
                "iou": _plain(iou),
                "acc": _plain(acc),
                "pixels": pixels,
                "called": called,
            }
            for name, iou, acc, pixels, called in rows
        ],
    }


def _plain(value: float) -> float | None:
    """JSON has no nan."""
    return None if value != value else value


def _show(result: dict[str, Any], config: EvaluateSegmentationConfig, console: Console) -> None:
    rows = list(enumerate(result["classes"]))
    if config.order == "worst":  # those that are nowhere last
        rows.sort(key=lambda row: (row[1]["iou"] is None, row[1]["iou"]))
    table = Table(
        title=f"All classes, {'worst first' if config.order == 'worst' else 'by id'}",
        title_justify="left",
    )
    table.add_column("id", justify="right")
    table.add_column("class", overflow="fold")
    for column in ("IoU", "accuracy", "pixels"):
        table.add_column(column, justify="right")
    total = sum(row["pixels"] for row in result["classes"])
    for number, row in rows:
        share = f"{row['pixels'] / total:.2%}" if total else "-"
        table.add_row(str(number), row["name"], _shown(row["iou"]), _shown(row["acc"]), share)
    console.print(table)
    say = console.out
    height, width = result["window"]
    slide = f"{height}x{width} px every {result['stride'][0]}x{result['stride'][1]}"
    say(f"{result['checkpoint']}, {result['weights']} weights, windows of {slide}")
    num_seen = sum(row["iou"] is not None for row in result["classes"])
    say(f"  mIoU  {_shown(result['miou'])}  of {num_seen} classes that occur")
    say(f"  mAcc  {_shown(result['macc'])}")
    say(f"  aAcc  {_shown(result['aacc'])}  of the pixels of {result['num_images']} images")
    say(
        f"  {result['images_per_second']:.2f} images/s, reading included, on "
        f"{result['num_ranks']} x {result['device']} in {result['precision']}"
    )
    say(f"  all of it in {config.output}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
