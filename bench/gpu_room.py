"""Where a stage of bench/gpu.py works."""

import dataclasses
from pathlib import Path

from facts import Facts


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a stage works: `batch` None takes the stage's own."""

    facts: Facts
    path: Path  # of the facts, for what an earlier item found
    run: str
    device: str
    batch: int | None
    output: Path

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    def images(self, on_gpu: int, on_cpu: int = 2) -> int:
        return self.batch or (on_gpu if self.is_cuda else on_cpu)

    def leaves_out(self, item: str, why: str) -> None:
        self.facts.say("note", item=item, left_out=why)
