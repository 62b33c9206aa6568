"""A checkpoint of one layout into a file or folder of another.

report = convert("runs/small", "small.pth", to="unilm")
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from beit_fast.manifest import read_manifest
from beit_fast.model.config import BeitConfig
from beit_fast.weights.description import Statistics, step_of
from beit_fast.weights.hf_config import transformers_differs
from beit_fast.weights.layouts import SEGMENTATION, by_part
from beit_fast.weights.read import Source, Task, read_checkpoint
from beit_fast.weights.save import HF_FILES, write_hf, write_house


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What `convert` read and wrote."""

    source: str
    target: str
    task: Task
    layout: str
    config: BeitConfig
    read: int  # tensors
    written: int
    dropped: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())  # what was taken by custom, and what is lost

    def __str__(self) -> str:
        c, (height, width) = self.config, self.config.image_pixels
        lines = [
            f"{self.source}: {self.layout} names, {self.task}, {c.depth} blocks of {c.embed_dim}, "
            f"{height}x{width} px",
            f"{self.target}: {self.read} tensors became {self.written}",
        ]
        if self.dropped:
            lines.append(f"dropped: {len(self.dropped)} relative_position_index")
        if self.left_out:
            lines.append(f"left out: {by_part(self.left_out)}")
        return "\n".join([*lines, *self.notes])


def convert(
    source: Source,
    target: str | Path,
    *,
    to: Literal["unilm", "timm", "hf"],
    key: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    statistics: Statistics | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write a checkpoint in another layout; dtypes stay, and so does every value.

    "unilm" and "timm" write one file, .safetensors or anything else by `torch.save`, unilm's under
    its root key; "hf" writes a folder. Folders are made as needed. timm has no masked image
    modelling and no segmentation: those parts are left out, and named in the report. Config, names
    of classes and statistics go along, but in timm's layout by `torch.save`, which has no place for
    them. `img_size` and `num_heads` are those of the source, where it does not say them;
    `statistics` ("half", "imagenet", or mean and std of pixels) are else the source's.
    Raises ValueError for a target that exists unless `overwrite`, and as `read_checkpoint` does.
    """
    target = Path(target)
    _check_target(target, to, overwrite)
    given = {"img_size": img_size, "num_heads": num_heads}
    given = {name: value for name, value in given.items() if value is not None}
    weights = read_checkpoint(source, key=key, unless_stated=given)
    for name, value in given.items():
        _check_given(name, value, weights.config)
    if statistics is not None:
        weights = dataclasses.replace(weights, statistics=statistics)
    state, left_out, notes = weights.state, (), weights.guesses + _stays(source)
    if to == "hf":
        left_out = tuple(sorted(name for name in state if name.startswith("cls_pt_layers.")))
        kept = {name: tensor for name, tensor in state.items() if name not in left_out}
        weights = dataclasses.replace(weights, state=kept)
        written = write_hf(weights, target, weights.labels)
        notes += tuple(note for note in transformers_differs(weights.config) if note not in notes)
    else:
        if to == "timm":
            left_out = tuple(sorted(name for name in state if _timm_lacks(name)))
            state = {name: tensor for name, tensor in state.items() if name not in left_out}
        if to == "timm" and target.suffix != ".safetensors":
            notes += (
                f"{target.name} has no place for config, classes and statistics: read it with "
                "img_size and num_heads where its shapes do not show them, or write .safetensors",
            )
        write_house(weights, state, target, to)
        written = len(state)
    return ConvertReport(
        source="the state dict" if isinstance(source, Mapping) else str(source),
        target=str(target),
        task=weights.task,
        layout=weights.layout,
        config=weights.config,
        read=len(weights.state) + len(left_out) * (to == "hf"),
        written=written,
        dropped=weights.dropped,
        left_out=left_out,
        notes=notes,
    )


def _stays(source: Source) -> tuple[str, ...]:
    """What a run says of how its segmenter is run, for which no layout has a place."""
    step = None if isinstance(source, Mapping) else step_of(Path(source))
    said = None if step is None else read_manifest(step)["settings"].get("evaluation")
    said = said if isinstance(said, dict) else {}
    flags = [
        f"--{name} {json.dumps(said[name], separators=(',', ':'))}"
        for name in ("stride", "scale")
        if said.get(name) is not None
    ]
    if not flags:
        return ()
    return (f"how windows slide stays with the run: evaluate and predict with {' '.join(flags)}",)


def _check_target(target: Path, to: str, overwrite: bool) -> None:
    """Raise ValueError where `convert` cannot write, or should not."""
    if to not in ("unilm", "timm", "hf"):
        raise ValueError(f"there is no layout {to!r}: pass 'unilm', 'timm' or 'hf'")
    if to == "hf" and target.is_file():
        raise ValueError(f"{target} is a file: --to hf writes a folder, pass its path")
    if to != "hf" and target.is_dir():
        raise ValueError(f"{target} is a folder: --to {to} writes a file, pass its path")
    files = [target / name for name in HF_FILES] if to == "hf" else [target]
    existing = [str(file) for file in files if os.path.lexists(file)]
    if special := [name for name in existing if os.path.exists(name) and not os.path.isfile(name)]:
        raise ValueError(
            f"{' and '.join(special)} is no file, and nothing takes its place: pass another path"
        )
    weights = target / "model.safetensors" if to == "hf" else target
    if step_of(weights) is not None or any(target.glob("checkpoints/step_*")):
        raise ValueError(
            f"{target} is of a run, whose checkpoints stay as they were written: pass another path"
        )
    if existing and not overwrite:
        raise ValueError(
            f"{' and '.join(existing)} would be overwritten: pass another path, or --overwrite "
            "(overwrite=True) to replace what is there"
        )


def _check_given(name: str, value: Any, config: BeitConfig) -> None:
    is_size = name == "img_size"
    theirs = config.image_pixels if is_size else config.num_heads
    ours = dataclasses.replace(config, img_size=value).image_pixels if is_size else value
    if ours != theirs:
        raise ValueError(
            f"{name} {value} was given, the source has {theirs}: a conversion changes no model, "
            f"leave {name} out (from_pretrained resizes positions)"
        )


def _timm_lacks(name: str) -> bool:
    part = name.split(".")[0]
    return part in ("mask_token", "lm_head", "cls_pt_layers") or bool(SEGMENTATION.match(name))
