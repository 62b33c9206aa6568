"""Memory that runs out in a step: where, in which step, and of what size it was."""

import contextlib
from collections.abc import Iterator, Sequence

from beit_fast.errors import RunError, is_out_of_memory
from beit_fast.flags import flag
from beit_fast.train.config import RunConfig
from beit_fast.train.prefetch import Batch
from beit_fast.train.progress import note


class OutOfMemory(RunError):
    """A step needs more memory than there is. It changed nothing that is or will be saved."""


@contextlib.contextmanager
def sizes_told(
    step: int, batches: Sequence[Batch], run: RunConfig, *, images: int
) -> Iterator[None]:
    """Where memory runs out inside, raise OutOfMemory with the number of the step (from 1), the
    sizes of its micro-batches, of so many images, on this rank, and what to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        shapes = {name: "x".join(map(str, v.shape)) for name, v in batches[0].items() if v.ndim > 1}
        shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise OutOfMemory(
            f"memory ran out ({said}) at step {step}, {note.place}: {len(batches)} x {images} "
            f"images on this rank in {run.precision} ({shown}). Make the batches smaller "
            f"({flag('data.batch_size')}, with {flag('run.accumulate')} for the same step), or the "
            "model; the same command then goes on from the last checkpoint"
        ) from error
