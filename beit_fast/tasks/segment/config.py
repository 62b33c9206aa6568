"""What training a segmenter depends on."""

from dataclasses import dataclass, field
from typing import Literal

from beit_fast.checks import (
    Batch,
    Count,
    Filled,
    Given,
    Natural,
    Part,
    Positive,
    Probability,
    Share,
    Threads,
    check_fields,
)
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.views.config import SegmentationViewConfig
from beit_fast.flags import flag
from beit_fast.model.config import SegmenterConfig
from beit_fast.tasks.read_limits import within
from beit_fast.tasks.segment.config_evaluation import SlideConfig
from beit_fast.train.config import OptimConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class SegmentationDataConfig(ReadConfig):
    """Images with masks, and the batches made of them.

    In ADE20K's layout `path` is its root, and its validation part is what is evaluated on; in the
    plain one `path` and `masks` are two folders with the same names in them.
    """

    path: Given = ""  # ADE20K's root, or folder of images
    masks: Given = ""  # folder of the images' masks, PNG files of class ids; "": ADE20K's layout
    test: Given = ""  # as path, to evaluate on; "": ADE20K's validation part, if it is there
    test_masks: Given = ""  # as masks, of test
    held_out: Part | None = None  # this share of the images is evaluated on, and never trained on
    classes_file: Given = ""  # names, and if it says them ids and colours: JSON, or a name a line
    num_classes: Count | None = None  # without names; null: as many as the masks have
    ignore: Natural | None = None  # id of what does not count; null: none, in ADE20K's layout 0
    batch_size: Batch = 2  # images per micro-batch on each rank
    num_threads: Threads = 4  # decoding threads; batches do not depend on it
    follow_links: bool = True  # to images and folders, wherever they lead
    max_bad_share: Probability = 0.001  # of the training images; see `Loader`. Of the test's: none

    def __post_init__(self) -> None:
        check_fields(self)
        if self.held_out is not None and self.test:
            raise ValueError(
                f"{flag('data.held_out')} is {self.held_out} and {flag('data.test')} {self.test}: "
                "give a share of the training images to evaluate on, and then no data.test, or "
                "null and the images"
            )
        if self.test_masks and not self.test:
            raise ValueError(
                f"{flag('data.test_masks')} is {self.test_masks} and there are no images to them: "
                f"pass {flag('data.test')}"
            )
        if self.test and self.masks and not self.test_masks:
            raise ValueError(
                f"{flag('data.test')} is {self.test}, and there are no masks to it: pass "
                f"{flag('data.test_masks')}"
            )


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Everything that training a segmenter depends on."""

    # With `init` the encoder is the checkpoint's (init.py). num_classes 0: as many as the data
    # has; any other number must be theirs.
    model: SegmenterConfig
    data: SegmentationDataConfig
    optim: OptimConfig
    run: RunConfig
    augment: SegmentationViewConfig = field(default_factory=SegmentationViewConfig)
    evaluation: SlideConfig = field(default_factory=SlideConfig)
    init: Filled | None = None  # file, folder, run or published name; null: from scratch
    init_key: Filled | None = None  # which of several weights: ema of a run, model_ema of unilm's
    layer_decay: Share = 0.9  # of the learning rate, from a layer to the one before; 1: none
    # Mean and std of pixels: the original's here, though its encoders were pre-trained with half.
    statistics: Literal["half", "imagenet"] = "imagenet"
    auxiliary_weight: Positive = 0.4  # of the second head's loss; model.auxiliary_channels 0: none
    freeze_encoder: bool = False  # pyramid and head alone are trained
    # Less memory, as in pre-training.
    grad_checkpointing: bool | Literal["selective"] = False

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "data", within(self.run, self.data))
