"""What a run depends on, as plain data: a manifest holds it, and ranks must have it alike."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from beit_fast.train.board import digest_of
from beit_fast.train.changes import without_habits
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.resume import Resume
from beit_fast.train.task import Task
from beit_fast.train.world import World


def complete_settings(
    task: Task, optim: OptimConfig, run: RunConfig, settings: Mapping[str, Any], world: World
) -> dict[str, Any]:
    """A task's settings with those of optimiser and run, without habits, as a manifest holds them.

    Through JSON, so that what is compared at a resume is what a manifest can hold.
    """
    of_run = asdict(run) | {
        "world_size": world.size,
        "images_per_batch": task.images_per_batch,
        "num_images": task.num_images,  # of whatever folder: data may move
    }
    # Which images, of whatever folder.
    of_data = {**settings.get("data", {}), "images": task.images.digest}
    parts = {"data": of_data, "optim": asdict(optim), "run": of_run}
    whole = without_habits({**settings, **parts})
    return json.loads(json.dumps(whole))


def start_of(resume: Resume | None, task: Task) -> dict[str, Any]:
    """What ranks must have alike besides settings, with the checkpoint that each would go on from:
    every one reads it by itself."""
    manifest = None if resume is None else digest_of(resume.manifest)
    step = None if resume is None else resume.checkpoint.step
    return {
        "number of images": task.num_images,
        "step of the checkpoint": step,
        "manifest of the checkpoint": manifest,
    }
