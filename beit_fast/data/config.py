"""Which images, in what batches, and what is hidden of each."""

from dataclasses import dataclass
from typing import Literal

from beit_fast.checks import (
    Batch,
    Count,
    FieldError,
    Given,
    Positive,
    Probability,
    Threads,
    check_fields,
)
from beit_fast.data.sources.limits import ReadConfig

PHOTOGRAPHS = "photographs"  # the name of the images that ship with the package
MAX_VOCAB = 2**16  # of a token cache, whose ids are uint16


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """In what order a pass reads its images; see window.py."""

    # full: all images are shuffled. window: of tables and shards so many at a time.
    shuffle: Literal["full", "window"] = "full"
    window: Count = 16  # shards at a time

    @property
    def shards_at_once(self) -> int | None:
        """None: all."""
        return self.window if self.shuffle == "window" else None


@dataclass(frozen=True, kw_only=True)
class DataConfig(OrderConfig, ReadConfig):
    """A folder of images and the batches made of it."""

    # Folder of images, flat or in class folders; "photographs" ship with the package,
    # "digits:train" comes with scikit-learn (data/sources/digits.py).
    path: Given = ""
    batch_size: Batch = 128  # images per micro-batch on each rank
    num_threads: Threads = 4  # decoding threads; batches do not depend on it
    follow_links: bool = True  # to images and folders, wherever they lead
    # Of the images; more unusable ones stop the run, 0: the first does.
    max_bad_share: Probability = 0.001

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How masks are drawn; the defaults are the authors' for a 14 x 14 grid."""

    strategy: Literal["block", "block_exact", "block_paper", "random"] = "block"
    num_masked: Count = 75  # patches; "block_paper" hides 40 % of any grid instead
    min_block: Count = 16  # patches in one rectangle
    max_block: Count | None = None  # patches in one rectangle; None: as many as are left to hide
    min_aspect: Positive = 0.3  # height / width of a rectangle
    max_aspect: Positive | None = None  # None: 1 / min_aspect

    def __post_init__(self):
        check_fields(self)
        low, high = self.aspects
        if low > high:
            raise FieldError(
                "min_aspect",
                f"is {low:g} and max_aspect {high:g}: the aspects of a block must be in order",
            )
        if self.max_block is not None and self.max_block < self.min_block:
            raise FieldError(
                "max_block",
                f"is {self.max_block}, below min_block={self.min_block}: raise one or lower the "
                "other",
            )
        if self.strategy in ("block", "block_exact") and self.num_masked < self.min_block:
            raise FieldError(
                "num_masked",
                f"is {self.num_masked}, below min_block={self.min_block}: hardly any block would "
                "fit and most masks would be empty; lower min_block",
            )

    @property
    def aspects(self) -> tuple[float, float]:
        return self.min_aspect, self.max_aspect or 1 / self.min_aspect
