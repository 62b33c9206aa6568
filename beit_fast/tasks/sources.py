"""Where the images of a task come from, and in what portions."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import beit_fast.data
from beit_fast.data.config import PHOTOGRAPHS, DataConfig
from beit_fast.data.loader import Loader
from beit_fast.data.samples import Sample
from beit_fast.data.sources.class_folders import called_as_parts
from beit_fast.data.sources.digit_scenes import DigitScenes, is_digit_scenes
from beit_fast.data.sources.folder import ImageFolder, ImageSource, Source
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.opening import open_images
from beit_fast.data.sources.scan import Found
from beit_fast.data.sources.segmentation import MaskedFolder
from beit_fast.data.sources.subset import Subset
from beit_fast.flags import flag
from beit_fast.train.launch import launched_rank
from beit_fast.train.log import plain_console
from beit_fast.train.stop import heed_stop
from beit_fast.train.world import World

_FIRST_SAID, _SAID_EVERY = 2.0, 10.0  # seconds, of shards that are indexed
UNSEEN_BATCH = 2**32  # number of the first batch of evaluation; training never gets there


def open_source(path: str, *, follow_links: bool = True, reads: ReadConfig = READS) -> ImageSource:
    """The images that `path` names. Raises ValueError as `open_images` and `DigitScenes` do."""
    if not path:
        raise ValueError("no images were named: pass --data.path with a folder of images")
    if path == PHOTOGRAPHS:
        return ImageFolder(Path(beit_fast.data.__file__).parent / PHOTOGRAPHS)
    if is_digit_scenes(path):
        return DigitScenes(path)
    return open_images(path, follow_links=follow_links, reads=reads, progress=indexing())


def indexing() -> Callable[[int, int], None]:
    """What is said, on the main rank, while shards are indexed, and that takes long; a stop signal
    is heeded meanwhile."""
    console = plain_console(quiet=launched_rank().rank > 0)
    said = time.monotonic() + _FIRST_SAID - _SAID_EVERY

    def tell(done: int, total: int) -> None:
        nonlocal said
        heed_stop("while the shards were indexed")
        now = time.monotonic()
        if now - said >= _SAID_EVERY:
            said = now
            console.print(f"indexing the shards, which is done once: {done} of {total}")

    return tell


def describe_source(source: Source, classes: Sequence[str] | None = None) -> str:
    """What is read and what is not, in one line: "photos: 15 images, 5 of them by links, 3 classes,
    2 other files (2 .avif) left out". Names that are not UTF-8 have their bytes escaped."""
    if isinstance(source, Subset):
        return f"{len(source)} of {describe_source(source.source, classes)}"
    num_masks_left = 0
    if isinstance(source, MaskedFolder):
        source, num_masks_left = source.images, len(source.without_image)
    found = source.found if isinstance(source, ImageFolder) else Found()
    said = [f"{len(source)} image{'s' * (len(source) != 1)}"]
    if found.num_linked:
        said[0] += f", {found.num_linked} of them by links"
    if classes is not None:
        said.append(f"{len(classes)} class{'es' * (len(classes) != 1)}")
    elif len(found.folders) > 1 and called_as_parts(found.folders):
        said.append(f"all of {', '.join(found.folders)} (pass the path of one to read that alone)")
    said += filter(None, [found.left_out()])
    if num_masks_left:
        said.append(f"{num_masks_left} mask{'s' * (num_masks_left != 1)} without an image left out")
    if hasattr(source, "left_out"):  # of shards, tables and stores
        said += filter(None, [source.left_out()])
    path = source.root if isinstance(source, ImageFolder) else source.path
    return f"{path}: {', '.join(said)}".encode(errors="backslashreplace").decode()


def say(line: str, world: World) -> None:
    """Print a line on the main rank as it is: no bracket in a path is markup."""
    plain_console(quiet=not world.is_main).print(line)


def open_loader(data: DataConfig, sample: Sample, *, seed: int, world: World) -> Loader:
    """Batches of this rank. Raises ValueError as `open_source` and `Loader` do."""
    return Loader(
        open_source(data.path, follow_links=data.follow_links, reads=data),
        sample,
        batch_size=data.batch_size,
        seed=seed,
        rank=world.rank,
        world_size=world.size,
        num_threads=data.num_threads,
        max_bad_share=data.max_bad_share,
        reads=data,
        window=data.shards_at_once,
        device=world.device,
    )


def held_out_anew() -> str:
    """What to say where images are held out and a run would go on over others."""
    return (
        f"{flag('data.held_out')} then holds out other images, some of which were trained on: for "
        f"an honest evaluation give {flag('data.test')} a folder of its own"
    )


def unseen_batches(
    loader: Loader, num_batches: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The same few batches every time, on the device, of crops and masks no training step sees."""
    batches = loader.batches(UNSEEN_BATCH, ahead=False)
    try:
        for _ in range(num_batches):
            yield {name: value.to(device) for name, value in next(batches).items()}
    finally:
        batches.close()


def task_settings(config: Any) -> dict[str, Any]:
    """The settings of a task as plain data, without those of optimiser and run, which the loop adds
    and then takes the habits out (train/changes.py)."""
    settings = asdict(config)
    del settings["optim"], settings["run"]
    if settings["data"].get("shuffle") == "full":
        del settings["data"]["window"]  # nothing depends on it
    return settings
