"""Checkpoints are written beside training: a step pays for the copy to host memory alone.

The main rank copies the tensors in the step, and a thread writes the copy (state.py). One save is
in flight at most: the next waits for it. The other ranks never wait for the disk, but at the end.

What the thread meets is an error of the run, unless `run.failed_saves` bears it. It travels in the
message that ranks exchange before each step for stop signals (`failed`), so all of them end after
the same step, and the main rank says why.
"""

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor

from beit_fast.errors import RunError, ToldElsewhere
from beit_fast.flags import flag
from beit_fast.train.progress import unhurried
from beit_fast.train.state import (
    checkpoint_paths,
    metadata_of,
    remove_leftovers,
    save_checkpoint,
)
from beit_fast.train.stop import WRITER
from beit_fast.train.world import World

FAILED = 1 << 10  # a message to the other ranks, above the number of every signal
ALIGNED = 64  # bytes: where a tensor in the buffer begins
Tensors = Mapping[str, Mapping[str, Tensor]]  # of a checkpoint: file stem, name
logger = logging.getLogger("beit_fast.train")


class Saver:
    """The checkpoints of a run, `keep` of them below `output`. A context: its end waits for the
    thread, but after a second Ctrl-C, which waits for nothing.

    beside: whether a thread writes; else `save` returns when the checkpoint is on the disk. bears:
    how many in a row may fail to be written, each with a warning. lock: of the output folder, open;
    the thread holds it too. `more` goes into each manifest.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        *,
        keep: int,
        world: World,
        beside: bool = True,
        bears: int = 0,
        lock: TextIO | None = None,
        **more: Any,
    ) -> None:
        self._bears, self._flag = bears, flag("run.failed_saves")  # said in a thread
        self._output, self._settings, self._keep, self._more = output, settings, keep, more
        self._world, self._beside, self._lock = world, beside, lock
        self._copy = HostCopy(world.device)
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._error: Exception | None = None  # of the last one
        self._in_a_row, self._saved = 0, -1  # failures; the step that is on the disk
        if world.is_main:
            remove_leftovers(output)

    @property
    def failed(self) -> int:
        """FAILED once saves of this rank went wrong beyond what is borne, else 0: what
        `World.any_of` takes."""
        return FAILED if self._in_a_row > self._bears else 0

    def save(self, step: int, tensors: Tensors) -> None:
        """Save `tensors`, which are the main rank's, as checkpoint of `step`. On every rank.

        They may change as soon as this returns. After failures that are not borne nothing is
        written.
        """
        if self._world.is_main:
            self._join()
            if not self.failed and self._beside:
                # No daemon: the interpreter's end waits for it, and does not stop it in native
                # code, which would abort the process.
                held = os.dup(self._lock.fileno()) if self._lock is not None else None
                copied, event = self._copy.take(tensors)
                thread = threading.Thread(
                    target=self._write, args=(step, copied, event, held), name=WRITER
                )
                self._written.clear()
                thread.start()
                self._thread = thread
            elif not self.failed:
                self._write(step, tensors)
        if not self._beside:
            self.wait()

    def check(self, message: int) -> None:
        """Raise what a save met if `message`, of all ranks, says that one failed. On every rank.

        Raises OSError on the main rank, as `save_checkpoint` does, and ToldElsewhere on the others.
        """
        if message < FAILED:
            return
        if self._error is None:
            raise ToldElsewhere("a checkpoint could not be written; the main rank says why")
        raise self._error

    def wait(self) -> list[Path]:
        """The run's checkpoints, oldest first, once all that was saved is on the disk.

        On every rank. Raises as `check` does.
        """
        self._join()
        self.check(self._world.any_of(self.failed))
        return checkpoint_paths(self._output)

    def has(self, step: int) -> bool:
        """Whether that of `step` is on the disk, once all that was saved is. On every rank."""
        self._join()
        return not self._world.any_of(int(self._world.is_main and self._saved != step))

    def finish(self) -> list[Path]:
        """As `wait`, at the end of a run: a last save that failed is not borne."""
        self._join()
        if self._error is not None:
            self._in_a_row = self._bears + 1
        return self.wait()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return
        self._join()
        self._copy.close()
        if self.failed and error is not self._error:
            logger.warning("%s", self._error)  # what ends the run is something else

    def _join(self) -> None:
        if self._thread is not None:
            # Not by `join` alone: one that Ctrl-C interrupts takes the thread for ended (until
            # Python 3.13, bpo-45274), and nobody would wait for it at the interpreter's end.
            with unhurried("writing a checkpoint"):
                self._written.wait()
                self._thread.join()
            self._thread = None

    def _write(
        self,
        step: int,
        tensors: Tensors,
        copied: "torch.cuda.Event | None" = None,
        held: int | None = None,
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            save_checkpoint(
                self._output,
                step,
                tensors,
                self._settings,
                keep=self._keep,
                metadata=metadata_of(self._settings),
                **self._more,
            )
            self._error, self._in_a_row, self._saved = None, 0, step
        except Exception as error:
            self._fail(error)
        finally:
            if held is not None:
                os.close(held)
            self._written.set()

    def _fail(self, error: Exception) -> None:
        borne = isinstance(error, OSError) and self._in_a_row < self._bears
        self._error = error
        self._in_a_row = self._in_a_row + 1 if borne else self._bears + 1
        if borne:
            logger.warning(
                "%s. Training goes on: %d of the %d in a row that %s bears",
                *(error, self._in_a_row, self._bears, self._flag),
            )


class HostCopy:
    """One buffer in host memory, made by the first copy and used by all later ones.

    For a GPU it is pinned, by registering it: torch's allocator of pinned memory rounds up to a
    power of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def take(
        self, tensors: Tensors
    ) -> tuple[dict[str, dict[str, Tensor]], "torch.cuda.Event | None"]:
        """Copies, contiguous, and of a GPU's tensors what to wait for before they are read.

        They are valid until the next call. The copies of a GPU's tensors are queued on the current
        stream, behind which the next step is: the host does not wait for them.
        """
        sizes = [_aligned(v.nbytes) for values in tensors.values() for v in values.values()]
        if sum(sizes) > len(self._buffer):
            self.close()
            self._buffer = torch.empty(sum(sizes), dtype=torch.uint8)
            self._pin()
        start, copies = 0, {}
        for stem, values in tensors.items():
            copies[stem] = {}
            for name, value in values.items():
                part = self._buffer[start : start + value.nbytes]
                copy = part.view(value.dtype).view(value.shape)
                copies[stem][name] = copy.copy_(value.detach(), non_blocking=True)
                start += _aligned(value.nbytes)
        if self._device.type != "cuda":
            return copies, None
        event = torch.cuda.Event(blocking=True)  # sleeps: the loader's threads want the core
        event.record()
        return copies, event

    def close(self) -> None:
        """Give the memory back. Copies of before are not to be read any more."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._pinned, self._buffer = False, self._buffer[:0].clone()

    def _pin(self) -> None:
        if self._device.type != "cuda":
            return
        buffer = self._buffer
        answer = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        if int(answer):
            raise RunError(
                f"{buffer.nbytes / 2**30:.1f} GiB of host memory, for the copy of a checkpoint, "
                f"cannot be pinned (CUDA error {int(answer)}): pass {flag('run.save_async')} false"
            )
        self._pinned = True


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNED) * ALIGNED
