"""What is made of an image: to pre-train on, for the tokenizer, to fine-tune on, to segment."""

from dataclasses import dataclass
from typing import Annotated, Literal

from beit_fast.checks import (
    Count,
    FieldError,
    Fraction,
    NonNegative,
    PositiveRange,
    Probability,
    Range,
    Share,
    ShareRange,
    Side,
    check_fields,
)
from beit_fast.data.sources.limits import MAX_PIXELS
from beit_fast.flags import flag

_MOST_PIXELS = (2**31 - 1) // 3  # of one image: a kernel counts its bytes in int32

Interpolation = Literal["bicubic", "bilinear"]
CropMode = Literal["center", "squash"]  # timm's words


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The two views of a sample; the defaults are the official pre-training's."""

    kind: Literal["reference", "fast", "gpu"] = "fast"
    # scaled: JPEGs at 1/2, 1/4 or 1/8 of their size where both views are smaller still (scaled.py)
    decode: Literal["full", "scaled"] = "full"
    size: Side = 224  # pixels (height, width) for the encoder
    token_size: Side = 112  # pixels for the tokenizer: its stride per patch
    scale: ShareRange = (0.08, 1.0)  # area of the crop as a share of the image's
    ratio: PositiveRange = (3 / 4, 4 / 3)  # width / height of the crop, log-uniform
    color_jitter: Probability = 0.4  # brightness, contrast, saturation: by 1 - this to 1 + this
    hflip: Probability = 0.5  # probability
    max_pixels: Count = MAX_PIXELS  # in one image file; larger ones are refused undecoded

    def __post_init__(self):
        check_fields(self)
        if self.decode == "scaled" and self.kind != "fast":
            raise FieldError(
                "decode",
                f"is scaled, and kind {self.kind} decodes whole images: pass full, or "
                f"{flag('views.kind')} fast",
            )
        if self.kind == "gpu" and self.max_pixels > _MOST_PIXELS:
            raise FieldError(
                "max_pixels",
                f"is {self.max_pixels}, and kind gpu counts at most {_MOST_PIXELS}: pass no more "
                f"than that, or {flag('views.kind')} fast",
            )
        for name in ("size", "token_size"):
            object.__setattr__(self, name, _pair(getattr(self, name)))

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises ValueError unless both views split evenly into `grid` patches or tokens."""
        for name, (height, width) in (("size", self.size), ("token_size", self.token_size)):
            if height % grid[0] or width % grid[1]:
                near = tuple(
                    max(1, round(side / n)) * n
                    for side, n in zip((height, width), grid, strict=True)
                )
                raise ValueError(
                    f"view {name}={height}x{width} px does not split into a grid of "
                    f"{grid[0]}x{grid[1]} patches: take {near[0]}x{near[1]} "
                    f"({flag(f'views.{name}')})"
                )


@dataclass(frozen=True, kw_only=True)
class SingleViewConfig:
    """The view that trains a tokenizer; the defaults are those of DALL-E's paper."""

    size: Count = 256  # pixels, both sides of the view
    # Area of the square as a share of the largest that fits; (1, 1) in the paper. Few and large
    # images give more to learn from with (0.1, 1).
    scale: ShareRange = (1.0, 1.0)
    hflip: Probability = 0.5  # probability
    max_pixels: Count = MAX_PIXELS  # in one image file; larger ones are refused undecoded

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation and labels of training; the defaults are those of fine-tuning from MIM."""

    scale: ShareRange = (0.08, 1.0)  # area of the crop as a share of the image's
    ratio: PositiveRange = (3 / 4, 4 / 3)  # width / height of the crop, log-uniform
    hflip: Probability = 0.5  # probability
    rand_augment: Annotated[float, Range(0, 10)] | None = 9.0  # magnitude; null: none
    erase: Probability = 0.25  # probability of erasing a box of an image
    mixup: NonNegative = 0.8  # alpha of Beta(alpha, alpha), one draw a micro-batch; 0: none
    cutmix: NonNegative = 1.0
    label_smoothing: Fraction = 0.1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class SegmentationViewConfig:
    """Augmentation of images with masks; the defaults are ADE20K's for crops of 512 pixels."""

    # Pixels, long and short side that an image fits into at ratio 1. (2560, 640) for crops of 640.
    scale: tuple[Count, Count] = (2048, 512)
    ratio: PositiveRange = (0.5, 2.0)  # of `scale`, uniform
    # Of the labelled pixels of a crop; 1: crops may be of one class alone.
    max_class_share: Share = 0.75
    hflip: Probability = 0.5  # probability
    distort: bool = True  # brightness, contrast, saturation and hue, each with probability 1/2

    def __post_init__(self) -> None:
        check_fields(self)
        long, short = self.scale
        if long < short:
            raise FieldError("scale", f"is [{long}, {short}]: give the long side first")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) from either form."""
    return (size, size) if isinstance(size, int) else tuple(size)
