"""Faults that tests plant: armed as RANK:STEP:FAULT, each of which fires once and is counted.

    injector = Injector(output, ["1:5:kill"], rank=world.rank)
    injector.meet("step", 5)           # on rank 1 this is the end of it
    assert fired(output) == {"1:5:kill": 1}

STEP counts from 1, or is whatever number the place has: of an image, of a save. A fault that fired
is a file of the output folder, so it stays so for a run that is started again, and for the test
that asserts it: none passes because its fault never came.
"""

import ast
import ctypes
import errno
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LET_GO = threading.Event()  # of reads that hang
FIRED = "fired_"  # and the fault: a file with the time of each firing, a line each


@dataclass(frozen=True)
class Fault:
    """What happens, and where: `act` gets the value of that place, and gives what stands there."""

    place: str
    act: Callable[[object], object]


def fired(output: Path) -> Counter[str]:
    """How often each fault came, by its name."""
    marks = output.glob(f"{FIRED}*")
    return Counter({p.name.removeprefix(FIRED): len(p.read_text().splitlines()) for p in marks})


def fired_at(output: Path, fault: str) -> float:
    """When it came the last time, as `time.time` has it."""
    return float((output / f"{FIRED}{fault}").read_text().splitlines()[-1])


class Injector:
    """The faults of one process of a run.

    again: how often each comes. settle: seconds before it does, in which whoever watches sees what
    was before.
    """

    def __init__(
        self,
        output: Path,
        armed: Iterable[str],
        *,
        rank: int = 0,
        again: int = 1,
        settle: float = 0.0,
    ) -> None:
        self._output, self._rank, self._again, self._settle = output, rank, again, settle
        self._armed = []
        for name in armed:
            of_rank, step, kind = name.split(":")
            self._armed.append((name, int(of_rank), int(step), FAULTS[kind]))

    def meet(self, place: str, step: int, value: object = None) -> object:
        """`value`, or what a fault that is armed for this place makes of it."""
        for name, rank, at, fault in self._armed:
            if (fault.place, rank, at) == (place, self._rank, step) and self._left(name):
                time.sleep(self._settle)
                with (self._output / f"{FIRED}{name}").open("a") as file:
                    file.write(f"{time.time()}\n")
                value = fault.act(value)
        return value

    def _left(self, name: str) -> bool:
        return fired(self._output)[name] < self._again


def hang(_: object = None) -> None:
    """Deaf to SIGTERM, as what waits for a disk is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def wait(_: object = None) -> None:
    """For a reader that does not come; signals are heard."""
    threading.Event().wait(600)


def wait_and_be_told(_: object = None) -> None:
    """The signal comes in the wait."""
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    wait()


def hang_with_lock(_: object) -> None:
    """Inside an extension that keeps Python's lock, and that no signal wakes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ctypes.PyDLL(None).sleep(600)


def hang_read(value: object) -> object:
    """Until the test lets it go, or a minute."""
    LET_GO.wait(60)
    return value


def slowly(_: object) -> None:
    """Seven seconds of work in parts."""
    from beit_fast.train.stop import heed_stop

    for _ in range(35):
        time.sleep(0.2)
        heed_stop("while working")


def limits_files(num_bytes: int) -> Callable[[object], object]:
    """From now on no file of this process grows beyond that: as on a disk that is full."""

    def act(value: object) -> object:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        return value

    return act


def sends(signum: signal.Signals) -> Callable[[object], object]:
    def act(value: object) -> object:
        os.kill(os.getpid(), signum)
        return value

    return act


def raises(error: BaseException) -> Callable[[object], object]:
    def act(_: object) -> object:
        raise error

    return act


def fails_to_compile(_: object) -> object:
    from triton.compiler.errors import CompilationError

    raise CompilationError(None, ast.Pass(), "unsupported\nconstruct")


def asks_too_much(_: object) -> object:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300_000, 232_448, "shared memory")


