"""A classifier of any layout on a folder of labelled images: accuracy, loss, every class, speed."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from beit_fast.data.sources.opening import labelled_images
from beit_fast.files import naming
from beit_fast.tasks.evaluate.checkpoints import open_classifier
from beit_fast.tasks.evaluate.classes import describe_class, match_classes
from beit_fast.tasks.evaluate.config import EvaluateConfig
from beit_fast.tasks.evaluate.evaluation import Classification, evaluate_classifier
from beit_fast.tasks.sources import describe_source, indexing
from beit_fast.train.log import plain_console
from beit_fast.train.preflight import check_output_file
from beit_fast.train.state import environment
from beit_fast.train.stop import stop_signals
from beit_fast.train.world import open_world

NUM_WORST = 10  # classes in the table


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, print the table with the worst classes, write `config.output`.

    Returns what the file holds, on every rank. Raises ValueError, OSError, Interrupted.
    """
    with open_world(config.device, named="device") as world, stop_signals():
        check_output_file(Path(config.output))
        console = plain_console(quiet=not world.is_main)
        classifier = open_classifier(config)
        view = classifier.view
        source, labels, folders = labelled_images(
            config.folder,
            follow_links=config.follow_links,
            fewest=1,
            reads=config,
            progress=indexing(),
        )
        num_classes = classifier.model.config.num_classes
        class_of, names, how = match_classes(
            folders, classifier.classes, num_classes, by_order=config.match == "order"
        )
        output = Path(config.output)
        console.print(f"images: {describe_source(source, folders)}")
        console.print(f"classes: {how}")
        if len(folders) == 1:
            console.print("one class: what is counted says nothing of images of the others")
        console.print(f"as the model gets them: {view}")
        found = evaluate_classifier(
            classifier.model.to(world.device),
            source,
            torch.tensor(class_of)[labels],
            num_classes=num_classes,
            statistics=(view.mean, view.std),
            crop_pct=view.crop_pct,
            interpolation=view.interpolation,
            crop_mode=view.crop_mode,
            precision=config.precision,
            batch_size=config.batch_size,
            num_threads=config.num_threads,
            world=world,
            reads=config,
        )
        result = _result_of(found, names) | {
            "checkpoint": classifier.path,
            "weights": config.weights,
            "folder": config.folder,
            "classes_are": how,
            "img_size": list(classifier.model.config.image_pixels),
            "view": asdict(view),
            "precision": config.precision,
            "batch_size": config.batch_size,
            "device": world.device.type,
            "num_ranks": world.size,
            "environment": environment(),
        }
        if world.is_main:
            with naming(output):
                output.write_text(json.dumps(result, indent=1), encoding="utf-8")
            _show(result, output, console)
        return result


def _result_of(found: Classification, names: list[str]) -> dict[str, Any]:
    rows = zip(
        names, found.images_per_class.tolist(), found.correct_per_class.tolist(), strict=True
    )
    return {
        "num_images": found.num_images,
        "top1": found.top1,
        "top5": found.top5,
        "loss": found.loss if math.isfinite(found.loss) else None,  # JSON has no nan
        "images_per_second": found.images_per_second,
        "classes": [
            {
                "name": name,
                "images": images,
                "correct": correct,
                "top1": correct / images if images else None,
            }
            for name, images, correct in rows
        ],
    }


def _show(result: dict[str, Any], output: Path, console: Console) -> None:
    seen = [row for row in result["classes"] if row["images"]]
    worst = sorted(seen, key=lambda row: (row["top1"], -row["images"]))[:NUM_WORST]
    which = "All classes" if len(worst) == len(seen) else f"The {NUM_WORST} worst classes"
    table = Table(title=f"{which}, worst first", title_justify="left")
    table.add_column("class", overflow="fold")
    for column in ("images", "right", "top-1"):
        table.add_column(column, justify="right")
    for row in worst:
        name = describe_class(row["name"], len(result["classes"]))
        name = name if name == row["name"] else f"{row['name']} {name}"
        table.add_row(name, str(row["images"]), str(row["correct"]), f"{row['top1']:.1%}")
    console.print(table)
    height, width = result["img_size"]
    say = console.out
    say(f"{result['checkpoint']}, {result['weights']} weights, {height}x{width} px")
    say(f"  top-1  {result['top1']:.2%}  of {result['num_images']} images")
    say(f"  top-5  {result['top5']:.2%}")
    loss = result["loss"]
    say("  loss   not finite: are the weights?" if loss is None else f"  loss   {loss:.4f}")
    say(
        f"  {result['images_per_second']:.1f} images/s, reading included, on "
        f"{result['num_ranks']} x {result['device']} in {result['precision']}"
    )
    say(f"  every class in {output}")
