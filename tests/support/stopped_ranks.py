"""The toy on two ranks, and alone, stopped by signals again and again: `stopped_ranks.py OUTPUT`.

Every process is a fork of this one, which has imported all and computed nothing. Printed is one
line of JSON: of each stop the codes, what was said, and the seconds from the signal until all were
gone.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import tensorboard.summary.writer.record_writer  # noqa: F401  (for the forks: it takes a second)

import beit_fast_main
from beit_fast import cli
from faults import fired, fired_at
from faulty_ranks import ARGUMENTS
from faulty_ranks import run as run_toy

# One after another in one folder: each goes on where the one before stopped.
STOPS = {
    "before step 1": ["1:1:told"],
    "to rank 0": ["0:2:term"],
    "to rank 1": ["1:4:usr1"],
    "to both": ["0:5:term", "1:5:term"],
    "to both, twice": ["0:6:twice", "1:6:twice"],
    "in a save": ["0:8:term_in_save"],
    "in the wait of rank 1": ["1:15:told"],
    "to both, in the wait of rank 1": ["1:17:wait"],
}


def command(output: Path, faults: list[str], rank: int | None, port: int) -> int:
    """The process that runs it; `rank` is None of one alone."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(output.parent / f"stderr_{rank or 0}", os.O_WRONLY | os.O_CREAT), 2)
    if rank is not None:
        launch = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in launch.items()} | {"MASTER_ADDR": "localhost"}
    cli.WITHOUT_RECIPE["toy"] = (ARGUMENTS.parse_args, lambda: run_toy)
    sys.argv[1:] = ["toy", str(output), *faults, "--settle", "0.1", "--steps", "18"]
    try:
        os._exit(beit_fast_main.main())
    finally:
        os._exit(99)  # it did not come here


def run_once(output: Path, faults: list[str], ranks: list[int | None]) -> dict:
    for old in output.parent.glob("stderr_*"):
        old.unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = [command(output, faults, rank, port) for rank in ranks]
    came = None
    if faults and faults[0].endswith(":wait"):
        until = time.monotonic() + 30
        while not fired(output)[faults[0]] and time.monotonic() < until:
            time.sleep(0.01)
        came = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    ended = time.time()
    came = came or max((fired_at(output, f) for f in faults if fired(output)[f]), default=ended)
    said = [(output.parent / f"stderr_{r or 0}").read_text() for r in ranks]
    return {"codes": codes, "said": "".join(said), "seconds": ended - came}


def main(folder: Path) -> int:
    run = folder / "run"
    results = {stop: run_once(run, faults, [0, 1]) for stop, faults in STOPS.items()}
    results["the rest"] = run_once(run, [], [0, 1])
    results["whole"] = run_once(folder / "whole", [], [0, 1])
    results["alone"] = run_once(folder / "alone", ["0:5:term"], [None])
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
