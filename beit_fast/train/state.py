"""Checkpoints: a folder a step, complete or not there at all.

    <output>/checkpoints/step_00001000/
        model.safetensors  optimizer.safetensors  [ema.safetensors]  run.safetensors
        manifest.json      step, settings, versions, commit, SHA-256 of every file and of itself; of
                           a run also its length (`schedule`) and what resumes changed (`history`)

Written under a temporary name, flushed to the disk, read again, then renamed: a crash leaves a
folder that does not count. Nothing is pickled. Every byte that is read is checked against its
digest first, because a flipped bit in a weight file otherwise loads as a wrong number without any
error.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit_fast.files import file_digest, flush_folder
from beit_fast.flags import flag
from beit_fast.manifest import (
    MANIFEST,
    STEP_NAME,
    CheckpointError,
    manifest_text,
    read_manifest,
)
from beit_fast.seal import UNSEALED, seal

# Keys in the metadata of weight files, as `beit_fast.weights.description` reads them, and settings.
DESCRIBED = {
    "beit_fast.config": "model",
    "beit_fast.classes": "classes",
    "beit_fast.statistics": "statistics",
    "beit_fast.crop_pct": "crop_pct",
}
logger = logging.getLogger("beit_fast.train")


@dataclass(frozen=True)
class Checkpoint:
    """What was read: `tensors[file stem][name]`, and the manifest."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    manifest: dict[str, Any]


def checkpoint_paths(output: Path) -> list[Path]:
    """Complete checkpoints below `output`, oldest first. Temporary folders do not count."""
    folder = output / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and STEP_NAME.fullmatch(p.name))


def save_checkpoint(
    output: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    *,
    keep: int,
    metadata: Mapping[str, str] = {},
    **more: Any,
) -> Path:
    """Write step `step`, then drop all but the newest `keep`. Returns the checkpoint's folder.

    Every weight file carries `metadata`, as `metadata_of` makes it. `more` are further entries of
    the manifest, as JSON has them.

    Raises OSError, with the path and the free space, if it cannot be written; what was there
    before stays whole.
    """
    folder = output / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in _leftovers(output):
        with contextlib.suppress(OSError):
            _remove(stale)  # in the way
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}"
    try:
        temporary.mkdir()
        digests = {}
        for stem, values in tensors.items():
            path = temporary / f"{stem}.safetensors"
            _write_tensors(path, values, metadata)
            digests[path.name] = file_digest(path)
        manifest = {
            "step": step,
            "files": digests,
            "settings": settings,
            "environment": environment(),
            **more,
        }
        path = temporary / MANIFEST
        path.write_text(manifest_text(manifest), encoding="utf-8")
        _flush(path)
        read_manifest(temporary)
        if final.exists():
            _discard(final)
        temporary.rename(final)
        flush_folder(folder)
    except (OSError, SafetensorError, CheckpointError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            f"checkpoint of step {step} not written to {folder} ({free:.0f} MiB free): {error}"
        ) from error
    for old in checkpoint_paths(output)[:-keep]:
        try:
            _discard(old)
        except OSError as error:
            logger.warning("old checkpoint %s was not deleted: %s", old, error)
    return final


def _write_tensors(path: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A sealed file that is on the disk, and holds what the tensors hold.

    Raises OSError, and SafetensorError of the same meaning.
    """
    content = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    save_file(content, path, metadata={"format": "pt", **metadata, **UNSEALED})
    with path.open("rb+") as file:
        head = seal(file, lambda name, *_: [_bytes(content[name])])
    # safetensors makes files only their owner can read. Asking for the umask would set it, under
    # the feet of other threads.
    path.chmod(path.parent.stat().st_mode & 0o666)
    _flush(path)
    if not _holds(path, head, content):
        raise OSError(f"{path} does not read as it was written: look at the disk")


def _holds(path: Path, head: bytes, content: Mapping[str, Tensor]) -> bool:
    """Whether a file reads as these first bytes and tensors."""
    with path.open("rb") as file:
        if file.read(len(head)) != head:
            return False
    try:
        read = load_file(path)
    except SafetensorError:
        return False
    return all(_same(_bytes(read[name]), _bytes(content[name])) for name in content)


def _same(some: np.ndarray, other: np.ndarray) -> bool:
    """Both uint8 (N,). By eight, which is six times as fast."""
    words = len(some) // 8 * 8
    by_eight = (part[:words].view(np.uint64) for part in (some, other))
    return np.array_equal(*by_eight) and np.array_equal(some[words:], other[words:])


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.flatten().view(torch.uint8).numpy()


def remove_leftovers(output: Path) -> None:
    """Drop what a run left half written, or half deleted, that was killed; and say so."""
    for path in _leftovers(output):
        try:
            _remove(path)
        except OSError as error:
            logger.warning("%s, left by a run that was killed, was not deleted: %s", path, error)
        else:
            logger.warning("%s, left by a run that was killed while it saved, is deleted", path)


def _leftovers(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").glob(".step_*"))


def _discard(path: Path) -> None:
    """Delete a checkpoint, under a name that does not count: half of one is none."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    """A folder with all in it. Of a link the link goes, not what it points at; so does a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def metadata_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a weight file says of itself where it is without its manifest, as JSON texts."""
    named = {key: settings.get(setting) for key, setting in DESCRIBED.items()}
    return {key: json.dumps(value) for key, value in named.items() if value is not None}


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError naming the file at fault."""
    manifest = read_manifest(path)
    tensors = {}
    for name, digest in manifest["files"].items():
        file = path / name
        try:
            content = file.read_bytes()
        except (OSError, ValueError) as error:  # a NUL in its name
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is not the one it was saved with"
            )
        try:
            tensors[file.stem] = load_tensors(content)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is no safetensors file: {error}") from error
    return Checkpoint(path, manifest["step"], tensors, manifest)


def load_newest(output: Path, *, fallback: bool = False) -> Checkpoint | None:
    """The newest checkpoint below `output`, or None where there is none.

    A damaged one raises CheckpointError, unless `fallback` allows the one before it, with a
    warning. If all are damaged the newest one's error is raised.
    """
    first_error = None
    for path in reversed(checkpoint_paths(output)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            if not fallback:
                raise CheckpointError(
                    f"{error}. Pass {flag('run.fallback')} true to resume from an older checkpoint"
                ) from error
            logger.warning("%s: trying the checkpoint before it", error)
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    return None


def newest_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint below `output`; None where there is none to read."""
    paths = checkpoint_paths(output)
    try:
        return read_manifest(paths[-1]) if paths else None
    except CheckpointError:
        return None


def versions() -> dict[str, str | None]:
    """Of the packages that a result depends on; None for one that is not installed."""
    packages = ("beit-fast", "torch", "torchvision", "triton", "numpy", "timm", "grain")
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def environment() -> dict[str, str | None]:
    """Versions, commit (None outside a checkout) and machine that a result depends on: of this
    process, so that a commit which is made while it runs is not taken for its code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        **versions(),
        "python": platform.python_version(),
        "device": device,
        "commit": _commit(),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _flush(path: Path) -> None:
    """Force a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
