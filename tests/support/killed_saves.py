"""The toy killed (SIGKILL) while it trains and saves, and run again: `killed_saves.py OUTPUT SEED`.

Every run is a fork of this process, which has imported all and computed nothing. In OUTPUT lies a
folder for each run; printed is one line of JSON of what became of each.
"""

import contextlib
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

# For the forks: these take seconds.
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401
import torch._dynamo  # noqa: F401

from beit_fast.train import saving, state
from beit_fast.train.saving import Saver
from beit_fast.train.state import checkpoint_paths
from faults import KILLED_SAVES, Injector, fired
from toy import ALONE, train_toy

RANDOM_KILLS = 20
SAVES = (3, 6)  # of six. In the third the first checkpoint is the first to be deleted


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


class Places:
    """Has an injector met at each of KILLED_SAVES, the number of the save being its step."""

    def __init__(self, injector: Injector) -> None:
        self._injector, self._save, self._calls = injector, 0, {}
        save, remove = saving.save_checkpoint, shutil.rmtree

        def begin(*arguments: object, **more: object) -> Path:
            self._save, self._calls = self._save + 1, {}
            self._meet("save_begins")
            return save(*arguments, **more)

        def remove_half(path: Path, **more: object) -> None:
            if path.name.endswith(".old"):
                next(path.iterdir()).unlink()
                self._meet("half_deleted")
            remove(path, **more)

        saving.save_checkpoint = begin
        state.shutil.rmtree = remove_half
        # Four files of weights, in this order; `_flush` is of those and of the manifest.
        self._before("_write_tensors", 1, "folder_is_empty")
        self._before("_flush", 2, "half_a_file", half=True)
        self._before("seal", 3, "file_has_no_seal")
        self._before("load_file", 4, "file_is_not_read_again")
        self._before("manifest_text", 1, "no_manifest")
        self._before("_flush", 5, "half_a_manifest", half=True)
        self._before("read_manifest", 1, "before_the_rename")
        self._before("flush_folder", 1, "after_the_rename")
        self._before("_discard", 1, "before_it_deletes")

    def _meet(self, place: str) -> None:
        self._injector.meet(place, self._save)

    def _before(self, name: str, number: int, place: str, *, half: bool = False) -> None:
        """That call of a save to a function of `state`. half: its file is first cut in half."""
        usual = getattr(state, name)

        def call(*arguments: object, **more: object) -> object:
            self._calls[name] = self._calls.get(name, 0) + 1
            if self._calls[name] == number:
                whole = arguments[0].read_bytes() if half else b""
                if half:
                    os.truncate(arguments[0], len(whole) // 2)
                self._meet(place)
                if half:
                    arguments[0].write_bytes(whole)
            return usual(*arguments, **more)

        setattr(state, name, call)


def aimed(output: Path, fault: str) -> str:
    def run() -> None:
        output.mkdir()
        Places(Injector(output, [fault]))
        train(output)

    return ended(fork(run))


def at_random(output: Path, seconds: float) -> str:
    """Killed that long after its folder of checkpoints came to be; sooner where it had ended."""
    while True:
        pid = fork(lambda: train(output))
        while not (output / "checkpoints").exists():
            time.sleep(0.001)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if (how := ended(pid)) == "killed":
            return how
        shutil.rmtree(output)
        seconds /= 2


def unreadable(metrics: Path) -> list[str]:
    """Lines that are no JSON, but the last."""
    found = []
    for line in metrics.read_text().split("\n")[:-1] if metrics.exists() else []:
        try:
            json.loads(line)
        except ValueError:
            found.append(line)
    return found


def main(output: Path, seed: int) -> int:
    began = time.perf_counter()
    results = {"whole": {"ended": ended(fork(lambda: train(output / "whole")))}}
    took, rng = time.perf_counter() - began, random.Random(seed)

    def try_(name: str, how: str) -> None:
        folder = output / name
        left = {
            "ended": how,
            "fired": dict(fired(folder)),
            "kept": [path.name for path in checkpoint_paths(folder)],
            "bad_lines": unreadable(folder / "metrics.jsonl"),
        }
        again = ended(fork(lambda: train(folder)))
        rests = [path.name for path in (folder / "checkpoints").glob(".*")]
        results[name] = {**left, "again": again, "rests": rests}

    for place in KILLED_SAVES:
        for save in SAVES:
            fault = f"0:{save}:{place}"
            try_(fault, aimed(output / fault, fault))
    for number in range(RANDOM_KILLS):
        name = f"random_{number}"
        try_(name, at_random(output / name, rng.uniform(0, took)))

    def leave_it_writing() -> None:
        write = saving.save_checkpoint
        saving.save_checkpoint = lambda *a, **k: time.sleep(0.3) or write(*a, **k)
        Saver(output / "left", {}, keep=1, world=ALONE).save(1, {"model": {}})

    results["left"] = {"ended": ended(fork(leave_it_writing, orderly=True))}
    print(json.dumps({"seed": seed, "runs": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
