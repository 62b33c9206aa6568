"""Tar shards as the public ones are laid out: an image with its .cls and .json beside it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TAR_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(number, size=(60, 40)):
    """Bytes of a JPEG that no other number has."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def add_member(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shards(
    folder, num_shards=3, per_shard=5, *, num_classes=3, name="train-{:04d}.tar", with_json=True
):
    """Shard s has the images s * per_shard ..., of classes in turn, under timm's names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with tarfile.open(folder / name.format(shard), "w") as tar:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                label = number % num_classes
                key = f"n{label:08d}_{number}"
                add_member(tar, f"{key}.jpg", picture(number))
                add_member(tar, f"{key}.cls", str(label).encode())
                if with_json:
                    described = {"label": label, "width": 60, "height": 40, "filename": key}
                    add_member(tar, f"{key}.json", json.dumps(described).encode())
    return folder


def write_tar(content, *, kind="gnu", end=True):
    """Bytes of a tar of (name or TarInfo, data), without the zeros at its end if `end` is false."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=TAR_FORMATS[kind]) as tar:
        for name, data in content:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        size = tar.offset
    return file.getvalue() if end else file.getvalue()[:size]


def entry(name, kind, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info
