"""The toy killed (SIGKILL) while it trains and saves, and run again: `killed_saves.py OUTPUT SEED`.

Every run is a fork of this process, which has imported all and computed nothing. In OUTPUT lies a
folder for each run; printed is one line of JSON of what became of each.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import tensorboard.summary.writer.record_writer  # noqa: F401  (for the forks: it takes a second)

from beit_fast.train import saving, state
from beit_fast.train.saving import Saver
from beit_fast.train.state import checkpoint_paths
from toy import ALONE, train_toy

RANDOM_KILLS = 8
MARK = "fault"  # file that a fault leaves before it kills


def fork(run: Callable[[], object], *, orderly: bool = False) -> int:
    """The process that runs it. `orderly`: it ends as an interpreter does, which takes torch a
    second."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    if orderly:
        raise SystemExit(0)
    os._exit(0)


def ended(pid: int) -> str:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "killed" if code == -signal.SIGKILL else f"exit {code}"


def train(output: Path) -> None:
    train_toy(output, save_every=2, log_every=1)


# --- aimed: each fault is in the third save, when the first checkpoint is about to be deleted -----


def before_it_writes(kill: Callable[[], None]) -> None:
    saving.save_checkpoint = in_third(saving.save_checkpoint, kill)


def half_a_file(kill: Callable[[], None]) -> None:
    real = state.save_file

    def half(tensors: dict, path: Path, **more: object) -> None:
        real(tensors, path, **more)
        os.truncate(path, path.stat().st_size // 2)
        kill()

    # Each of four files is a call, and the fault is in the second of the third save.
    state.save_file = nth(10, real, half)


def before_the_manifest(kill: Callable[[], None]) -> None:
    state.environment = in_third(state.environment, kill)


def before_the_rename(kill: Callable[[], None]) -> None:
    real = state._flush

    def flush(path: Path) -> str:
        digest = real(path)
        kill()
        return digest

    state._flush = nth(15, real, flush)  # the manifest's, after four files, in the third save


def after_the_rename(kill: Callable[[], None]) -> None:
    state.flush_folder = in_third(state.flush_folder, kill)


def while_it_deletes(kill: Callable[[], None]) -> None:
    real = shutil.rmtree

    def half(path: Path, **more: object) -> None:
        if path.name.endswith("1.old") or path.name.endswith("2.old"):
            next(path.iterdir()).unlink()
            kill()
        real(path, **more)

    state.shutil.rmtree = half


def nth(number: int, usual: Callable, other: Callable) -> Callable:
    calls = iter(range(1, 1000))
    return lambda *a, **k: (other if next(calls) == number else usual)(*a, **k)


def in_third(usual: Callable, kill: Callable[[], None]) -> Callable:
    return nth(3, usual, lambda *_, **__: kill())


AIMED = {
    fault.__name__: fault
    for fault in (
        before_it_writes,
        half_a_file,
        before_the_manifest,
        before_the_rename,
        after_the_rename,
        while_it_deletes,
    )
}


def aimed(output: Path, fault: Callable[[Callable[[], None]], None]) -> str:
    def run() -> None:
        def kill() -> None:
            (output / MARK).touch()
            os.kill(os.getpid(), signal.SIGKILL)

        fault(kill)
        train(output)

    how = ended(fork(run))
    return how if (output / MARK).exists() else f"{how}, and the fault did not fire"


def at_random(output: Path, seconds: float) -> str:
    """Killed that long after its folder of checkpoints came to be; sooner where it had ended."""
    while True:
        pid = fork(lambda: train(output))
        while not (output / "checkpoints").exists():
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        if (how := ended(pid)) == "killed":
            return how
        shutil.rmtree(output)
        seconds /= 2


def main(output: Path, seed: int) -> int:
    began = time.perf_counter()
    results = {"whole": {"ended": ended(fork(lambda: train(output / "whole")))}}
    took, rng = time.perf_counter() - began, random.Random(seed)

    def try_(name: str, how: str) -> None:
        paths = [path.name for path in checkpoint_paths(output / name)]
        again = ended(fork(lambda: train(output / name)))
        rests = [path.name for path in (output / name / "checkpoints").glob(".*")]
        results[name] = {"ended": how, "kept": paths, "again": again, "rests": rests}

    for name, fault in AIMED.items():
        try_(name, aimed(output / name, fault))
    for number in range(RANDOM_KILLS):
        name = f"random_{number}"
        try_(name, at_random(output / name, rng.uniform(0, took)))

    def leave_it_writing() -> None:
        write = saving.save_checkpoint
        saving.save_checkpoint = lambda *a, **k: time.sleep(0.3) or write(*a, **k)
        Saver(output / "left", {}, keep=1, world=ALONE).save(1, {"model": {}})

    results["left"] = {"ended": ended(fork(leave_it_writing, orderly=True))}
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
