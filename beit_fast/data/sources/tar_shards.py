"""Images in tar shards, as webdataset lays them out: one ranged read an image."""

from collections.abc import Sequence

from torch import Tensor

from beit_fast.data.sources.folder import ImageSource
from beit_fast.data.sources.limits import READS, ReadConfig


class TarShards(ImageSource):
    """Stand-in."""

    def __init__(self, path: str, *, reads: ReadConfig = READS) -> None:
        raise NotImplementedError

    shard_sizes: Sequence[int]  # images of each shard, in the order of their numbers
    damage: dict[str, str]  # shard or member -> what is wrong with it
    path: str  # to show

    def left_out(self) -> str: ...

    def labelled(self, fewest: int) -> tuple[Tensor, list[str]]: ...
