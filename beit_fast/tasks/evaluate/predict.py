"""Classes of single images, by a classifier of any layout."""

import contextlib
import functools
import glob
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit_fast.data.in_order import batches_in_order
from beit_fast.data.sources.folder import ImageFiles, ImageFolder
from beit_fast.data.views.centre_view import centre_view
from beit_fast.files import naming
from beit_fast.kernels.input.patches import normalized_patches
from beit_fast.tasks.evaluate.checkpoints import Classifier, open_classifier
from beit_fast.tasks.evaluate.classes import describe_class
from beit_fast.tasks.evaluate.config import PredictConfig
from beit_fast.tasks.sources import describe_source
from beit_fast.train.world import open_world


def run_prediction(config: PredictConfig) -> None:
    """Print the likeliest classes of every image, in order; what folders hold goes to stderr.

    Raises ValueError that names the images that cannot be used, after all others are printed; at
    once where there is nothing to predict with or from.
    """
    files = find_images(
        config.images,
        follow_links=config.follow_links,
        say=lambda line: print(line, file=sys.stderr),
    )
    with open_world(config.device, named="device") as world:
        if world.size > 1:
            raise ValueError(f"torchrun started {world.size} processes: prediction runs in one")
        classifier = open_classifier(config)
        classifier.model.to(world.device)
        answers = predict(classifier, files, config)
    with naming("standard output"):
        if config.json:
            print(json.dumps(answers, indent=1))  # in ASCII, so that any terminal and name will do
        else:
            _show(answers, classifier.model.config.num_classes)
    if bad := [f"{answer['image']} ({answer['error']})" for answer in answers if "error" in answer]:
        raise ValueError(f"{len(bad)} of {len(files)} images cannot be used: {'; '.join(bad)}")


@torch.no_grad()
def predict(
    classifier: Classifier, files: list[str], config: PredictConfig
) -> list[dict[str, Any]]:
    """For every file its likeliest classes, best first, or why there are none; JSON's types."""
    model, view = classifier.model, classifier.view
    device = model.cls_token.device
    size = model.config.image_pixels
    errors: dict[int, str] = {}

    def blank(index: int, error: Exception) -> np.ndarray:
        errors[index] = str(error)
        return np.zeros((*size, 3), np.uint8)

    batches = batches_in_order(
        ImageFiles(files),
        range(len(files)),
        functools.partial(
            centre_view,
            size=size,
            crop_pct=view.crop_pct,
            interpolation=view.interpolation,
            crop_mode=view.crop_mode,
        ),
        batch_size=config.batch_size,
        num_threads=config.num_threads,
        replace_bad=blank,
        reads=config,
    )
    answers: list[dict[str, Any]] = []
    with (
        contextlib.closing(batches),
        torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        for where, images in batches:
            patches = normalized_patches(
                images.to(device), model.config.patch_pixels, view.mean, view.std
            )
            scores = model(patches).float().softmax(dim=1)
            best = scores.topk(min(config.top, scores.shape[1]))
            for index in (where.start + scores.isnan().any(dim=1).nonzero()[:, 0]).tolist():
                errors.setdefault(index, "the model's scores are not finite: are its weights?")
            for index, *top in zip(
                range(where.start, where.stop),
                best.indices.tolist(),
                best.values.tolist(),
                strict=True,
            ):
                said = {"error": errors[index]} if index in errors else _named(classifier, *top)
                answers.append({"image": files[index]} | said)
    return answers


def find_images(
    arguments: Sequence[str],
    *,
    follow_links: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Image files: those named, those below folders, those that patterns match (`**`: any depth).

    `say` is given a line for each folder, of what is read there and what is left out.
    However links lead back to where a pattern began, each image of it is there once. What is not
    there stays in the list, to be told of with the images that cannot be read. Raises ValueError
    for a folder without images.
    """
    if not arguments:
        raise ValueError("no images were named: pass files, folders or patterns after CHECKPOINT")
    files = []
    for argument in arguments:
        matches = [] if Path(argument).exists() else _matches(argument)
        for path in matches or [argument]:
            if Path(path).is_dir():
                folder = ImageFolder(path, follow_links=follow_links)
                say(describe_source(folder))
                files += [folder.name(index) for index in range(len(folder))]
            else:
                files.append(path)
    return files


def _matches(pattern: str) -> list[str]:
    """What a pattern matches, sorted, without what lies in a folder that it matches, or by another
    way is there already."""
    matches, seen = [], set()
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: path.split(os.sep)):
        folder, name = os.path.split(path)
        place = os.path.realpath(path if Path(path).is_dir() else folder)
        place = place if Path(path).is_dir() else os.path.join(place, name)
        if not any(part in seen for part in (place, *map(str, Path(place).parents))):
            matches.append(path)
            seen.add(place)
    return matches


def _named(
    classifier: Classifier, classes: list[int], probabilities: list[float]
) -> dict[str, Any]:
    """JSON of the classes; "class" is null where the checkpoint says no names."""
    names = classifier.classes
    return {
        "predictions": [
            {
                "index": index,
                "class": None if names is None else names[index],
                "probability": probability,
            }
            for index, probability in zip(classes, probabilities, strict=True)
        ]
    }


def _show(answers: list[dict[str, Any]], num_classes: int) -> None:
    for answer in answers:
        if "error" in answer:
            continue
        print(answer["image"])
        for row in answer["predictions"]:
            name = f"class {row['index']}"
            if row["class"] is not None:
                name = describe_class(row["class"], num_classes)
            print(f"  {row['probability']:7.2%}  {name}")
