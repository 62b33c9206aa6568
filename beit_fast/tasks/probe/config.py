"""What a probe of an encoder depends on."""

from dataclasses import dataclass
from typing import Literal

from beit_fast.checks import (
    Batch,
    Count,
    CropShare,
    FieldError,
    Filled,
    Given,
    NonNegative,
    Part,
    Positive,
    Probability,
    Seed,
    Side,
    Threads,
    check_fields,
)
from beit_fast.data.sources.limits import ReadConfig


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(ReadConfig):
    """Encoder, labelled images, and what to train on its features."""

    checkpoint: Given = ""  # of any task: run or one of its steps, file, folder, published name
    train: Given = ""  # folder with a sub-folder for each class
    test: Given = ""  # the same classes
    output: Filled  # folder of results, and of the features, which are kept
    weights: Literal["model", "ema", "random"] = "model"  # random: the same net untrained
    img_size: Side | None = None  # pixels; positions are resized to it
    num_heads: Count | None = None  # where the checkpoint does not show it
    statistics: Literal["half", "imagenet"] | None = None  # of pixels; null: the checkpoint's
    precision: Literal["fp32", "bf16"] = "bf16"  # of the encoder; features are stored in fp32
    crop_pct: CropShare | None = None  # timm's; None: 224/256 below 384 px, 1 from there on
    knn: tuple[Count, ...] = (10, 20)  # neighbours
    rates: tuple[Positive, ...] = (1e-3, 4e-3, 1.6e-2)  # learning rates, absolute
    epochs: Count = 100  # over the features
    batch_size: Count = 1024  # of the classifiers
    weight_decay: NonNegative = 1e-4
    held_out: Part = 0.1  # of the training images, to choose learning rate, block and k
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    images_at_once: Batch = 128  # through the encoder
    num_threads: Threads = 4  # decoding threads
    follow_links: bool = True  # to images and folders, wherever they lead
    max_bad_share: Probability = 0.001  # of the training images; see `Loader`. Of the test's: none

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("knn", "rates"):
            if not getattr(self, name):
                raise FieldError(name, "is empty: give at least one")
