"""Which images are looked at, and what is told of them."""

from dataclasses import dataclass

from beit_fast.checks import Count, Filled, Probability, Threads, check_fields
from beit_fast.data.sources.limits import MAX_PIXELS, ReadConfig


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ReadConfig):
    """Read and decode every image once, as training does, and tell what is broken, doubled or
    small, and of what kinds and classes all are. Nothing is changed."""

    images: Filled  # folder, shards, tables, store: all that --data.path takes
    output: Filled = "check.json"  # file to write
    img_size: Count = 224  # pixels; images with a shorter side are named as small
    max_pixels: Count = MAX_PIXELS  # in one image; training refuses larger ones
    max_bad_share: Probability = 0.001  # of the images: what training bears by default
    num_threads: Threads | None = None  # null: one for each core
    follow_links: bool = True  # to images and folders, wherever they lead

    def __post_init__(self) -> None:
        check_fields(self)
