"""What files of ours say of themselves: the model's config, its classes, how images are made.

A run says it in the manifest beside its weights, and every safetensors file in its own metadata, so
that a file which was moved elsewhere is still understood.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from beit_fast.files import refuse_long_header, refuse_other_kinds
from beit_fast.manifest import MANIFEST, STEP_NAME, read_manifest

# In a file's metadata, each a JSON text. `beit_fast.train.state` writes the same into checkpoints.
CONFIG_KEY = "beit_fast.config"
CLASSES_KEY = "beit_fast.classes"
STATISTICS_KEY = "beit_fast.statistics"
CROP_KEY = "beit_fast.crop_pct"

NAMED = ("half", "imagenet")
# One of these names, or mean and std of pixels in 0..1.
Statistics = str | tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Description:
    """None: it is not said."""

    config: dict[str, Any] | None = None  # fields of BeitConfig
    classes: tuple[str, ...] | None = None  # their names, in the head's order
    statistics: Statistics | None = None
    crop_pct: float | None = None  # share of the resized short side that test images keep

    def check_statistics(self) -> None:
        """Raise ValueError for statistics that no one could read back."""
        said = self.statistics
        if isinstance(said, str) and said not in NAMED:
            raise ValueError(
                f"statistics are {said!r}: pass {' or '.join(map(repr, NAMED))}, or mean and std"
            )
        if said is not None and not isinstance(said, str):
            _mean_and_std(said, "the call")

    def metadata(self) -> dict[str, str]:
        """As a safetensors file carries it."""
        said = {
            CONFIG_KEY: self.config,
            CLASSES_KEY: self.classes,
            STATISTICS_KEY: self.statistics,
            CROP_KEY: self.crop_pct,
        }
        return {key: json.dumps(value) for key, value in said.items() if value is not None}


def description_of_metadata(metadata: Mapping[str, str] | None, where: Path) -> Description:
    """Raises ValueError that names the file where a text of ours in it cannot be read."""

    def said(key: str) -> Any:
        text = (metadata or {}).get(key)
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"{where}: its {key} cannot be read ({error}): write it anew"
            raise ValueError(problem) from error

    keys = (CONFIG_KEY, CLASSES_KEY, STATISTICS_KEY, CROP_KEY)
    return _description(*map(said, keys), where)


def description_of_settings(settings: Mapping[str, Any], where: Path) -> Description:
    """What the settings in a run's manifest say."""
    model = settings.get("model")
    said = (model if isinstance(model, Mapping) else None, settings.get("classes"))
    return _description(*said, settings.get("statistics"), settings.get("crop_pct"), where)


def description_of(path: Path) -> Description:
    """What a run's step, a file or a folder's file says, its tensors unread; of all else nothing.

    Raises ValueError for a file that is damaged.
    """
    if (step := step_of(path)) is not None:
        if not _is_ours(read_json(step / MANIFEST)):
            return Description()
        return description_of_settings(read_manifest(step)["settings"], step / MANIFEST)
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        return Description()
    refuse_other_kinds(path, "weights")
    refuse_long_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return description_of_metadata(file.metadata(), path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): copy or write it anew"
        ) from error


def step_of(path: Path) -> Path | None:
    """The step's folder that a run, a step, or a weight file in a step is read from; else None."""
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return path
        return max(path.glob("checkpoints/step_" + "[0-9]" * 8), default=None)
    if path.suffix != ".safetensors" or not (path.parent / MANIFEST).is_file():
        return None
    is_step = STEP_NAME.fullmatch(path.parent.name)
    try:
        manifest = read_manifest(path.parent) if is_step else read_json(path.parent / MANIFEST)
    except ValueError:
        return path.parent if is_step else None  # a file of that name has many makers
    return path.parent if _is_ours(manifest) and path.name in manifest["files"] else None


def _is_ours(manifest: dict[str, Any]) -> bool:
    return all(isinstance(manifest.get(name), dict) for name in ("files", "settings"))


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON. Raises ValueError that names the file."""
    refuse_other_kinds(path, "JSON")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object: copy it anew")
    return content


def _description(
    config: Any, classes: Any, statistics: Any, crop_pct: Any, where: Path
) -> Description:
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"{where}: its config is a {type(config).__name__}: write it anew")
    if not isinstance(statistics, str | None):
        statistics = _mean_and_std(statistics, where)
    if crop_pct is not None and not (isinstance(crop_pct, int | float) and 0 < crop_pct <= 1):
        raise ValueError(
            f"{where}: the crop is {crop_pct!r}, and a share above 0 and up to 1 is needed: "
            "write it anew"
        )
    return Description(
        config=None if config is None else dict(config),
        classes=tuple(map(str, classes)) if isinstance(classes, list) else None,
        statistics=statistics,
        crop_pct=crop_pct,
    )


def _mean_and_std(value: Sequence[Any], where: Path | str) -> Statistics:
    try:
        mean, std = (tuple(map(float, part)) for part in value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: the statistics are {value!r}, and mean and std are needed, a number for "
            "each channel"
        ) from error
    return mean, std
