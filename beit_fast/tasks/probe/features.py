"""Features of every block of a frozen encoder, computed once and kept on the disk.

    <folder>/manifest.json   what they were made from, and the images left out, with the reason
    <folder>/features.npy    fp32 (n, S, 2, D): of image n after block S, [CLS] and mean of patches
    <folder>/labels.npy      int64 (n,)

An image that cannot be used has no feature: it is left out, with its label.

No norm is applied (as in unilm's run_linear_eval.py). The two arrays are renamed into place
before the manifest: without one, a folder does not count.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.bad_samples import BadSamples
from beit_fast.data.in_order import batches_in_order, lost, name_unusable, unusable_images
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.views.centre_view import centre_view
from beit_fast.files import drop, naming, new_file, replace_text
from beit_fast.kernels.input.patches import normalized_patches
from beit_fast.model.beit import Beit
from beit_fast.train.stop import heeded

MANIFEST, FEATURES, LABELS = "manifest.json", "features.npy", "labels.npy"
FORMAT = 1
_ROWS = 1024  # copied at once


@dataclass(frozen=True)
class Features:
    """features (n, S, 2, D), a memory map, [CLS] before the mean of the patches; labels (n,).

    left_out: images that could not be used and have no row, and why.
    """

    features: np.ndarray
    labels: Tensor
    left_out: dict[str, str]


@torch.no_grad()
def block_features(model: Beit, images: Tensor) -> Tensor:
    """[CLS] and mean of the patches after every block, fp32 (B, S, 2, D); images as `Beit`'s."""
    outputs = []

    def keep(_block: torch.nn.Module, _inputs: tuple, x_BND: Tensor) -> None:
        x_BND = x_BND.float()
        outputs.append(torch.stack([x_BND[:, 0], x_BND[:, 1:].mean(1)], dim=1))

    with _hooked(model, keep):
        Beit.forward_features(model, images)
    return torch.stack(outputs, dim=1)


def cached_features(
    folder: Path,
    model: Beit,
    source: ImageFolder,
    labels: Tensor,
    *,
    made_from: Mapping[str, Any],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    crop_pct: float,
    precision: str,
    batch_size: int,
    num_threads: int,
    max_bad_share: float | None = None,
    device: torch.device,
    reads: ReadConfig = READS,
) -> Features:
    """Features of all images in their order: those in `folder`, or computed now and kept there.

    made_from: what they depend on besides the images, as JSON has it. Images that cannot be used
    are left out as far as `max_bad_share` allows, and logged; None: every image counts, and all are
    read before the first is encoded.
    Raises ValueError, naming every difference, for a folder with features of something else, for
    one that is damaged, and for images that count and cannot be used, naming all of them;
    BadDataError for more bad images than allowed.
    """
    if max_bad_share is None and (missing := lost(source)):
        raise ValueError(name_unusable(missing, len(source)))
    bad = BadSamples(source, max_bad_share or 0, "it is left out", "max_bad_share")
    (mean, std), (height, width) = statistics, model.config.image_pixels
    made_from = dict(made_from) | {
        "images": source.digest(),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        "transform": f"bicubic, centre, {crop_pct:g} of {height}x{width} px",
        "mean": list(mean),
        "std": list(std),
        "precision": precision,
    }
    shape = (len(source), model.config.depth, 2, model.config.embed_dim)
    if (folder / MANIFEST).exists():
        return _open(folder, made_from, shape, bad)
    unusable = {}
    if max_bad_share is None:
        unusable = unusable_images(
            source,
            num_threads=num_threads,
            each=functools.partial(heeded, place="while looking at the test images"),
            reads=reads,
        )
    if unusable:
        raise ValueError(name_unusable(unusable, len(source)))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FEATURES}"
    array = _allocate(temporary, shape)
    was_training = model.training
    model.eval()
    view = functools.partial(centre_view, size=model.config.image_pixels, crop_pct=crop_pct)
    reasons: dict[int, str] = {}

    def leave_out(index: int, error: Exception) -> np.ndarray:
        bad.add(index, error)
        reasons[index] = str(error)
        return np.zeros((*model.config.image_pixels, 3), np.uint8)

    batches = batches_in_order(
        source,
        range(len(source)),
        view,
        batch_size=batch_size,
        num_threads=num_threads,
        replace_bad=leave_out,
        reads=reads,
    )
    try:
        for rows, batch in heeded(batches, "while features were computed"):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                pixels = normalized_patches(batch.to(device), model.config.patch_pixels, mean, std)
                features = block_features(model, pixels)
            array[rows] = features.cpu().numpy()
        array.flush()
        kept = np.setdiff1d(np.arange(len(source)), list(reasons))
        if reasons:
            _keep_rows(temporary, array, kept)
    except BaseException:
        drop(temporary)
        raise
    finally:
        del array
        model.train(was_training)
    with naming(folder):
        temporary.rename(folder / FEATURES)
        with new_file(folder / LABELS) as file:
            np.save(file, labels.numpy()[kept], allow_pickle=False)
        content = {"format": FORMAT, "made_from": made_from, "left_out": reasons}
        replace_text(folder / MANIFEST, json.dumps(content, indent=1))
    return _open(folder, made_from, shape, bad)


def _allocate(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new file of zeros, mapped into memory. Raises OSError where the disk has no room for it.

    A map whose pages have no place on the disk would end the process as they are written.
    """
    try:
        with naming(path):
            drop(path)  # a link there would be written through
            array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError:
        drop(path)
        raise
    return array


def _keep_rows(path: Path, array: np.ndarray, kept: np.ndarray) -> None:
    """Replace the file of `array`, a map of it, by one of these rows."""
    short = path.with_name(f"{path.name}.kept")
    drop(short)
    try:
        rows = np.lib.format.open_memmap(short, "w+", array.dtype, (len(kept), *array.shape[1:]))
        for first in range(0, len(kept), _ROWS):
            rows[first : first + _ROWS] = array[kept[first : first + _ROWS]]
        rows.flush()
        short.rename(path)
    except BaseException:
        short.unlink(missing_ok=True)
        raise


def _open(
    folder: Path, made_from: Mapping[str, Any], shape: tuple[int, ...], bad: BadSamples
) -> Features:
    """shape: with all images. Those left out are told to `bad`."""
    remedy = "delete the folder to compute them anew, or give another --output"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        theirs = {"format": manifest["format"], **manifest["made_from"]}
        ours = {"format": FORMAT, **made_from}
        different = [
            f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        if different:
            raise ValueError(
                f"the features in {folder} are of something else ({'; '.join(different)}): {remedy}"
            )
        reasons = {int(index): why for index, why in manifest.get("left_out", {}).items()}
        shape = (shape[0] - len(reasons), *shape[1:])
        features = np.load(folder / FEATURES, mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / LABELS, allow_pickle=False)
    except (OSError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise ValueError(f"the features in {folder} are damaged ({error!r}): {remedy}") from error
    except ValueError as error:
        if str(error).startswith("the features in"):
            raise
        raise ValueError(f"the features in {folder} are damaged ({error}): {remedy}") from error
    if features.shape != shape or features.dtype != np.float32 or len(labels) != shape[0]:
        raise ValueError(
            f"the features in {folder} are damaged ({features.dtype} {features.shape} and not "
            f"float32 {shape}): {remedy}"
        )
    for index, why in reasons.items():
        bad.add(index, BadImageError(why))
    return Features(features, torch.from_numpy(labels), bad.by_name())


@contextmanager
def _hooked(model: Beit, hook: Callable) -> Iterator[None]:
    handles = [block.register_forward_hook(hook) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
