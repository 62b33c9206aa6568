"""A part of a source of images, as a source: to hold images out of training."""

import hashlib
from collections.abc import Sequence

from beit_fast.data.datasets import ImageSource


class Subset:
    """The images of `source` with these numbers, numbered anew."""

    def __init__(self, source: ImageSource, numbers: Sequence[int]):
        self.source, self._numbers = source, [int(number) for number in numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> bytes:
        return self.source.read(self._numbers[index])

    def name(self, index: int) -> str:
        return self.source.name(self._numbers[index])

    def digest(self) -> str:
        numbers = ",".join(map(str, self._numbers))
        return hashlib.sha256(f"{self.source.digest()} {numbers}".encode()).hexdigest()
