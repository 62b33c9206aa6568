"""Where the images of a task come from, and in what portions."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import beit_fast.data
from beit_fast.data.datasets import ImageFolder, ImageSource
from beit_fast.data.digits import Digits, is_digits
from beit_fast.data.loader import Loader
from beit_fast.data.samples import Sample
from beit_fast.train.parallel import World

PHOTOGRAPHS = "photographs"  # the name of the images that ship with the package
UNSEEN_BATCH = 2**32  # number of the first batch of evaluation; training never gets there


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A folder of images and the batches made of it."""

    path: str = (
        ""  # folder of images, flat or in class folders; "photographs" ship with the package,
        # "digits:train" comes with scikit-learn (data/digits.py)
    )
    batch_size: int = 128  # images per micro-batch on each rank
    num_threads: int = 4  # decoding threads; batches do not depend on it
    max_bad_share: float = (
        0.001  # of the images; more unusable ones stop the run, 0: the first does
    )


def open_source(path: str) -> ImageSource:
    """The images below `path`. Raises ValueError for a folder that is missing or has none, and as
    `Digits` does."""
    if not path:
        raise ValueError("no images were named: pass --data.path with a folder of images")
    if path == PHOTOGRAPHS:
        return ImageFolder(Path(beit_fast.data.__file__).parent / PHOTOGRAPHS)
    return Digits(path) if is_digits(path) else ImageFolder(Path(path))


def open_loader(data: DataConfig, sample: Sample, *, seed: int, world: World) -> Loader:
    """Batches of this rank. Raises ValueError as `open_source` and `Loader` do."""
    return Loader(
        open_source(data.path),
        sample,
        batch_size=data.batch_size,
        seed=seed,
        rank=world.rank,
        world_size=world.size,
        num_threads=data.num_threads,
        max_bad_share=data.max_bad_share,
    )


def unseen_batches(
    loader: Loader, num_batches: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The same few batches every time, on the device, of crops and masks no training step sees."""
    batches = loader.batches(UNSEEN_BATCH)
    try:
        for _ in range(num_batches):
            yield {name: value.to(device) for name, value in next(batches).items()}
    finally:
        batches.close()


def task_settings(config: Any) -> dict[str, Any]:
    """The settings of a task as plain data, without those of optimiser and run, which the loop adds
    and then takes the habits out (train/resume.py)."""
    settings = asdict(config)
    del settings["optim"], settings["run"]
    return settings
