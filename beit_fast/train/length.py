"""How many steps a run has, and how many of them are warm-up."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from beit_fast.train.changes import same_length
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.optim import warmup_steps

if TYPE_CHECKING:
    from beit_fast.train.loop import Task


@dataclass(frozen=True)
class Length:
    """Optimiser steps."""

    num_steps: int
    warmup_steps: int


def run_length(
    task: "Task",
    optim: OptimConfig,
    run: RunConfig,
    settings: Mapping[str, Any],
    manifest: Mapping[str, Any] | None = None,
) -> Length:
    """Of the run, or of the rest of the one that `manifest` is of.

    A pass over the data is a whole number of micro-batches, so their size and the number of ranks
    have a say. A resume that splits its steps otherwise, or over other images, keeps the length
    that it had. Raises ValueError for a warm-up that leaves no step.
    """
    batches_per_epoch, accumulate = task.batches_per_epoch, run.accumulate
    if manifest is not None and same_length(manifest, settings):
        if "schedule" in manifest:
            return Length(**manifest["schedule"])
        theirs = manifest["settings"]["run"]  # a version that did not say its length
        batches_per_epoch = max(
            1, theirs["num_images"] // (theirs["images_per_batch"] * theirs["world_size"])
        )
        accumulate = theirs["accumulate"]
    num_steps = run.num_steps(batches_per_epoch, accumulate)
    return Length(num_steps, warmup_steps(optim, num_steps, batches_per_epoch / accumulate))
