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
from typing import Any, get_args

import torch
from torch import Tensor

from beit_fast.checks import (
    CropShare,
    FieldError,
    Positive,
    Probability,
    check_fields,
)
from beit_fast.data.views.config import CropMode, Interpolation
from beit_fast.data.views.statistics import HALF_MEAN, HALF_STD, STATISTICS
from beit_fast.files import replace_file
from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.tasks.evaluate.classes import wordnet_ids
from beit_fast.tasks.evaluate.config import ClassifierConfig, Which
from beit_fast.tasks.evaluate.evaluation import default_crop_pct
from beit_fast.weights.description import Statistics, description_of, read_json, step_of
from beit_fast.weights.load import load_pretrained
from beit_fast.weights.published import PUBLISHED, Published, published
from beit_fast.weights.read import Weights, read_checkpoint

UNSTATED = "nothing says otherwise"
PREPROCESSOR = "preprocessor_config.json"
logger = logging.getLogger("beit_fast.tasks")
_PILLOW = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as transformers writes them
_SHIPPED = ("model", "pytorch_model")  # how weights are called that a configuration lies beside


@dataclass(frozen=True, kw_only=True)
class View:
    """How images become what a checkpoint was trained on; `origin` says who says so."""

    mean: tuple[Probability, Probability, Probability] = HALF_MEAN
    std: tuple[Positive, Positive, Positive] = HALF_STD
    crop_pct: CropShare
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
class Classifier:
    """A model in eval mode and fp32, its classes in the head's order (None: not known), its view.

    `path` is what was opened: of a run the step.
    """

    model: BeitForImageClassification
    classes: tuple[str, ...] | None
    view: View
    path: str


