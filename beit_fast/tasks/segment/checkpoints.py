"""Any segmenter's checkpoint as evaluation and prediction take it: weights, classes, statistics.

As for classifiers (`tasks/evaluate/checkpoints.py`) it may be a run or one of its steps, a file or
folder of unilm's or transformers' layout, or a published name.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit_fast.data.sources import ade20k
from beit_fast.data.sources.class_names import Colour
from beit_fast.data.views.statistics import STATISTICS
from beit_fast.manifest import read_manifest
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.tasks.evaluate.checkpoints import open_weights, opened_path, statistics_of
from beit_fast.tasks.segment.config_evaluation import SegmenterSourceConfig, SlideConfig
from beit_fast.tasks.segment.sliding import Statistics
from beit_fast.weights.description import step_of
from beit_fast.weights.load import load_pretrained
from beit_fast.weights.published import PUBLISHED

_IS = {
    "mim": "is a checkpoint of masked image modelling",
    "classifier": "classifies images, not pixels",
    "features": "has features and no head for pixels",
    "encoder": "is an encoder without a head",
}


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """A model in eval mode and fp32 on the CPU, and how it is run.

    classes: names in the head's order, None: not known; `path` is what was opened, of a run the
    step. The statistics are ImageNet's where nothing says otherwise, as all recipes have them.
    """

    model: BeitForSemanticSegmentation
    classes: tuple[str, ...] | None
    palette: tuple[Colour, ...] | None
    statistics: Statistics  # mean and std of RGB in 0..1
    slide: SlideConfig
    path: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes; those without have their number."""
        if self.classes is not None:
            return self.classes
        return tuple(f"class {label}" for label in range(self.model.config.num_classes))


def open_segmenter(config: SegmenterSourceConfig) -> Segmenter:
    """The segmenter of a checkpoint, its window resized to `config.img_size`.

    Raises ValueError for a checkpoint that is no segmenter, saying what to do with it, for a
    window that cannot be slid so, and as `open_weights` does.
    """
    source = config.checkpoint
    weights = open_weights(
        source, config.weights, img_size=config.img_size, num_heads=config.num_heads
    )
    if weights.task != "segmentation":
        raise ValueError(
            f"{source} {_IS[weights.task]}: train a segmenter from it, `beit-fast segment RECIPE "
            f"--init {source}`"
        )
    shape = weights.config
    if shape.in_chans != 3:
        raise ValueError(f"{source} takes {shape.in_chans} channels: images here have 3")
    if config.img_size is not None:
        shape = dataclasses.replace(shape, img_size=config.img_size)
    settings = _settings(source)
    # Where the window is another one, what was said of the old one does not hold.
    stated = SlideConfig() if config.img_size is not None else _stated_slide(settings, source)
    slide = config.slide(stated)
    slide.strides(shape.image_pixels)
    model = BeitForSemanticSegmentation(shape).eval()
    load_pretrained(model, weights)
    classes, palette = weights.labels, _stated_palette(settings, shape.num_classes)
    if classes is None and _is_of_ade20k(source, shape.num_classes):
        classes, palette = ade20k.CLASSES, ade20k.PALETTE
    stated_units = statistics_of(source) or weights.statistics
    statistics = config.statistics or stated_units or "imagenet"
    return Segmenter(
        model=model,
        classes=classes,
        palette=palette,
        statistics=STATISTICS[statistics] if isinstance(statistics, str) else statistics,
        slide=slide,
        path=opened_path(source),
    )


def _settings(source: str) -> dict[str, Any]:
    """Of the run that a checkpoint is of; of all else nothing."""
    step = step_of(Path(source))
    return {} if step is None else read_manifest(step)["settings"]


def _stated_slide(settings: dict[str, Any], source: str) -> SlideConfig:
    said = settings.get("evaluation")
    said = said if isinstance(said, dict) else {}
    fields = {name: said.get(name) for name in ("stride", "scale")}
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    try:
        return SlideConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: its evaluation.{error}: copy it anew") from error


def _stated_palette(settings: dict[str, Any], num_classes: int) -> tuple[Colour, ...] | None:
    said = settings.get("palette")
    if not isinstance(said, list) or len(said) != num_classes:
        return None
    return tuple(tuple(colour) for colour in said)


def _is_of_ade20k(source: str, num_classes: int) -> bool:
    """Whether it is a published one, by name or by that of its file."""
    ids = {entry.hf_id: name for name, entry in PUBLISHED.items()}
    name = ids.get(source, Path(source).stem)
    is_segmenter = name in PUBLISHED and PUBLISHED[name].task == "segmentation"
    return is_segmenter and num_classes == len(ade20k.CLASSES)
