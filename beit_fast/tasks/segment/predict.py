"""The class of every pixel of single images, as files: ids, and the image in their colours."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit_fast.data.sources.class_names import read_classes
from beit_fast.data.sources.decode import BadImageError, decode_fast
from beit_fast.data.sources.folder import ImageFiles
from beit_fast.data.sources.reading import Reads
from beit_fast.files import naming, new_file
from beit_fast.tasks.evaluate.predict import find_images
from beit_fast.tasks.segment.checkpoints import Segmenter, open_segmenter
from beit_fast.tasks.segment.config_evaluation import PredictSegmentationConfig
from beit_fast.tasks.segment.evaluation import read_ahead
from beit_fast.tasks.segment.sliding import segment_image
from beit_fast.train.preflight import check_writable
from beit_fast.train.world import open_world
from beit_fast.viz.segmentation import draw_overlay, palette

IDS, OVERLAYS = "ids", "overlays"  # folders below the output
NUM_SHOWN = 5  # classes of an image that are printed


def run_segmentation_prediction(config: PredictSegmentationConfig) -> None:
    """Write ids and overlay of every image, and print where, with the most frequent classes.

    Raises ValueError that names the images that cannot be used, after all others are written; at
    once where there is nothing to predict with or from, and for files that are there already.
    """
    files = list(
        dict.fromkeys(
            find_images(
                config.images,
                follow_links=config.follow_links,
                say=lambda line: print(line, file=sys.stderr),
            )
        )
    )
    output = Path(config.output)
    names = output_names(files)
    if not config.overwrite:
        _check_free(output, names)
    with open_world(config.device, named="device") as world:
        if world.size > 1:
            raise ValueError(f"torchrun started {world.size} processes: prediction runs in one")
        segmenter = _named(open_segmenter(config), config.classes_file)
        segmenter.model.to(world.device)
        for folder in (IDS, OVERLAYS):
            check_writable(output / folder, "output")
        bad = _predict(segmenter, files, names, config)
    if bad:
        raise ValueError(f"{len(bad)} of {len(files)} images cannot be used: {'; '.join(bad)}")


def output_names(files: list[str]) -> list[str]:
    """The file name of each image's results: its own, as PNG; of equal ones the later numbered.

    Names that differ in case alone are equal, as some file systems have them.

    >>> output_names(["a/1.jpg", "b/1.png", "b/2.jpg"])
    ['1.png', '1_2.png', '2.png']
    """
    stems = [Path(file).stem for file in files]
    folded = [stem.casefold() for stem in stems]
    taken, names = set(), []
    for place, stem in enumerate(stems):
        name, number = stem, 1
        while name.casefold() in taken or (number > 1 and name.casefold() in folded[place:]):
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def save_ids(ids: np.ndarray, num_classes: int, path: Path) -> None:
    """Integers (height, width) as a grey PNG: 8 bits up to 256 classes, 16 beyond."""
    kind = np.uint8 if num_classes <= 256 else np.uint16
    with naming(path), new_file(path) as file:
        Image.fromarray(ids.astype(kind)).save(file, "PNG")


def _predict(
    segmenter: Segmenter, files: list[str], names: list[str], config: PredictSegmentationConfig
) -> list[str]:
    """Write and print; what images cannot be used, and why."""
    num_classes = segmenter.model.config.num_classes
    colours = palette(num_classes)
    if segmenter.palette is not None:
        colours = np.array(segmenter.palette, np.uint8)
    output, bad = Path(config.output), []
    with (
        Reads(ImageFiles(files), config) as reads,
        contextlib.closing(
            read_ahead(
                lambda index: _read(reads, index),
                range(len(files)),
                config.num_threads,
                stop=reads.stop,
            )
        ) as images,
    ):
        for file, name, image in zip(files, names, images, strict=True):
            if isinstance(image, str):
                bad.append(f"{file} ({image})")
                continue
            ids = segment_image(
                segmenter.model,
                torch.from_numpy(image),
                segmenter.slide,
                segmenter.statistics,
                config.precision,
            )
            ids = ids.cpu().numpy()
            save_ids(ids, num_classes, output / IDS / name)
            draw_overlay(
                image,
                ids,
                classes=segmenter.names,
                colours=colours,
                path=output / OVERLAYS / name,
            )
            with naming("standard output"):
                print(f"{file}: {output / IDS / name}")
                for label, share in _most_frequent(ids):
                    print(f"  {share:7.2%}  {segmenter.names[label]}")
    return bad


def _read(reads: Reads[bytes], index: int) -> np.ndarray | str:
    """Pixels, or why there are none."""
    try:
        return reads.run(lambda read: decode_fast(read(index)))
    except (BadImageError, OSError) as error:
        return str(error)


def _most_frequent(ids: np.ndarray) -> list[tuple[int, float]]:
    labels, counts = np.unique(ids, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:NUM_SHOWN]
    return [(int(labels[i]), counts[i] / ids.size) for i in order]


def _named(segmenter: Segmenter, classes_file: str) -> Segmenter:
    """With the names and colours of a file. Raises ValueError for a file of other classes."""
    if not classes_file:
        return segmenter
    classes, num_classes = read_classes(classes_file), segmenter.model.config.num_classes
    if len(classes.names) != num_classes:
        raise ValueError(
            f"{classes_file} names {len(classes.names)} classes and the checkpoint has "
            f"{num_classes}: name these, in their order"
        )
    return Segmenter(
        **vars(segmenter) | {"classes": classes.names, "palette": classes.palette},
    )


def _check_free(output: Path, names: list[str]) -> None:
    files = [output / folder / name for name in names for folder in (IDS, OVERLAYS)]
    if there := [str(file) for file in files if file.exists()]:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise ValueError(
            f"{', '.join(there[:3])}{more} would be overwritten: pass another --output, or "
            "--overwrite to replace what is there"
        )
