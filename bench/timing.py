"""How we time: candidates take turns, so that what slows the machine slows them all alike.

A round runs every candidate once; a ratio compares two candidates within a round. Reported are
medians over rounds, and the spread: half the distance between the quartiles, as a share.
"""

import csv
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each round."""

    rounds_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median."""
        return _spread(self.rounds_ms)

    def ratio(self, other: "Timing") -> tuple[float, float]:
        """(median, spread) over rounds of the other's time by this one's: above 1, this wins."""
        ratios = [o / s for o, s in zip(other.rounds_ms, self.rounds_ms, strict=True)]
        return statistics.median(ratios), _spread(ratios)


def time_interleaved(
    candidates: dict[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    calls: int = 1,
    wall: bool = False,
) -> dict[str, Timing]:
    """Time each candidate `rounds` times, taking turns, after `warmup` calls of each.

    A sample is the mean of `calls` calls (more than one for what is near the clock's resolution).
    On a GPU it is the time between two events of the stream, and the calls are queued behind a
    sleep: what Python takes to launch them does not count, as in a CUDA graph it would not. With
    `wall` it does: the time is that of the clock, from an idle GPU to an idle GPU.
    The order within a round alternates, so that no candidate always follows the same one.
    """
    queue_ms = {}
    for name, run in candidates.items():
        for _ in range(warmup):
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            queue_ms[name] = 1e3 * (time.perf_counter() - start)
    rounds_ms: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for name in order:
            sample = _sample_cuda if device.type == "cuda" and not wall else _sample_wall
            rounds_ms[name].append(sample(candidates[name], calls, queue_ms[name]) / calls)
        order.reverse()
    return {name: Timing(tuple(values)) for name, values in rounds_ms.items()}


def rates(
    candidates: dict[str, Callable[[int], object]], items: int, rounds: int, turn: int
) -> list[dict]:
    """Calls per second of each candidate on the numbers below `items`, `turn` of them at a time.

    Seconds are the CPU time of this thread. The order alternates: what a candidate leaves in the
    caches, another finds there.
    """
    for candidate in candidates.values():
        candidate(0)
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        seconds = dict.fromkeys(candidates, 0.0)
        for first in range(0, items, turn):
            for name in order:
                start = time.thread_time()
                for i in range(first, min(first + turn, items)):
                    candidates[name](i)
                seconds[name] += time.thread_time() - start
            order.reverse()
        for name in candidates:
            measured[name].append(items / seconds[name])
    return [
        {"case": name, "median": statistics.median(rate), "low": min(rate), "high": max(rate)}
        for name, rate in measured.items()
    ]


def fresh_compiler() -> None:
    """Forget all that is compiled, and let a compiled function never run eagerly instead.

    torch.compile gives a function eight versions in a process, however many of its wrappers share
    them (a million where timm is imported); from then on it runs eagerly, with a line on stderr,
    and its time is that of something else. So a case begins with none, and the ninth of one case
    raises: the candidate is an error with its reason. Nor does a second size become a program of
    any size. Call it before each case; what is wrapped already is compiled again when it is called.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.reset()


def reason_of(error: Exception) -> str:
    """Why a candidate has no time, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def failed_row(like: dict, reason: str, **known: object) -> dict:
    """The row of a candidate without a time: figures are nan, what is `known` is said."""
    figures = {n: math.nan if isinstance(v, float) else "" for n, v in like.items()}
    return {**figures, **known, "error": reason}


@dataclass(frozen=True)
class Roof:
    """What the machine reaches: bytes copied (read and written) and operations, a second."""

    bytes_per_second: float
    flops_per_second: float

    def floor_ms(self, num_bytes: float, num_flops: float) -> float:
        """The least time for so much traffic and arithmetic, if they overlap wholly."""
        return 1e3 * max(num_bytes / self.bytes_per_second, num_flops / self.flops_per_second)


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Copy and matrix product, measured now, on random data, large enough to fill the machine."""
    is_cuda = device.type == "cuda"
    size, side = (2**29, 8192) if is_cuda else (2**26, 1024)
    source = torch.randn(size, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timings = time_interleaved(
        {"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device=device, rounds=9
    )
    copied = 2 * source.numel() * source.element_size()
    return Roof(
        bytes_per_second=copied / timings["copy"].median_ms * 1e3,
        flops_per_second=2 * side**3 / timings["product"].median_ms * 1e3,
    )


def conditions(device: torch.device, packages: Iterable[str] = (), **settings: object) -> dict:
    """What a number depends on: machine, threads, versions, commit, and the given settings."""
    is_cuda = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        **settings,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", *packages)},
        "commit": _commit(),
    }


def conditions_line(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def format_table(rows: list[dict]) -> str:
    """Rows of one set of columns as aligned text; numbers with three significant digits."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def format_results(rows: list[dict], name: str) -> str:
    """`format_table` of what has a time, then the reasons of what is missing, by column `name`."""
    timed = [row for row in rows if not math.isnan(row["ms"])]
    lines = [format_table([{n: v for n, v in row.items() if n != "error"} for row in timed])]
    for row in rows:
        if row["error"]:
            lines.append(f"{'' if row in timed else 'no '}{row[name]}: {row['error']}")
    return "\n".join(lines)


def write_results(path: Path, rows: list[dict], values: dict) -> None:
    """CSV with the conditions in every row, so that a row can be quoted alone.

    A run that is killed meanwhile leaves the file as it was.
    """
    write_whole(path, lambda file: _write_csv(file, rows, values))


def write_whole(path: Path, write: Callable[[TextIO], object]) -> None:
    """`write` to a file that takes the place of `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            write(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_csv(file: TextIO, rows: list[dict], values: dict) -> None:
    writer = csv.DictWriter(file, [*rows[0], *values])
    writer.writeheader()
    writer.writerows({**row, **values} for row in rows)


def _spread(values: Iterable[float]) -> float:
    values = list(values)
    if len(values) < 2:
        return float("nan")
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def _sample_wall(run: Callable[[], object], calls: int, _queue_ms: float) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def _sample_cuda(run: Callable[[], object], calls: int, queue_ms: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e6 * (1.5 * queue_ms + 0.5)))  # cycles at about 2 GHz
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """Short name of the commit, and whether there are changes; "unknown" without git or history."""
    head = _git("rev-parse", "--short", "HEAD")
    # What a bench wrote before is no change of what is measured.
    changes = _git("status", "--porcelain", "--", ":(top)", ":(top,exclude)bench/results")
    return (head or "unknown") + ("+changes" if changes else "")


def _git(*command: str) -> str:
    """What git answers, or nothing."""
    try:
        asked = subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:  # it is not installed, or may not be run
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""
