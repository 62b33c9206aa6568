"""Which step of which run is taken again."""

from dataclasses import dataclass
from typing import Any

from beit_fast.checks import Count, Filled, check_fields
from beit_fast.train.config import Steps


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """A step of a run of `pretrain`, `tokenizer`, `finetune` or `segment`, taken again in one
    process from the newest checkpoint before it; nothing in the run's folder is changed."""

    run: Filled  # folder of the run; of a tokenizer that was trained first, RUN/tokenizer
    step: Steps
    json: Filled | None = None  # file to write what was found to
    ranks: Count | None = None  # that the run had; null: as its files say

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Replay:
    """A step, and the configuration of its run, of the verb."""

    wanted: ReplayConfig
    verb: str
    config: Any