def open_weights(
    source: str | Path,
    which: Which = "model",
    *,
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Weights:
    """Read a checkpoint: its weights, or with "ema" their average.

    `img_size` and `num_heads` count where the checkpoint leaves them open; what it leaves open all
    the same is logged. Raises ValueError where there is no average, and where the checkpoint has
    another number of heads, and as `read_checkpoint` does.
    """
    weights = _read(source, which, {"img_size": img_size, "num_heads": num_heads})
    if num_heads not in (None, weights.config.num_heads):
        raise ValueError(
            f"{source} has {weights.config.num_heads} heads, --num_heads is {num_heads}: leave it "
            "out"
        )
    for guess in weights.guesses:
        logger.warning("%s: %s", source, guess)
    return weights


def _read(source: str | Path, which: Which, unless_stated: Mapping[str, Any]) -> Weights:
    if which == "model":
        return read_checkpoint(source, unless_stated=unless_stated)
    path = Path(source)
    if step := step_of(path):
        if not (step / "ema.safetensors").is_file():
            raise ValueError(f"{step} has no average of the weights: pass --weights model")
        return read_checkpoint(step, key="ema")
    if path.is_dir() or path.suffix == ".safetensors" or _published_entry(source) is not None:
        raise ValueError(
            f"{source} has no average beside its weights: pass --weights model, or a run or a .pth "
            "file with model_ema"
        )
    return read_checkpoint(path, key="model_ema", unless_stated=unless_stated)


def open_classifier(config: ClassifierConfig) -> Classifier:
    """The classifier of a checkpoint on the CPU, positions resized to `config.img_size`.

    Raises ValueError for a checkpoint that has no classifier, saying what to do with it, and as
    `open_weights` does.
    """
    source = config.checkpoint
    given = {"img_size": config.img_size, "num_heads": config.num_heads}
    weights = open_weights(source, config.weights, **given)
    if weights.task != "classifier":
        raise ValueError(f"{source} {_NO_CLASSES[weights.task].format(source=source)}")
    shape = weights.config
    if shape.in_chans != 3:
        raise ValueError(f"{source} takes {shape.in_chans} channels: images here have 3")
    said = {"said": weights.statistics, "crop": weights.crop_pct}
    view = view_of(source, shape, config.img_size, **said, **_chosen(config))
    if config.img_size is not None:
        shape = dataclasses.replace(shape, img_size=config.img_size)
    model = BeitForImageClassification(shape).eval()
    load_pretrained(model, weights)
    by_number = _published_entry(source) is not None  # the hub's names of classes are prose
    return Classifier(
        model=model,
        classes=wordnet_ids(shape.num_classes) if by_number else weights.labels,
        view=view,
        path=opened_path(source),
    )


def view_of(
    source: str | Path,
    config: BeitConfig,
    img_size: int | tuple[int, int] | None = None,
    *,
    said: Statistics | None = None,
    crop: float | None = None,
    **chosen: Any,
) -> View:
    """What the checkpoint, or the folder it lies in, says of its images; else the original's.

    `img_size` is another size than the checkpoint's: its crop is then the original's. `said` are
    the statistics that came with the weights, `crop` the share of their test images, if they did.
    `chosen` are fields of `View` that are wanted otherwise. Raises ValueError for what no view here
    can be.
    """
    usual = default_crop_pct(config.image_pixels if img_size is None else img_size)
    fields = _stated(source, said, crop) or {"origin": UNSTATED}
    if img_size is not None and fields.get("crop_mode") != "squash":
        fields["crop_pct"] = usual
    if chosen:
        fields["origin"] += ", changed by flags"
    return View(**{"crop_pct": usual} | fields | chosen)


def write_image_processor(source: str | Path, folder: str | Path) -> Path | None:
    """Beside a checkpoint of `source` that `folder` holds for transformers, how images are made.

    Returns preprocessor_config.json, or None with a warning where transformers has no such
    transform: a centre that is not square.
    """
    written = read_checkpoint(folder)
    view = view_of(source, written.config, said=written.statistics, crop=written.crop_pct)
    if written.task == "segmentation":
        view = _of_segmenter(view)
    height, width = written.config.image_pixels
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
    text = json.dumps(content, indent=2) + "\n"
    replace_file(file, lambda file: file.write(text.encode()))
    return file


def opened_path(source: str | Path) -> str:
    """What is read of a source: of a run's folder the newest step, else the source."""
    path = Path(source)
    return str(step_of(path) or source) if path.is_dir() else str(source)


def statistics_of(source: str | Path) -> Statistics | None:
    """Mean and std of pixels in 0..1, or a name of them, that a checkpoint says; None: it does not.

    Known of runs and safetensors files of ours, of published names, and of folders of
    transformers' and timm's.
    """
    said = description_of(Path(source)).statistics
    fields = _stated(source, said)
    if fields is None or not {"mean", "std"} <= fields.keys():
        return None
    pair = fields["mean"], fields["std"]
    return said if isinstance(said, str) and STATISTICS.get(said) == pair else pair


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
    "segmentation": "classifies pixels, not images: pass it to `beit-fast evaluate-segmentation` "
    "or `predict-segmentation`, or fine-tune it, `beit-fast finetune RECIPE --init {source}`",
}


def _of_segmenter(view: View) -> View:
    """As transformers' ADE20K checkpoints have it: it slides no window, but squashes images to it.
    Pixels are in ImageNet's units where nothing says otherwise, as all recipes have them."""
    whole = {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash"}
    if view.origin == UNSTATED:
        whole["mean"], whole["std"] = STATISTICS["imagenet"]
    return dataclasses.replace(view, **whole)


def _chosen(config: ClassifierConfig) -> dict[str, Any]:
    """The fields of `View` that flags choose."""
    names = ("crop_pct", "interpolation", "crop_mode")
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.statistics is not None:
        chosen["mean"], chosen["std"] = STATISTICS[config.statistics]
    return chosen


def _stated(
    source: str | Path, said: Statistics | None, crop: float | None = None
) -> dict[str, Any] | None:
    """Fields of the checkpoint's view, from the first of those who know of it."""
    is_run = step_of(Path(source)) is not None
    ours = _of_ours(said, crop, "of the run" if is_run else f"of {Path(source).name}")
    if is_run:
        return ours
    return _of_published(source) or _of_folder(source) or ours


def _of_ours(said: Statistics | None, crop: float | None, origin: str) -> dict[str, Any] | None:
    pair = STATISTICS.get(said) if isinstance(said, str) else said
    fields = {} if pair is None else {"mean": pair[0], "std": pair[1]}
    if crop is not None:
        fields["crop_pct"] = crop
    return fields | {"origin": origin} if fields else None


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
