"""Any BEiT checkpoint as evaluation takes it: weights, names of its classes, the images it wants.

It may be a run of ours or one of its steps, a file or folder of unilm's, timm's or transformers'
layout, or a published name. Of those only runs name their classes and statistics in all cases;
where nothing does, the original's are taken, and what was taken is said.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from beit_fast.checks import (
    Count,
    FieldError,
    Filled,
    Positive,
    Probability,
    Share,
    Side,
    Threads,
    check_fields,
)
from beit_fast.data.centre_view import CropMode, Interpolation
from beit_fast.data.views import HALF_MEAN, HALF_STD
from beit_fast.model.checkpoint import load_pretrained
from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.model.published import PUBLISHED, Published, published
from beit_fast.model.read_checkpoint import Weights, read_checkpoint
from beit_fast.model.weight_files import read_json
from beit_fast.tasks.classes import wordnet_ids
from beit_fast.tasks.evaluation import default_crop_pct
from beit_fast.tasks.pretrain import STATISTICS
from beit_fast.train.state import MANIFEST, checkpoint_paths

UNSTATED = "nothing says otherwise"
PREPROCESSOR = "preprocessor_config.json"
Which = Literal["model", "ema"]
logger = logging.getLogger("beit_fast.tasks")
_PILLOW = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as transformers writes them
_SHIPPED = ("model", "pytorch_model")  # how weights are called that a configuration lies beside


@dataclass(frozen=True, kw_only=True)
class View:
    """How images become what a checkpoint was trained on; `origin` says who says so."""

    mean: tuple[Probability, Probability, Probability] = HALF_MEAN
    std: tuple[Positive, Positive, Positive] = HALF_STD
    crop_pct: Share
    interpolation: Interpolation = "bicubic"
    crop_mode: CropMode = "center"
    origin: str

    def __post_init__(self) -> None:
        for name, kind in (("interpolation", Interpolation), ("crop_mode", CropMode)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} {self.origin} is {getattr(self, name)!r}: images here are made by "
                    f"{' or '.join(get_args(kind))}, pass --{name}"
                )
        try:
            check_fields(self)
        except FieldError as error:
            raise ValueError(f"{error.field} {self.origin} {error.problem}") from error

    def __str__(self) -> str:
        share = "squashed to size" if self.crop_mode == "squash" else f"crop {self.crop_pct:.4g}"
        by_name = next((n for n, s in STATISTICS.items() if s == (self.mean, self.std)), None)
        units = f"{by_name} statistics" if by_name else f"mean {self.mean}, std {self.std}"
        return f"{share}, {self.interpolation}, {units} ({self.origin})"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A classifier's checkpoint and how it is run; null: as the checkpoint says."""

    checkpoint: Filled  # run or one of its steps, file, folder, published name
    weights: Which = "model"  # ema: the average that a run or a .pth file keeps beside them
    img_size: Side | None = None  # pixels; positions are resized to it
    statistics: Literal["half", "imagenet"] | None = None  # mean and std of pixels
    crop_pct: Share | None = None  # kept share of the resized short side
    interpolation: Interpolation | None = None
    crop_mode: CropMode | None = None  # squash: to the size whatever the proportions
    precision: Literal["fp32", "bf16"] = "bf16"
    batch_size: Count = 64  # on each rank
    num_threads: Threads = 4  # decoding threads
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A model in eval mode and fp32, its classes in the head's order (None: not known), its view.

    `path` is what was opened: of a run the step.
    """

    model: BeitForImageClassification
    classes: tuple[str, ...] | None
    view: View
    path: str


def open_weights(source: str | Path, which: Which = "model") -> Weights:
    """Read a checkpoint: its weights, or with "ema" their average.

    Raises ValueError where there is no average, and as `read_checkpoint` does.
    """
    if which == "model":
        return read_checkpoint(source)
    path = Path(source)
    if step := run_step(path):
        if not (step / "ema.safetensors").is_file():
            raise ValueError(f"{step} has no average of the weights: pass --weights model")
        return read_checkpoint(step, key="ema")
    if path.is_dir() or path.suffix == ".safetensors" or _published_entry(source) is not None:
        raise ValueError(
            f"{source} has no average beside its weights: pass --weights model, or a run or a .pth "
            "file with model_ema"
        )
    return read_checkpoint(path, key="model_ema")


def open_classifier(config: ClassifierConfig) -> Classifier:
    """The classifier of a checkpoint on the CPU, positions resized to `config.img_size`.

    Raises ValueError for a checkpoint that has no classifier, saying what to do with it, and as
    `open_weights` does.
    """
    source = config.checkpoint
    weights = open_weights(source, config.weights)
    if weights.task != "classifier":
        raise ValueError(f"{source} {_NO_CLASSES[weights.task].format(source=source)}")
    shape = weights.config
    if shape.in_chans != 3:
        raise ValueError(f"{source} takes {shape.in_chans} channels: images here have 3")
    view = view_of(source, shape, config.img_size, **_chosen(config))
    if config.img_size is not None:
        shape = dataclasses.replace(shape, img_size=config.img_size)
    model = BeitForImageClassification(shape).eval()
    load_pretrained(model, weights)
    by_number = _published_entry(source) is not None  # the hub's names of classes are prose
    return Classifier(
        model=model,
        classes=wordnet_ids(shape.num_classes) if by_number else weights.labels,
        view=view,
        path=str(run_step(Path(source)) or source),
    )


def view_of(
    source: str | Path,
    config: BeitConfig,
    img_size: int | tuple[int, int] | None = None,
    **chosen: Any,
) -> View:
    """What the checkpoint, or the folder it lies in, says of its images; else the original's.

    `img_size` is another size than the checkpoint's: its crop is then the original's. `chosen` are
    fields of `View` that are wanted otherwise. Raises ValueError for what no view here can be.
    """
    usual = default_crop_pct(config.image_pixels if img_size is None else img_size)
    views = (stated(source) for stated in (_of_run, _of_published, _of_folder))
    fields = next(filter(None, views), {"origin": UNSTATED})
    if img_size is not None and fields.get("crop_mode") != "squash":
        fields["crop_pct"] = usual
    if chosen:
        fields["origin"] += ", changed by flags"
    return View(**{"crop_pct": usual} | fields | chosen)


def write_image_processor(source: str | Path, folder: str | Path) -> Path | None:
    """Beside a checkpoint written for transformers, what it needs to make images as here.

    Returns preprocessor_config.json, or None with a warning where transformers has no such
    transform: a centre that is not square.
    """
    config = read_checkpoint(source).config
    view, (height, width) = view_of(source, config), config.image_pixels
    if height != width and view.crop_mode == "center":
        logger.warning(
            "transformers resizes no image to cover %dx%d: no preprocessor_config.json was written",
            height,
            width,
        )
        return None
    squashes = view.crop_mode == "squash"
    resized = [math.floor(side / view.crop_pct + 1e-6) for side in (height, width)]
    content = {
        "image_processor_type": "BitImageProcessor",  # resizes to the shortest edge, and crops
        "do_convert_rgb": True,
        "do_resize": True,
        "size": dict(zip(("height", "width"), resized, strict=True))
        if squashes
        else {"shortest_edge": resized[0]},
        "resample": next(n for n, name in _PILLOW.items() if name == view.interpolation),
        "do_center_crop": view.crop_pct < 1 or not squashes,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }
    file = Path(folder) / PREPROCESSOR
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return file


def run_step(path: Path) -> Path | None:
    """The step's folder that a run or a step of ours is read from; None: it is none of ours."""
    if (path / MANIFEST).is_file():
        return path
    return next(reversed(checkpoint_paths(path)), None)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


