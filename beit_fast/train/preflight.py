"""What would stop a run, found before its first step: or before that of the stage before it."""

import shutil
import tempfile
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from beit_fast.flags import flag
from beit_fast.train.apex import check_apex
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.graph import check_graphs
from beit_fast.train.length import run_length
from beit_fast.train.parallel import check_parallel
from beit_fast.train.resume import check_resume
from beit_fast.train.settings import complete_settings
from beit_fast.train.state import checkpoint_paths
from beit_fast.train.step import autocast
from beit_fast.train.stop import heeded, left_together
from beit_fast.train.task import Task
from beit_fast.train.world import World

BYTES_PER_VALUE = 4  # weights, moments and averages are fp32


def check_run(
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    *,
    settings: Mapping[str, Any],
    world: World,
    unknown: Collection[str] = (),
    step: bool = False,
) -> None:
    """Raise what `train` would refuse, and where there is no room for its checkpoints.

    With `step`, for a run that another stage comes before, also what its first step would fail at:
    a batch is made, and the step taken on tensors without values. `unknown`: settings that the
    stage before decides. Raises ValueError (also CheckpointError), OSError, BadDataError,
    Interrupted.
    """
    output = Path(run.output)
    settings = complete_settings(task, optim, run, settings, world)
    _check_name(output)
    check_writable(output)
    manifest = check_resume(output, run, settings, unknown, task.images)
    length = run_length(task, optim, run, settings, manifest)
    check_parallel(run, optim, world)
    if run.cuda_graph:
        check_graphs(world.device)
    if optim.backend == "apex":
        check_apex(world.device)
    if manifest is not None and manifest["step"] >= length.num_steps:
        return
    check_space(task, run)
    if step:
        _check_step(task, run, world)


def check_space(task: Task, run: RunConfig) -> None:
    """Raise OSError where the disk has no room for the checkpoints that the run keeps.

    Weights, two moments of each, and the average where there is one; while one is written, all that
    are kept are still there.
    """
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    copies = 3 if run.ema_decay is None else 4
    size = BYTES_PER_VALUE * copies * trained
    output = Path(run.output)
    needed = size * max(1, run.keep + 1 - len(checkpoint_paths(output)))
    free = shutil.disk_usage(output).free
    if free < needed:
        raise OSError(
            f"{output} has {free / 2**30:.1f} GiB free and the run needs {needed / 2**30:.1f} for "
            f"its checkpoints of {size / 2**30:.1f} (run.keep is {run.keep}): make room, lower "
            f"{flag('run.keep')}, or give another {flag('run.output')}"
        )


def _check_name(output: Path) -> None:
    """Raise ValueError for a name that TensorBoard's files cannot have."""
    try:
        str(output).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{output} is not UTF-8, and TensorBoard writes below no other names: give another "
            f"{flag('run.output')}"
        ) from error


def check_writable(folder: Path, setting: str = "run.output") -> None:
    """Make the folder, and a file in it. Raises OSError with the path and the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write_"):
            pass
    except OSError as error:
        raise OSError(
            f"nothing can be written to {folder} ({error.strerror or error}): give another "
            f"{flag(setting)}"
        ) from error


def check_output_file(path: Path) -> None:
    """Make the folder of a file that will be written. Raises OSError, with path and flag, where it
    could not be."""
    if path.is_dir():
        raise OSError(
            f"{path} is a folder, and a file is to be written: pass {flag('output')} "
            f"{path / 'result.json'}, for example"
        )
    check_writable(path.parent, "output")


def _check_step(task: Task, run: RunConfig, world: World) -> None:
    """One batch, and the shapes of a step over it."""
    place = "while a first batch was made"
    with left_together(world, place), closing(heeded(task.batches(0), place)) as batches:
        batch = task.stand_in(next(batches))
    cpu = torch.device("cpu")
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode, autocast(run, cpu):
        task.loss(task.prepare({k: mode.from_tensor(v.cpu()) for k, v in batch.items()}))
