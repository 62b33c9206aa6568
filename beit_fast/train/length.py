"""How many steps a run has, and how many of them are warm-up."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beit_fast.manifest import CheckpointError
from beit_fast.train.changes import same_length
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.optim import warmup_steps
from beit_fast.train.task import Task


@dataclass(frozen=True)
class Length:
    """Optimiser steps."""

    num_steps: int
    warmup_steps: int


def run_length(
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    settings: Mapping[str, Any],
    manifest: Mapping[str, Any] | None = None,
) -> Length:
    """Of the run, or of the rest of the one that `manifest` is of.

    A pass over the data is a whole number of micro-batches, so their size and the number of ranks
    have a say. A resume that splits its steps otherwise, or over other images, keeps the length
    that it had. Raises ValueError for a warm-up that leaves no step, CheckpointError for a manifest
    without counts.
    """
    batches_per_epoch, accumulate = task.batches_per_epoch, run.accumulate
    if manifest is not None and same_length(manifest, settings):
        if "schedule" in manifest:
            return Length(**manifest["schedule"])
        theirs = manifest["settings"].get("run", {})  # a version that did not say its length
        names = ("num_images", "images_per_batch", "world_size", "accumulate")
        counts = [theirs.get(name) for name in names]
        if not all(type(count) is int and count > 0 for count in counts):
            raise CheckpointError(
                f"the checkpoint does not say how long a pass over the data is ({', '.join(names)} "
                f"are {counts}): its manifest is damaged"
            )
        num_images, images_per_batch, world_size, accumulate = counts
        batches_per_epoch = max(1, num_images // (images_per_batch * world_size))
    num_steps = run.num_steps(batches_per_epoch, accumulate)
    return Length(num_steps, warmup_steps(optim, num_steps, batches_per_epoch / accumulate))
