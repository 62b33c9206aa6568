"""A SLURM of one machine: `srun`, `scontrol`, `squeue`, `scancel` as a job script meets them.

`Slurm(folder).start(script, *arguments)` is a job's start by `slurmctld`: from a copy in a spool
folder, with SLURM's variables, the nodes being processes of this machine. The four commands are
this file under other names. They refuse options that are not listed here and, as the real ones do,
to work outside a job. srun gives a task one core unless it is told otherwise, which is refused
here, and kills its tasks where it gets SIGTERM.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

COMMANDS = ("srun", "scontrol", "squeue", "scancel")
SRUN_OPTIONS = frozenset(("--export", "--cpus-per-task", "--kill-on-bad-exit", "--wait"))
JOB_ID = 4711


@dataclass
class Slurm:
    """`gpus` are the ranks of a node; `folder` holds the job's state, `bin` leads its PATH."""

    folder: Path
    nodes: int = 2
    gpus: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bin, self.spool = self.folder / "bin", self.folder / "spool"
        for folder in (self.bin, self.spool):
            folder.mkdir(parents=True)
        for name in COMMANDS:
            self.program(name, f'exec {sys.executable} {Path(__file__)} {name} "$@"')
        self.write(state="PENDING", requeued=0, tasks=[])

    def program(self, name: str, shell: str) -> None:
        """A command of that name for the job."""
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{shell}\n")
        path.chmod(0o755)

    def write(self, **changes: object) -> None:
        _write(self.folder, changes)

    @property
    def job(self) -> dict:
        return _read(self.folder)

    def start(self, script: Path, *arguments: str, cwd: Path) -> subprocess.Popen:
        """The batch script on the first node; what it prints is in `folder`/output."""
        copy = Path(shutil.copy(script, self.spool / "slurm_script"))
        copy.chmod(0o755)
        self.write(state="RUNNING", tasks=[])
        told = dict(
            option.partition("=")[::2]
            for option in re.findall(r"^#SBATCH --(\S+)", Path(script).read_text(), re.MULTILINE)
        )
        variables = {
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": f"localhost[1-{self.nodes}]",
            "SLURM_NNODES": self.nodes,
            "SLURM_CPUS_PER_TASK": told["cpus-per-task"],
            "SLURM_GPUS_ON_NODE": self.gpus,
            "FAKE_SLURM": self.folder,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }
        with (self.folder / "output").open("a") as output:
            return subprocess.Popen(
                [str(copy), *arguments],
                cwd=cwd,
                env=os.environ | self.environment | {k: str(v) for k, v in variables.items()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def tell(self, signum: signal.Signals) -> None:
        """The signal of `--signal=...` without `B:`, to all processes of the step alone."""
        _signal_step(self.job, signum)

    def preempt(self, *, whole_step: bool = True) -> None:
        """SIGTERM as a period of grace begins: to the step, not to the batch script.

        whole_step: to every process of it, or to each task's first alone.
        """
        _signal_step(self.job, signal.SIGTERM, whole_step)

    def end(self, process: subprocess.Popen) -> None:
        """Kill whatever is left of a job."""
        for pid in [*self.job["tasks"], process.pid]:
            for one in [*_below(pid), pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
        process.wait()


# --- the job's state, in one file ----------------------------------------------------------------


def _read(folder: Path) -> dict:
    path = folder / "job.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(folder: Path, changes: dict) -> None:
    path = folder / "job.json"
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(_read(folder) | changes))
    part.replace(path)


def _below(pid: int) -> list[int]:
    """All processes that descend from one: SLURM finds them by their control group."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def _signal_step(job: dict, signum: int, whole_step: bool = True) -> None:
    for pid in job["tasks"]:
        for one in [pid, *(_below(pid) if whole_step else ())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signum)


# --- the commands --------------------------------------------------------------------------------


def srun(folder: Path, arguments: list[str]) -> int:
    options = {}
    while arguments and arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        options[name] = value
    if unknown := options.keys() - SRUN_OPTIONS:
        return _refuse("srun", f"unrecognized option {sorted(unknown)}")
    if options.get("--cpus-per-task") != os.environ["SLURM_CPUS_PER_TASK"]:
        return _refuse("srun", "a task would get one core, for --cpus-per-task is sbatch's alone")
    nodes = int(os.environ["SLURM_NNODES"])
    tasks = [
        subprocess.Popen(
            arguments,
            env=os.environ | {"SLURM_NODEID": str(n), "SLURM_PROCID": str(n), "SLURM_STEP_ID": "0"},
            start_new_session=True,
        )
        for n in range(nodes)
    ]
    _write(folder, {"tasks": [task.pid for task in tasks]})

    def abort(signum: int, frame: object) -> None:
        print("srun: forcing job termination", flush=True)
        for task in tasks:
            for pid in [*_below(task.pid), task.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, abort)
    ended: float | None = None
    while any(task.poll() is None for task in tasks):
        if ended is None and any(task.poll() is not None for task in tasks):
            ended = time.monotonic()
        if ended is not None and time.monotonic() > ended + float(options["--wait"]):
            abort(signal.SIGTERM, None)
        time.sleep(0.02)
    codes = [task.returncode for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(folder: Path, arguments: list[str]) -> int:
    match arguments:
        case ["show", "hostnames", nodelist]:
            last = int(re.fullmatch(r"localhost\[1-(\d+)\]", nodelist)[1])
            print("\n".join(["127.0.0.1", *(f"localhost{n}" for n in range(2, last + 1))]))
            return 0
        case ["requeue", job] if job == str(JOB_ID):
            _write(folder, {"state": "PENDING", "requeued": _read(folder)["requeued"] + 1})
            return 0
    return _refuse("scontrol", f"invalid: {arguments}")


def squeue(folder: Path, arguments: list[str]) -> int:
    if arguments != ["--noheader", f"--jobs={JOB_ID}", "--format=%T"]:
        return _refuse("squeue", f"invalid: {arguments}")
    print(_read(folder)["state"])
    return 0


def scancel(folder: Path, arguments: list[str]) -> int:
    option, job = arguments
    if job != str(JOB_ID) or not option.startswith("--signal="):
        return _refuse("scancel", f"invalid: {arguments}")
    _signal_step(_read(folder), getattr(signal, f"SIG{option.removeprefix('--signal=')}"))
    return 0


def _refuse(name: str, why: str) -> int:
    print(f"{name}: error: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    if "SLURM_JOB_ID" not in os.environ:
        sys.exit(_refuse(command, "there is no job"))
    sys.exit(globals()[command](Path(os.environ["FAKE_SLURM"]), given))
