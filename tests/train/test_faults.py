"""Ranks that die, hang or fail: all end in time, one says why, and torchrun's restarts go on."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults import fired, fired_at
from task_runs import SUPPORT, TWO_RANKS, assert_the_same_run, steps_of

pytestmark = pytest.mark.promise("R18", "R19")
SCRIPT = str(SUPPORT / "faulty_ranks.py")
TIMEOUT = 3.0
# Seconds from a fault to the end of a rank that hangs: its last sign was 0.6 s before, by a clock
# that ticks by 0.25 s.
HANGS = (TIMEOUT - 1.0, TIMEOUT + 2.0)


class Started:
    """Processes of faulty_ranks.py; `ended` has when each was gone, by its number."""

    def __init__(self, output: Path) -> None:
        self.output, self.ended = output, {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    @contextmanager
    def looking(self):
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            pids = self.output / "pids"
            for pid in map(int, pids.read_text().split() if pids.exists() else ()):
                if pid not in self.ended and not _runs(pid):
                    self.ended[pid] = time.time()

    def seconds(self, fault: str) -> float:
        """From the fault until all processes of that time were gone."""
        came = fired_at(self.output, fault)
        return min(max(pair) for pair in _pairs(self.ended.values()) if max(pair) > came) - came


def _pairs(times):
    times = sorted(times)
    return list(zip(times[::2], times[1::2], strict=True))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def by_torchrun(output: Path, *arguments: str, restarts: int = 0) -> tuple[Started, int, str]:
    """What was started, torchrun's code, and what stderr has."""
    started = Started(output)
    command = [*TWO_RANKS, f"--max-restarts={restarts}", SCRIPT, str(output), *arguments]
    with started.looking():
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        time.sleep(0.2)
    return started, done.returncode, done.stderr


@contextmanager
def by_hand(output: Path, *arguments: str, ranks=(0, 1), **variables: str):
    """Ranks without a launcher: rank 0 has the store."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port} | variables
    output.parent.mkdir(exist_ok=True)
    files = [(output.parent / f"stderr_{rank}").open("w") for rank in ranks]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(output), *arguments],
            env={**os.environ, **given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=file,
            stdout=subprocess.DEVNULL,
        )
        for rank, file in zip(ranks, files, strict=True)
    ]
    try:
        yield processes
    finally:
        for file in files:
            file.close()
        for process in processes:
            process.kill()
            process.wait()


def stderr_of(output: Path, rank: int) -> str:
    return (output.parent / f"stderr_{rank}").read_text()


def said(stderr: str) -> list[str]:
    """The lines of ours, those of the launcher's table not among them."""
    return [line for line in stderr.splitlines() if line.startswith("beit-fast: ")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that is slow for twice the time-out in one step, and lives."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    with by_hand(output, "1:5:slow", "--timeout", str(TIMEOUT)) as processes:
        assert [process.wait(90) for process in processes] == [0, 0]
    assert said(stderr_of(output, 0) + stderr_of(output, 1)) == []
    assert fired(output) == {"1:5:slow": 1}
    return output


def test_what_is_restarted_after_each_fault_ends_bit_equal(tmp_path, undisturbed):
    faults = ["1:5:kill", "0:6:kill", "1:9:loader"]
    limits = ("--timeout", str(TIMEOUT))
    output = tmp_path / "run"
    started, code, stderr = by_torchrun(output, *faults, *limits, restarts=len(faults))
    assert code == 0, stderr
    assert fired(output) == dict.fromkeys(faults, 1)
    assert_the_same_run(output, undisturbed)

    one, two, hung = said(stderr)
    again = "the same command goes on from the last checkpoint"
    gone = "is gone without a word (killed, or cut off) at step"
    assert one == f"beit-fast: rank 1 {gone} 5: {again}"
    assert two == f"beit-fast: rank 0 {gone} 6: {again}"
    stacks = output / "stacks_rank1.txt"
    assert hung == (
        f"beit-fast: no progress for 3 s at step 9: rank 1 is waiting for a batch, and rank 0 "
        f"waits for it. Stacks: {stacks}. The same command goes on from the last checkpoint; how "
        "long a run may stand still is --run.timeout, and --run.startup_timeout until its first "
        "step is done"
    )
    assert "in hang\n" in stacks.read_text()
    assert max(map(started.seconds, faults[:2])) < 4
    assert HANGS[0] < started.seconds(faults[2]) < HANGS[1]


@pytest.mark.promise("R21")
def test_an_error_of_one_rank_is_said_once_with_its_rank(tmp_path):
    faults = ["1:3:oom_backward", "1:5:error"]
    started, code, stderr = by_torchrun(tmp_path / "run", *faults, restarts=1)
    assert code == 1
    assert fired(tmp_path / "run") == dict.fromkeys(faults, 1)
    memory, disk = said(stderr)
    assert memory.startswith("beit-fast: rank 1 of 2: memory ran out (CUDA out of memory. Tried")
    assert "at step 3, in the backward pass, which exchanges gradients: 1 x 4 images" in memory
    assert started.seconds(faults[0]) < 4
    assert disk == "beit-fast: rank 1 of 2: a disk of this node is gone: mount it"
    assert steps_of(tmp_path / "run") == [2, 4]
    table = re.findall(r"traceback : (.*)", stderr)
    assert table == [  # the launcher's: the cause is the last
        "ended because the run could not go on: another rank says why",
        "beit-fast: a disk of this node is gone: mount it",
    ]


def test_a_rank_that_cannot_run_python_ends_itself(tmp_path):
    """An extension keeps its lock: no signal handler and no thread of ours runs any more."""
    output = tmp_path / "run"
    with by_hand(output, "1:5:lock", "--timeout", str(TIMEOUT)) as (first, second):
        assert [first.wait(90), second.wait(10)] == [1, 1]
        ended = time.time() - fired_at(output, "1:5:lock")
    assert HANGS[0] < ended < HANGS[1]
    (line,) = said(stderr_of(output, 0) + stderr_of(output, 1))
    assert "at step 5: rank 1 gives no sign any more, last seen in the forward pass: it" in line
    assert "in hang_with_lock\n" in stderr_of(output, 1)  # faulthandler's timer


def test_ranks_notice_that_the_store_went_with_rank_0(tmp_path):
    with by_hand(tmp_path / "run", "0:3:kill") as (first, second):
        assert second.wait(60) == 1
        assert first.wait() == -signal.SIGKILL
    assert fired(tmp_path / "run") == {"0:3:kill": 1}
    (line,) = said(stderr_of(tmp_path / "run", 1))
    assert re.fullmatch(
        r"beit-fast: rank 1 of 2: the store at localhost:\d+ does not answer any more, nor do "
        r"other ranks \(at step 3\): the same command goes on from the last checkpoint",
        line,
    )


def test_a_rank_that_hangs_with_the_store_is_left_alone(tmp_path):
    with by_hand(tmp_path / "run", "0:3:stop", "--timeout", str(TIMEOUT)) as (first, second):
        assert second.wait(60) == 1
        assert first.poll() is None
    assert fired(tmp_path / "run") == {"0:3:stop": 1}
    (line,) = said(stderr_of(tmp_path / "run", 1))
    assert "rank 1 is in the backward pass, which exchanges gradients; the store at" in line
    assert "does not answer" in line
