"""How we time: candidates take turns, so that what slows the machine slows them all alike.

A round runs every candidate once; a ratio compares two candidates within a round. Reported are
medians over rounds, and the spread: half the distance between the quartiles, as a share.
"""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

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
) -> dict[str, Timing]:
    """Time each candidate `rounds` times, taking turns, after `warmup` calls of each.

    A sample is the mean of `calls` calls (more than one for what is near the clock's resolution).
    The order within a round alternates, so that no candidate always follows the same one.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    rounds_ms: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for name in order:
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                candidates[name]()
            _synchronize(device)
            rounds_ms[name].append(1e3 * (time.perf_counter() - start) / calls)
        order.reverse()
    return {name: Timing(tuple(values)) for name, values in rounds_ms.items()}


def conditions(device: torch.device, packages: Iterable[str] = (), **settings: object) -> dict:
    """What a number depends on: machine, threads, versions, commit, and the given settings."""
    is_cuda = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        **settings,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", *packages)},
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


def write_results(path: Path, rows: list[dict], values: dict) -> None:
    """CSV with the conditions in every row, so that a row can be quoted alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *values])
        writer.writeheader()
        writer.writerows({**row, **values} for row in rows)


def _spread(values: Iterable[float]) -> float:
    values = list(values)
    if len(values) < 2:
        return float("nan")
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    here = Path(__file__).parent
    commands = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
    head, changes = (
        subprocess.run(["git", *c], cwd=here, capture_output=True, text=True).stdout.strip()
        for c in commands
    )
    return (head or "unknown") + ("+changes" if changes else "")
