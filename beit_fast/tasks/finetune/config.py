"""What fine-tuning depends on."""

from dataclasses import dataclass, field
from typing import Literal

from beit_fast.checks import (
    Batch,
    CropShare,
    Filled,
    Given,
    Part,
    Probability,
    Share,
    Threads,
    check_fields,
)
from beit_fast.data.config import OrderConfig
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.views.config import AugmentConfig
from beit_fast.flags import flag
from beit_fast.model.config import BeitConfig
from beit_fast.tasks.read_limits import within
from beit_fast.train.config import OptimConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(OrderConfig, ReadConfig):
    """Labelled images and the batches made of them."""

    path: Given = ""  # folder with a sub-folder of images for each class
    test: Given = ""  # the same classes, to evaluate on
    held_out: Part | None = None  # without `test`: this share of each class, never trained on
    batch_size: Batch = 128  # images per micro-batch on each rank
    num_threads: Threads = 4  # decoding threads; batches do not depend on it
    follow_links: bool = True  # to images and folders, wherever they lead
    max_bad_share: Probability = 0.001  # of the training images; see `Loader`. Of the test's: none

    def __post_init__(self) -> None:
        check_fields(self)
        if self.held_out is not None and self.test:
            raise ValueError(
                f"{flag('data.held_out')} is {self.held_out} and {flag('data.test')} {self.test}: "
                "give a share of the training images to evaluate on, and then no data.test, or "
                "null and the folder"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything a fine-tuning run depends on."""

    # With `init` the architecture is the checkpoint's (init.py). num_classes 0: as many as
    # there are class folders; any other number must be theirs.
    model: BeitConfig
    data: LabelledDataConfig
    optim: OptimConfig
    run: RunConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    init: Filled | None = None  # file, folder, run or published name; null: from scratch
    init_key: Filled | None = None  # which of several weights: ema of a run, model_ema of unilm's
    layer_decay: Share = 0.65  # of the learning rate, from a layer to the one before; 1: none
    statistics: Literal["half", "imagenet"] = "half"  # mean and std of pixels
    crop_pct: CropShare | None = None  # of test images; None: timm's for their size
    # Less memory, as in pre-training.
    grad_checkpointing: bool | Literal["selective"] = False
    weight_decay_on_rel_pos_bias: bool = True  # as in pre-training

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "data", within(self.run, self.data))
