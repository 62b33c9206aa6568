"""A classifier's checkpoint, and what it is run on: labelled images, or single ones."""

from dataclasses import dataclass
from typing import Literal

from beit_fast.checks import Batch, Count, CropShare, Filled, Side, Threads, check_fields
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.views.config import CropMode, Interpolation

Which = Literal["model", "ema"]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ReadConfig):
    """A classifier's checkpoint and how it is run; null: as the checkpoint says."""

    checkpoint: Filled  # run or one of its steps, file, folder, published name
    weights: Which = "model"  # ema: the average that a run or a .pth file keeps beside them
    img_size: Side | None = None  # pixels; positions are resized to it
    num_heads: Count | None = None  # where the checkpoint does not show it
    statistics: Literal["half", "imagenet"] | None = None  # mean and std of pixels
    crop_pct: CropShare | None = None  # kept share of the resized short side
    interpolation: Interpolation | None = None
    crop_mode: CropMode | None = None  # squash: to the size whatever the proportions
    precision: Literal["fp32", "bf16"] = "bf16"
    batch_size: Batch = 64  # on each rank
    num_threads: Threads = 4  # decoding threads
    follow_links: bool = True  # to images and folders, wherever they lead
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ClassifierConfig):
    """A classifier's checkpoint, labelled images, and how the one meets the other."""

    folder: Filled  # with a sub-folder of images for each class
    output: Filled = "evaluation.json"  # file to write
    # order: the folders, sorted, are the checkpoint's classes, whatever they are called.
    match: Literal["names", "order"] = "names"


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ClassifierConfig):
    """A classifier's checkpoint, images, and how many classes of each to say."""

    images: tuple[Filled, ...]  # files, folders, patterns
    top: Count = 5
    # One JSON array on stdout, and nothing else. A byte of a name that is no UTF-8 is \udc80 to
    # \udcff there, as `os.fsencode` takes it.
    json: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
