"""Visual tokens of K views of every image, made once and read by any number of runs.

    DIR/view_000_image_00000000.npy   one record a view, in the order of the data set
        manifest.json                 format, what the tokens were made from, SHA-256 of every file

View k of an image is the one that a live run draws in pass k: `SampleSeed(seed, k, index)`. A run
of at most K passes therefore sees the images and tokens of a live one; longer runs see view
e mod K in pass e, under masks that are drawn afresh in every pass. A record is

    ids        uint16 (L,)  visual tokens
    box        int32 (4,)   top, left, height, width of the crop
    seed       uint64       of the generator that drew jitter, flip and box, in this order
    image      uint32       the image read: another than the record's own if that one is bad
    num_bytes  uint32       of its file
    flip       bool

425 bytes of a 14 x 14 grid. The seed makes the view again; what was drawn, and the size of the
file, then show that it is the view of these tokens.

Files are written under a temporary name, flushed and renamed, and count once the manifest lists
them. Reading maps them into memory: ranks and workers share the pages. Nothing is pickled.
"""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch

import beit_fast.data
from beit_fast.data.device_decode import DecodeCounts
from beit_fast.data.device_views import DeviceViews
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.folder import ImageSource
from beit_fast.data.sources.limits import MAX_PIXELS
from beit_fast.data.views.color_jitter import jitter_views
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import LATE, VIEWS, ViewDraw, make_views
from beit_fast.files import damage as damage_of
from beit_fast.files import file_digest, flush_folder, replace_file

FORMAT = 1
MANIFEST = "manifest.json"
_SHARD_NAME = re.compile(r"view_(?P<view>\d{3,})_image_(?P<first>\d{8,})\.npy", re.ASCII)
_PROBES = ("cat.jpg", "macaw.jpg")
_SMALL = (32, 32)  # views for which these are decoded at a part of their size
# What a setting was before there was one.
_BEFORE = {"views.decode": "full"}
_CPU = torch.device("cpu")


class TokenCacheError(ValueError):
    """A token cache that is damaged, unfinished, or made from something else."""


class Shard(NamedTuple):
    """Images first .. last - 1 of one view."""

    view: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"view_{self.view:03}_image_{self.first:08}.npy"


