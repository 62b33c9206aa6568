"""Which images become shards, and how."""

from dataclasses import dataclass
from typing import Annotated

from beit_fast.checks import (
    Count,
    FieldError,
    Filled,
    Probability,
    Range,
    Threads,
    check_fields,
)
from beit_fast.data.sources.limits import MAX_PIXELS, ReadConfig

QUALITY = 90  # of JPEG, where images are made smaller and none is given


@dataclass(frozen=True, kw_only=True)
class PackConfig(ReadConfig):
    """Write images as tar shards in webdataset's layout, every image checked on the way. A file is
    copied bit for bit; with --short_side larger images are made smaller and encoded anew. The same
    command goes on after a kill, and checks what it finds."""

    images: Filled  # folder, shards, tables, store: all that --data.path takes
    shards: Filled  # folder to write; empty, or with shards of the same command
    name: Filled | None = None  # of the shards, NAME-0000.tar; null: that of the folder SHARDS
    labels: bool = True  # false: images without classes
    images_per_shard: Count = 1000
    shuffle: bool = True  # false: in the order of the source, which may be that of its classes
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # of the order
    short_side: Count | None = None  # pixels that a larger one is made smaller to
    quality: Annotated[int, Range(1, 100)] | None = None  # of the JPEGs it makes; null: 90
    max_pixels: Count = MAX_PIXELS  # in one image; larger ones are left out
    # Of the images; if more are broken the command stops, 0: the first does.
    max_bad_share: Probability = 0.001
    num_threads: Threads | None = None  # null: one for each core; shards do not depend on it
    follow_links: bool = True  # to images and folders, wherever they lead

    def __post_init__(self) -> None:
        check_fields(self)
        if self.quality is not None and self.short_side is None:
            raise FieldError(
                "quality",
                f"is {self.quality} and short_side null: files are copied as they are then; give "
                "both or neither",
            )