# Moments of a save, in their order, at which killed_saves.py kills: each fault is its own place.
KILLED_SAVES = (
    *("save_begins", "folder_is_empty", "half_a_file", "file_has_no_seal"),
    *("file_is_not_read_again", "no_manifest", "half_a_manifest", "before_the_rename"),
    *("after_the_rename", "before_it_deletes", "half_deleted"),
)


def raises_in_backward(error: BaseException) -> Callable[[Tensor], Tensor]:
    """Where the gradient of the loss has come to be, a tensor."""

    def act(loss: Tensor) -> Tensor:
        loss = loss * 1
        loss.register_hook(raises(error))
        return loss

    return act


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")
FULL_AT = (100, 1_000, 10_000, 100_000, 260_000)  # bytes
# Places: "step" (its beginning), "batch" (waiting for that of a step), "save" (writing the
# checkpoint of a step), "update" (the optimiser's step), "launch" (of a kernel, by its name);
# "loss", "gradient", "pixels" and "sample" (of an image's number), of which a tensor is the value;
# "read" (the files of the image with the number STEP).
FAULTS = {
    "kill": Fault("step", sends(signal.SIGKILL)),
    "term": Fault("step", sends(signal.SIGTERM)),
    "usr1": Fault("step", sends(signal.SIGUSR1)),
    "twice": Fault("step", lambda _: [sends(signal.SIGTERM)(None) for _ in range(2)]),
    "term_in_save": Fault("save", sends(signal.SIGTERM)),
    "stop": Fault("step", sends(signal.SIGSTOP)),
    "hang": Fault("step", hang),
    "lock": Fault("step", hang_with_lock),
    "slow": Fault("step", slowly),
    "error": Fault("step", raises(ValueError("a disk of this node is gone: mount it"))),
    "fault": Fault("step", raises(ZeroDivisionError("division by zero"))),
    "oom": Fault("step", raises(NO_MEMORY)),
    "oom_backward": Fault("loss", raises_in_backward(NO_MEMORY)),
    "oom_update": Fault("update", raises(NO_MEMORY)),
    "loader": Fault("batch", hang),
    "wait": Fault("batch", wait),
    "told": Fault("batch", wait_and_be_told),
    "full_disk": Fault("save", raises(OSError(28, "No space left on device"))),
    "bug": Fault("save", raises(ZeroDivisionError("division by zero"))),
    **{f"full_at_{size}": Fault("step", limits_files(size)) for size in FULL_AT},
    "nan": Fault("loss", lambda loss: loss * torch.nan),
    "inf": Fault("loss", lambda loss: loss * torch.inf),
    # Its gradients are as they were: bad on this rank alone.
    "nan_value": Fault("loss", lambda loss: loss + torch.nan),
    "hang_read": Fault("read", hang_read),
    "slow_read": Fault("read", lambda value: time.sleep(0.3) or value),
    "eio": Fault("read", raises(OSError(errno.EIO, "Input/output error"))),
    "stale": Fault("read", raises(OSError(errno.ESTALE, "Stale file handle"))),
    "denied": Fault("read", raises(OSError(errno.EACCES, "Permission denied"))),
    "torch": Fault("read", raises(RuntimeError("a kernel failed\nand how"))),
    "memory": Fault("read", raises(MemoryError())),
    "compile": Fault("launch", fails_to_compile),
    "resources": Fault("launch", asks_too_much),
    "passes": Fault("launch", raises(RuntimeError("PassManager::run failed"))),
    "access": Fault("launch", raises(RuntimeError("CUDA error: an illegal memory access"))),
    "spike": Fault("loss", lambda loss: loss * 100),
    **{place: Fault(place, sends(signal.SIGKILL)) for place in KILLED_SAVES},
    "nan_pixels": Fault("pixels", lambda pixels: pixels * torch.nan),
    "huge": Fault("sample", lambda pixels: pixels * 1e30),
    "nan_gradient": Fault("gradient", lambda gradient: gradient * torch.nan),
}
