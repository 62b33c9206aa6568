"""Where the images of a task come from, and in what portions."""

from dataclasses import dataclass
from pathlib import Path

import beit_fast.data
from beit_fast.data.datasets import ImageFolder

PHOTOGRAPHS = "photographs"  # the name of the images that ship with the package


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A folder of images and the batches made of it."""

    path: str = (
        ""  # folder of images, flat or in class folders; "photographs" ship with the package
    )
    batch_size: int = 128  # images per micro-batch on each rank
    num_threads: int = 4  # decoding threads; batches do not depend on it
    max_bad_share: float = (
        0.001  # of the images; more unusable ones stop the run, 0: the first does
    )


def open_source(path: str) -> ImageFolder:
    """The images below `path`. Raises ValueError for a folder that is missing or has none."""
    if not path:
        raise ValueError("no images were named: pass --data.path with a folder of images")
    if path == PHOTOGRAPHS:
        return ImageFolder(Path(beit_fast.data.__file__).parent / PHOTOGRAPHS)
    return ImageFolder(Path(path))
