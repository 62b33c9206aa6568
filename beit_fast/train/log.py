"""Metrics stay on the device between log lines; a line goes to the terminal, JSON and TensorBoard.

`metrics.jsonl` holds one object a line, an evaluation on a line of its own. After a resume the
lines past the checkpoint are cut, so none is doubled, and damaged ones are in `metrics.damaged`.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from beit_fast.files import describe, naming, open_no_link, replace_file
from beit_fast.train.scalars import Scalars
from beit_fast.train.world import World

METRICS, DAMAGED = "metrics.jsonl", "metrics.damaged"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
logger = logging.getLogger("beit_fast.train")


class _Plain(Console):
    """Whose errors are standard output's, that nobody reads any more among them: rich would end the
    process then, without a word and with what was trained unsaved."""

    def print(self, *objects: Any, **options: Any) -> None:
        with naming("standard output"):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True  # told once
        raise


def plain_console(*, quiet: bool = False) -> Console:
    """A terminal that gets text as it is: in paths and names, brackets and colons are no markup."""
    return _Plain(highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=quiet)


class Meter:
    """Sums of metrics since the last reading, on the device; steps that were skipped count apart.

    `state` and `load_state` carry an unread window through a checkpoint, so that a resumed run
    prints the numbers of a run that was never stopped.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: tuple[str, ...] = ()
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)  # of the names, in order
        self._count = 0  # of all steps
        self._skipped = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, lost: Tensor | None = None, **metrics: Tensor) -> None:
        """Add one scalar tensor a name, the same names in each step of a window. lost: (), 1 for a
        step that is skipped, whose metrics may be anything; None or 0 for others."""
        if not self._count:
            self._names = tuple(sorted(metrics))
            self._sums = torch.zeros(len(metrics), dtype=torch.float64, device=self._device)
        values = torch.stack([metrics[name].detach() for name in self._names]).double()
        if lost is not None:
            values = torch.where(lost > 0, 0.0, values)
            self._skipped += lost
        self._sums += values
        self._count += 1

    def means(self) -> dict[str, Tensor]:
        """The means on the device, and where steps were skipped how many, `skipped`. The window
        starts afresh. No mean where all were. Syncs."""
        skipped = int(self._skipped)
        means = {}
        if self._count > skipped:
            quotients = self._sums / (self._count - skipped)
            means = dict(zip(self._names, quotients.unbind(), strict=True))
        if skipped:
            means["skipped"] = self._skipped.clone()
        self._count = 0
        self._skipped.zero_()
        return means

    def window(self) -> dict[str, float]:
        """The sums of this rank. Syncs."""
        return dict(zip(self._names, self._sums.tolist(), strict=True)) if self._count else {}

    def state(self, world: World) -> dict[str, Tensor]:
        """The window of all ranks: sums fp64 (R,), counts (). Called on every rank; syncs."""
        of_ranks = world.gather(mine := self.window())
        skipped, state = int(self._skipped), {}
        for name in mine:
            of_each = [window[name] for window in of_ranks]
            state[f"meter_sum/{name}"] = torch.tensor(of_each, dtype=torch.float64)
            state[f"meter_count/{name}"] = torch.tensor(self._count - skipped)
        return state | ({"meter_skipped": torch.tensor(skipped)} if skipped else {})

    def load_state(self, tensors: Mapping[str, Tensor], world: World) -> None:
        """This rank's part of what `state` gave; on another number of ranks each has the mean.

        A single number, of a version that kept the main rank's alone, is taken by all.
        """
        skipped = int(tensors.get("meter_skipped", 0))
        self._skipped.fill_(skipped)
        sums = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "meter_sum":
                same = value.numel() == world.size
                sums[name] = value.flatten()[world.rank] if same else value.mean()
            elif kind == "meter_count":  # the same for all
                self._count = int(value) + skipped
        self._names = tuple(sorted(sums))
        values = [float(sums[name]) for name in self._names]
        self._sums = torch.tensor(values, dtype=torch.float64, device=self._device)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, one a step: a step's evaluation is a line of its own there.

    Lines that are damaged, or cut short by a crash or a full disk, are left out, with one warning
    that names them.
    """
    records: list[dict[str, Any]] = []
    lines, damaged = _read_lines(path)
    for _, record in lines:
        if records and records[-1]["step"] == record["step"]:
            records[-1] |= record
        else:
            records.append(record)
    if damaged:
        logger.warning("%s: %s, and left out", path, _are_damaged(damaged))
    return records


def _read_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], dict[int, bytes]]:
    """The lines of a `metrics.jsonl` with what they hold, and the damaged ones by number."""
    lines, damaged = [], {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            record = None
        if _is_record(record):
            lines.append((line, record))
        else:
            damaged[number] = line
    return lines, damaged


def _is_record(value: Any) -> bool:
    """Whether it is the numbers of a step."""
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    return all(type(number) in (int, float) for number in value.values())


def _are_damaged(lines: Iterable[int]) -> str:
    numbers = [str(number) for number in lines]
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    if len(numbers) == 1:
        return f"line {numbers[0]} is damaged"
    return f"lines {', '.join(numbers[:5])}{more} are damaged"


class Log:
    """Terminal, `metrics.jsonl` and TensorBoard of one run; silent on ranks other than 0."""

    def __init__(
        self, output: Path, *, title: str, start: int, num_steps: int, enabled: bool = True
    ) -> None:
        self._path, self._title, self._num_steps = output / METRICS, title, num_steps
        self._enabled = enabled
        self.console = plain_console(quiet=not enabled)
        self._done, self._images, self._since = start, 0, time.perf_counter()
        self._begun, self._start = self._since, start
        self._progress = None
        if not enabled:
            return
        with contextlib.suppress(FileNotFoundError):  # no link: a resume would replace it anyway
            os.close(open_no_link(self._path, os.O_RDONLY))
        self._keep_lines_up_to(start)
        self._board = Scalars(output / "tensorboard", start)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar = self._progress.add_task(title, total=num_steps, completed=start, speed="")
            self._progress.start()

    def _keep_lines_up_to(self, step: int) -> None:
        """Cut what comes after that step. Damaged lines, which may be of any, are set aside."""
        if not self._path.exists():
            return
        lines, damaged = _read_lines(self._path)
        if damaged:
            aside = self._path.with_name(DAMAGED)
            with naming(aside), open(aside, "ab", opener=open_no_link) as file:
                file.writelines(line + b"\n" for line in damaged.values())
            said = _are_damaged(damaged)
            logger.warning("%s: %s: moved to %s, the others count", self._path, said, aside.name)
        text = b"".join(line + b"\n" for line, record in lines if record["step"] <= step)
        replace_file(self._path, lambda file: file.write(text))

    def tick(self, num_images: int) -> None:
        """One optimiser step over `num_images` images has been launched."""
        self._done += 1
        self._images += num_images
        if self._progress is not None:
            self._progress.update(self._bar, completed=self._done)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent in here does not count against the training's speed."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begun

    def line(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the means of the steps since the last line; call after a device sync.

        Raises OSError as `_write` does, when all is done that can be.
        """
        now = time.perf_counter()
        speed = self._images / max(1e-9, now - self._since)
        self._images, self._since = 0, now
        if not self._enabled:
            return
        left = (now - self._begun) / (step - self._start) * (self._num_steps - step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        text += f"  {speed:.0f} images/s  {_clock(left)} left"
        if self._progress is not None:
            self._progress.update(self._bar, speed=f"{speed:.0f} images/s")
        self._write(step, {**metrics, "images_per_second": speed}, text)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write what an evaluation after `step` came to. Raises as `line` does."""
        if not self._enabled:
            return
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._write(step, values, text)

    def _write(self, step: int, values: Mapping[str, float], text: str) -> None:
        """Into both files, and to the terminal, whichever of them fails. Raises OSError of the
        first that does, with its path, and for a full disk with the room there is."""
        failed = []
        for write, what in ((self._append, values), (self._board.write, values), (self._say, text)):
            try:
                write(step, what)
            except OSError as error:
                failed.append(error)
        if not failed:
            return
        if failed[0].errno not in FULL:
            raise failed[0]
        free = shutil.disk_usage(self._path.parent).free / 2**20
        raise OSError(f"{describe(failed[0])} ({free:.0f} MiB free): make room") from failed[0]

    def _say(self, step: int, text: str) -> None:
        self.console.print(f"{self._title} {step}/{self._num_steps}  {text}", soft_wrap=True)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        """A line of its own, also behind one that a full disk cut short."""
        with naming(self._path), open(self._path, "ab+", opener=open_no_link) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps({"step": step, **values}).encode() + b"\n")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
