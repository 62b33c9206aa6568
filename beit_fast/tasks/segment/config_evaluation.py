"""How a segmenter is run on images of any size, and what the verbs that do so are told."""

from dataclasses import dataclass, field
from typing import Literal

from beit_fast.checks import (
    Batch,
    Count,
    FieldError,
    Filled,
    Given,
    Natural,
    Positive,
    Side,
    Threads,
    check_fields,
)
from beit_fast.data.sources.limits import ReadConfig


@dataclass(frozen=True, kw_only=True)
class SlideConfig:
    """The model's window slid over an image; the defaults are those of ADE20K's recipes.

    One ratio, 1: images are resized to the largest size within `scale` (mmcv's rule). Others: the
    short side becomes `scale`'s times each ratio, and never less than the window's.
    """

    stride: Side | None = None  # pixels between windows; null: two thirds of the window
    scale: tuple[Count, Count] | None = None  # (long, short) side; null: 4 and 1 times the window's
    multi_scale: tuple[Positive, ...] = (1.0,)  # the paper's: 0.5, 0.75, 1, 1.25, 1.5, 1.75
    flip: bool = False  # every scale mirrored too; probabilities are averaged
    windows_at_once: Batch = 8

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.multi_scale:
            raise FieldError("multi_scale", "is empty: give one ratio, 1, or more")
        if self.scale is not None and self.scale[0] < self.scale[1]:
            raise FieldError("scale", f"is {self.scale}: give the long side first")

    def strides(self, window: tuple[int, int]) -> tuple[int, int]:
        """(down, across) for a window of (height, width) pixels.

        Raises FieldError for strides that leave pixels out.
        """
        if self.stride is None:
            down, across = (max(1, side * 2 // 3) for side in window)
            return down, across
        down, across = (self.stride,) * 2 if isinstance(self.stride, int) else self.stride
        if down > window[0] or across > window[1]:
            raise FieldError(
                "stride",
                f"is {self.stride} and the window {window[0]}x{window[1]}: between the windows "
                "pixels would be left out, give no more than the window's sides",
            )
        return down, across

    def sides(self, window: tuple[int, int]) -> tuple[int, int]:
        """(long, short) that images are resized to, for a window of (height, width) pixels."""
        return (4 * min(window), min(window)) if self.scale is None else tuple(self.scale)


@dataclass(frozen=True, kw_only=True)
class SegmenterSourceConfig(ReadConfig):
    """A segmenter's checkpoint and how it is run; null: as the checkpoint says."""

    checkpoint: Filled  # run or one of its steps, file, folder, published name
    weights: Literal["model", "ema"] = "model"  # ema: the average kept beside them
    img_size: Side | None = None  # pixels of the window; positions are resized to it
    num_heads: Count | None = None  # where the checkpoint does not show it
    statistics: Literal["half", "imagenet"] | None = None  # mean and std of pixels
    # pixels between windows; null: as the checkpoint says, else two thirds of the window
    stride: Side | None = None
    # (long, short) that images are resized to; null: as the checkpoint says, else (4 w, w) of the
    # window's short side w
    scale: tuple[Count, Count] | None = None
    # ratios of the scale; the paper's are [0.5, 0.75, 1, 1.25, 1.5, 1.75]
    multi_scale: tuple[Positive, ...] = (1.0,)
    flip: bool = False  # every scale mirrored too
    windows_at_once: Batch = 8
    precision: Literal["fp32", "bf16"] = "bf16"
    num_threads: Threads = 4  # decoding threads
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        self.slide(SlideConfig())  # refuses what no window can be slid by

    def slide(self, stated: SlideConfig) -> SlideConfig:
        """The window's way: by flags, else by what the checkpoint stated."""
        return SlideConfig(
            stride=stated.stride if self.stride is None else self.stride,
            scale=stated.scale if self.scale is None else self.scale,
            multi_scale=self.multi_scale,
            flip=self.flip,
            windows_at_once=self.windows_at_once,
        )


@dataclass(frozen=True, kw_only=True)
class MasksConfig:
    """Where the masks of images are, and what their ids mean."""

    masks: Given = ""  # folder of PNGs of class ids; "": FOLDER is of ADE20K's layout
    part: Literal["training", "validation"] = "validation"  # of ADE20K's layout
    # names of the classes, and if it says them ids and colours; "": ADE20K's, or the checkpoint's
    classes_file: Given = ""
    ignore: Natural | None = None  # id of what does not count; null: none, in ADE20K's layout 0
    follow_links: bool = True  # to images and folders, wherever they lead

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class EvaluateSegmentationConfig(SegmenterSourceConfig):
    """A segmenter's checkpoint, images with masks, and how the one meets the other."""

    folder: Filled  # ADE20K's root, or of images
    data: MasksConfig = field(default_factory=MasksConfig)
    output: Filled = "segmentation.json"  # file to write
    order: Literal["worst", "id"] = "worst"  # of the classes in the table that is printed


@dataclass(frozen=True, kw_only=True)
class PredictSegmentationConfig(SegmenterSourceConfig):
    """A segmenter's checkpoint, images, and the folder for what it says of their pixels.

    OUTPUT/ids has a PNG of class ids for each image, 8 bits up to 256 classes and 16 beyond; the
    first class is 0, which in ADE20K's own masks is 1. OUTPUT/overlays has the image in the
    classes' colours, with a legend.
    """

    images: tuple[Filled, ...]  # files, folders, patterns
    output: Filled  # folder to write
    overwrite: bool = False  # replace files that are there
    classes_file: Given = ""  # names of the classes, and if it says them colours
    follow_links: bool = True  # to images and folders, wherever they lead
    precision: Literal["fp32", "bf16"] = "fp32"
