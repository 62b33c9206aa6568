"""The manifest of a checkpoint: JSON beside its weight files, with their digests and one of itself.

    format     2; 1 had no digest of itself
    step       agrees with the folder's name, step_00001000
    files      SHA-256 of every weight file, by name
    settings   what the run is, as plain data
    sha256     of all the rest

It is read here alone, whoever asks: what is read is what was written, or a CheckpointError.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit_fast.files import damage

FORMAT = 2
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step_(\d{8})", re.ASCII)
_DIGEST = "sha256"
# What an entry has to be; the later ones may be absent.
_NEEDED = {"step": int, "files": dict, "settings": dict}
_OPTIONAL = {"environment": dict, "schedule": dict, "history": list, "images": list}
_LENGTH = {"num_steps", "warmup_steps"}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, foreign, or of another run."""


def manifest_text(content: Mapping[str, Any]) -> str:
    """The text of a manifest whose entries, but for its format and digest, are `content`."""
    entries = json.loads(json.dumps({"format": FORMAT, **content}))  # as they are read
    return json.dumps(entries | {_DIGEST: _digest(entries)}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of one checkpoint; `step`, `files` and `settings` are there.

    Raises CheckpointError that names the file.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _check(manifest)
        # Under another name, a copy, it says what it is itself.
        name = STEP_NAME.fullmatch(folder.name)
        if name and int(name[1]) != manifest["step"]:
            raise ValueError(f"it is of step {manifest['step']}, its folder is {folder.name}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: no complete checkpoint") from error
    except _OtherFormat as error:
        raise CheckpointError(
            f"{path} has checkpoint format {error}, this version reads 1 to {FORMAT}: load it with "
            "the beit_fast that wrote it"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        why = str(error) if type(error) is ValueError else damage(error)
        raise CheckpointError(f"{path} is damaged: {why}") from error
    return manifest


class _OtherFormat(Exception):
    """A whole number that this version does not know."""


def _check(manifest: Any) -> None:
    """Raise ValueError for what no version wrote."""
    if not isinstance(manifest, dict):
        raise ValueError(f"it holds a {type(manifest).__name__}, not an object")
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise ValueError(f"its format is {version!r}: it is of no checkpoint")
    if version > FORMAT:
        raise _OtherFormat(version)
    if version > 1 and manifest.get(_DIGEST) != _digest(manifest):
        raise ValueError("its SHA-256 is not the one it was saved with")
    for name, kind in (_NEEDED | _OPTIONAL).items():
        if name not in manifest and name in _OPTIONAL:
            continue
        if type(value := manifest.get(name)) is not kind:
            raise ValueError(f"its {name} is {_shown(value)}, and no {kind.__name__}")
    for name, digest in manifest["files"].items():
        if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(f"it lists {_shown(name)}, which is no weight file")
        if not isinstance(digest, str):
            raise ValueError(f"of {_shown(name)} it has no digest")
    for name in ("run", "optim"):
        if type(value := manifest["settings"].get(name, {})) is not dict:
            raise ValueError(f"its settings have {_shown(value)} as {name}")
    if not all(isinstance(entry, dict) for entry in manifest.get("history", [])):
        raise ValueError("its history is no list of objects")
    length = manifest.get("schedule", dict.fromkeys(_LENGTH, 0))
    if length.keys() != _LENGTH or not all(type(steps) is int for steps in length.values()):
        raise ValueError(f"its schedule is {_shown(length)}, and no number of steps")


def _shown(value: Any) -> str:
    """In a line of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _digest(entries: Mapping[str, Any]) -> str:
    others = {name: value for name, value in entries.items() if name != _DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