_NO_CLASSES = {
    "mim": "is a checkpoint of masked image modelling and has no classifier: fine-tune it, `beit-"
    "fast finetune RECIPE --init {source}`, or see what it knows, `beit-fast probe`",
    "features": "has features and no classifier (head.weight is missing): fine-tune it, "
    "`beit-fast finetune RECIPE --init {source}`",
    "encoder": "is an encoder without a classifier (head.weight is missing): fine-tune it, "
    "`beit-fast finetune RECIPE --init {source}`",
    "segmentation": "classifies pixels, not images: fine-tune it, "
    "`beit-fast finetune RECIPE --init {source}`",
}


def _chosen(config: ClassifierConfig) -> dict[str, Any]:
    """The fields of `View` that flags choose."""
    names = ("crop_pct", "interpolation", "crop_mode")
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.statistics is not None:
        chosen["mean"], chosen["std"] = STATISTICS[config.statistics]
    return chosen


def _of_run(source: str | Path) -> dict[str, Any] | None:
    step = run_step(Path(source))
    if step is None:
        return None
    name = read_json(step / MANIFEST)["settings"].get("statistics")
    if name not in STATISTICS:
        return None
    mean, std = STATISTICS[name]
    return {"mean": mean, "std": std, "origin": "of the run"}


def _of_published(source: str | Path) -> dict[str, Any] | None:
    """timm's view for unilm's names; by the hub's names, transformers' view."""
    entry = _published_entry(source)
    if entry is None:
        return None
    fields = {"mean": entry.mean, "std": entry.std, "origin": f"of {source}"}
    if str(source) == entry.hf_id and entry.task == "classifier":
        return fields | {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash"}
    return fields | {"crop_pct": entry.crop_pct or 1.0, "interpolation": entry.interpolation}


def _of_folder(source: str | Path) -> dict[str, Any] | None:
    """transformers' preprocessor_config.json, or what timm keeps in config.json."""
    path = Path(source)
    if path.is_file() and not path.name.startswith(_SHIPPED):
        return None
    folder = path if path.is_dir() else path.parent
    if (file := folder / PREPROCESSOR).is_file():
        stated = read_json(file)
        try:
            return _of_image_processor(stated) | {"origin": f"of {file.name}"}
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{file} describes no images ({error}): copy it anew") from error
    if (file := folder / "config.json").is_file():
        stated = read_json(file).get("pretrained_cfg")
        if isinstance(stated, dict):
            names = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
            fields = {n: stated[n] for n in names if stated.get(n) is not None}
            fields = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
            return fields | {"origin": f"of {file.name}"}
    return None


def _of_image_processor(stated: Mapping[str, Any]) -> dict[str, Any]:
    """transformers squashes to `size`, unless that is of the shortest edge; then it may crop."""
    size, crop = stated.get("size"), stated.get("crop_size")
    fields: dict[str, Any] = {
        "mean": tuple(stated.get("image_mean", HALF_MEAN)),
        "std": tuple(stated.get("image_std", HALF_STD)),
        "interpolation": _PILLOW.get(stated.get("resample", 3)),
        "crop_pct": 1.0,
    }
    if not (isinstance(size, dict) and "shortest_edge" in size):
        fields["crop_mode"] = "squash"
    if stated.get("do_center_crop", False) and size and crop:
        sides = [max(v.values()) if isinstance(v, dict) else v for v in (crop, size)]
        fields["crop_pct"] = sides[0] / sides[1]
    return fields


def _published_entry(source: str | Path) -> Published | None:
    name = str(source)
    known = name in PUBLISHED or any(name == entry.hf_id for entry in PUBLISHED.values())
    return published(name) if known and not Path(source).exists() else None