@dataclass(frozen=True)
class Manifest:
    """What a cache holds. `files`: SHA-256 of the finished ones by name."""

    made_from: dict[str, Any]
    num_views: int
    images_per_shard: int
    files: dict[str, str]
    environment: dict[str, Any]

    def shards(self) -> Iterator[Shard]:
        num_images = self.made_from["data"]["num_images"]
        for view in range(self.num_views):
            for first in range(0, num_images, self.images_per_shard):
                yield Shard(view, first, min(first + self.images_per_shard, num_images))

    @property
    def num_shards(self) -> int:
        num_images = self.made_from["data"]["num_images"]
        return self.num_views * -(-num_images // self.images_per_shard)

    def has(self, name: str) -> bool:
        """Whether a file of that name is one of `shards`, which may be told to be any number."""
        if (found := _SHARD_NAME.fullmatch(name)) is None:
            return False
        view, first = int(found["view"]), int(found["first"])
        num_images = self.made_from["data"]["num_images"]
        is_place = view < self.num_views and first < num_images
        is_first = first % self.images_per_shard == 0
        return is_place and is_first and Shard(view, first, first).name == name

    @property
    def dtype(self) -> np.dtype:
        height, width = self.made_from["grid"]
        return record_dtype(height * width)


def record_dtype(num_tokens: int) -> np.dtype:
    """The record of one view with that many tokens, without gaps."""
    return np.dtype(
        [
            ("ids", "<u2", (num_tokens,)),
            ("box", "<i4", (4,)),
            ("seed", "<u8"),
            ("image", "<u4"),
            ("num_bytes", "<u4"),
            ("flip", "?"),
        ]
    )


def describe(
    source: ImageSource,
    view: ViewConfig,
    grid: tuple[int, int],
    seed: int,
    tokenizer: Mapping[str, Any],
    device: torch.device = _CPU,
) -> dict[str, Any]:
    """All that tokens depend on, as plain data; `tokenizer` describes that one, and `device` is
    where views of kind gpu are made: its decoder is not the CPU's.

    Of libraries and of this code it holds what they do: a digest of the pixels that two photographs
    of the package give, so that an upgrade which changes none is none.
    """
    made_from = {
        "data": {"num_images": len(source), "names_and_sizes": source.digest()},
        "tokenizer": dict(tokenizer),
        "views": asdict(view),
        "pixels": _pixel_digest(view),
        "grid": grid,
        "seed": seed,
    }
    if view.kind == "gpu":
        made_from["decoder"] = device.type
    return json.loads(json.dumps(made_from))  # as a manifest holds it


def check_made_from(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise TokenCacheError that lists every difference of the cache (`theirs`) from the run."""
    theirs, ours = _flatten(theirs), _flatten(ours)
    theirs = {key: value for key, value in _BEFORE.items() if key in ours} | theirs
    different = [
        f"{key} was {theirs.get(key, 'absent')!r}, is {ours.get(key, 'absent')!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, "absent") != ours.get(key, "absent")
    ]
    if different:
        raise TokenCacheError(
            f"the tokens in {folder} were made from something else ({'; '.join(different)}): "
            "restore it, or make other tokens with `beit-fast pretokenize`"
        )


def read_manifest(folder: Path) -> Manifest:
    """Raises TokenCacheError where there is none, or one that cannot be read."""
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise TokenCacheError(
            f"{folder} is not a folder: give the one that `beit-fast pretokenize` wrote; an "
            "archive has to be unpacked first"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format")
        if version != FORMAT:
            raise TokenCacheError(
                f"{folder} has token cache format {version}, this version reads {FORMAT}: make it "
                "anew, or read it with the beit_fast that wrote it"
            )
        manifest = Manifest(**values)
        if min(manifest.num_views, manifest.images_per_shard, *manifest.made_from["grid"]) < 1:
            raise ValueError("a size in it is below 1")
        if foreign := sorted(name for name in manifest.files if not manifest.has(name)):
            raise ValueError(f"{foreign[0]!r} is no file of it")
        sizes = manifest.num_views, manifest.images_per_shard, manifest.num_shards
        if not all(type(size) is int for size in sizes):
            raise TypeError(f"{sizes} are sizes of it")
        manifest.dtype  # noqa: B018  (a grid that has one)
    except TokenCacheError:
        raise
    except FileNotFoundError as error:
        raise TokenCacheError(
            f"{path} is missing: make the tokens with `beit-fast pretokenize`"
        ) from error
    except (
        *(ValueError, TypeError, KeyError, AttributeError, ArithmeticError),
        *(RecursionError, OSError),
    ) as error:
        raise TokenCacheError(f"{path} is damaged: {damage_of(error)}") from error
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest. Raises OSError as `write_shard` does; the old one is then whole."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1)
    _write_whole(folder / MANIFEST, lambda file: file.write(text.encode()))


def write_shard(folder: Path, shard: Shard, records: np.ndarray) -> str:
    """Write the records of a shard; their file's SHA-256.

    Raises OSError, with the path and the free space, if it cannot be written.
    """
    path = folder / shard.name
    _write_whole(path, lambda file: np.save(file, records, allow_pickle=False))
    return file_digest(path)


def remove_leftovers(folder: Path) -> None:
    """Drop what a writer that was killed left under a temporary name."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def damage(folder: Path, name: str, digest: str) -> str | None:
    """What is wrong with a finished file, None where it is whole. Reads all of it."""
    path = folder / name
    try:
        found = file_digest(path)
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None if found == digest else f"{path} is damaged: its SHA-256 is not the one written"


class TokenCache:
    """A finished cache, mapped into memory.

    `record` may be called from many threads. Of every `parts` files this process checks one,
    number `part`, so that ranks share that work.
    Raises TokenCacheError where a file is missing or damaged, or the cache is unfinished.
    """

    def __init__(self, folder: str | Path, *, part: int = 0, parts: int = 1):
        self.folder = Path(folder)
        self.manifest = manifest = read_manifest(self.folder)
        self.num_views = manifest.num_views
        if len(manifest.files) < manifest.num_shards:
            raise TokenCacheError(
                f"{self.folder} has {len(manifest.files)} of {manifest.num_shards} files: run the "
                "same `beit-fast pretokenize` again, which makes the rest"
            )
        again = "run the same `beit-fast pretokenize` again, which makes that file anew"
        self._records: list[list[np.ndarray]] = [[] for _ in range(self.num_views)]
        for number, shard in enumerate(manifest.shards()):
            if number % parts == part:
                wrong = damage(self.folder, shard.name, manifest.files[shard.name])
                if wrong is not None:
                    raise TokenCacheError(f"{wrong}; {again}")
            path = self.folder / shard.name
            try:
                records = np.lib.format.open_memmap(path, mode="r")  # never unpickles
            except (ValueError, OSError) as error:
                raise TokenCacheError(f"{path} cannot be read: {error}; {again}") from error
            expected = (shard.last - shard.first,), manifest.dtype
            if (records.shape, records.dtype) != expected:
                raise TokenCacheError(
                    f"{path} holds {records.dtype} {records.shape} where {expected[1]} "
                    f"{expected[0]} belongs; {again}"
                )
            self._records[shard.view].append(records)

    def record(self, seed: SampleSeed) -> np.void:
        """The record for an image in a pass: that of view `epoch % num_views`."""
        shard, row = divmod(seed.index, self.manifest.images_per_shard)
        return self._records[seed.epoch % self.num_views][shard][row]


def check_view(record: np.void, draw: ViewDraw, num_bytes: int, name: str) -> None:
    """Raise TokenCacheError unless a view is the one that the record's tokens are of."""
    found = {"file size": num_bytes, "crop": list(draw.box), "flip": draw.flip}
    stored = {
        "file size": int(record["num_bytes"]),
        "crop": record["box"].tolist(),
        "flip": bool(record["flip"]),
    }
    if different := [
        f"{name} was {stored[name]}, is {found[name]}"
        for name in found
        if found[name] != stored[name]
    ]:
        raise TokenCacheError(
            f"{name} is not the image its tokens were made from ({'; '.join(different)}): it was "
            "changed, or could be read at only one of the two times. Restore it or make the tokens "
            "anew"
        )


def check_images(images: np.ndarray, read: np.ndarray, name: Callable[[int], str]) -> None:
    """Raise TokenCacheError unless the images read are those of the records: both int (B,)."""
    if (wrong := np.flatnonzero(images != read)).size:
        raise TokenCacheError(
            f"the tokens of {name(images[wrong[0]])} came with {name(read[wrong[0]])}: one of the "
            "two could be read when the tokens were made and cannot now, or the reverse. Restore "
            "it or make the tokens anew"
        )


@functools.lru_cache(maxsize=4)
def _pixel_digest(view: ViewConfig) -> str:
    """SHA-256 of what two photographs look like in four passes, jittered; on the CPU."""
    digest = hashlib.sha256()
    view = replace(view, max_pixels=MAX_PIXELS)
    if view.decode == "scaled":  # as it will be of larger photographs than these
        view = replace(view, size=_SMALL, token_size=_SMALL)
    folder = Path(beit_fast.data.__file__).parent / "photographs"
    for name in _PROBES:
        data = (folder / name).read_bytes()
        for epoch in range(4):
            made, _ = make_views(data, view, SampleSeed(0, epoch, 0).rng("view"))
            if view.kind == "gpu":
                views = DeviceViews(view, VIEWS, _CPU, DecodeCounts())([made[LATE]], _keep)
            else:
                views = jitter_views({key: torch.from_numpy(x)[None] for key, x in made.items()})
            for key in sorted(views):
                digest.update(views[key].contiguous().numpy())
    return digest.hexdigest()


def _keep(row: int, error: Exception) -> NoReturn:
    raise error


def _write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    try:
        replace_file(path, write)
        flush_folder(path.parent)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"{path} not written ({free:.0f} MiB free): {error.strerror or error}. Finished files "
            "are kept: make room and run the same command again"
        ) from error


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
