"""What is told and kept of bad steps: a warning, a file for each, and the error that ends a run.

    RUN/bad_steps/step_00000007.json    what every rank met there: losses, samples, seeds, gradients

Samples are noted as batches come, on the host, for the steps since the last check.
"""

import json
import logging
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.errors import RunError
from beit_fast.files import replace_file
from beit_fast.flags import flag
from beit_fast.train.aside import Aside
from beit_fast.train.config import RunConfig
from beit_fast.train.prefetch import Batch
from beit_fast.train.saving import Saver
from beit_fast.train.seeds import step_seed
from beit_fast.train.sentinel import Noted, read_note
from beit_fast.train.state import checkpoint_paths, environment
from beit_fast.train.task import Task
from beit_fast.train.world import World

FOLDER = "bad_steps"
FORMAT = 1
SHOWN = 6  # steps and samples that a line names; the files have all
MOST = 256  # steps between two checks
logger = logging.getLogger("beit_fast.train")


class NonFiniteLoss(RunError):
    """So many steps in a row were bad that the run ends; none of them was taken."""


def record_path(output: Path, step: int) -> Path:
    """Where what is known of step `step`, from 1, is kept."""
    return output / FOLDER / f"step_{step:08d}.json"


def read_record(path: Path) -> dict[str, Any]:
    """What a file of a bad step holds. Raises ValueError for one that is damaged, OSError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is of another version, or damaged: remove it")
    return record


def label_parameters(
    model: nn.Module, groups: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Name and group of each parameter of an optimiser, in its order.

    A group is a part of the model (`blocks.3`, `head`), apart for what is decayed and what is not.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    labelled = []
    for group in groups:
        decays = "decay" in group or float(group["weight_decay"]) > 0
        for parameter in group["params"]:
            name = names[id(parameter)]
            part = _part(name)
            labelled.append((name, f"{part} {'decay' if decays else 'no_decay'}"))
    return labelled


def _part(name: str) -> str:
    """Where a parameter of this name is: up to the first number, else the outermost module."""
    modules = name.split(".")[:-1] or [name]
    depth = next((i for i, module in enumerate(modules, 1) if re.search(r"\d", module)), 1)
    return ".".join(modules[:depth])


class BadSteps:
    """Reads at each check, on every rank, what the sentinel noted, and tells of it.

    start: steps that are done; row: of the last of them, how many in a row were bad.
    """

    def __init__(
        self,
        task: Task,
        groups: Sequence[Mapping[str, Any]],
        run: RunConfig,
        world: World,
        aside: Aside,
        *,
        start: int,
        row: int = 0,
    ) -> None:
        self._task, self._run = task, run
        self._world, self._aside, self._output = world, aside, Path(run.output)
        self._labels = label_parameters(task.model, groups)
        self._samples: deque[tuple[int, Tensor | None]] = deque(maxlen=MOST * run.accumulate)
        self._watched: list[Tensor] = []  # of the steps since the last check
        self._checked, self._row, self._row_start = start, row, start - row
        self.in_row = False  # whether the last step that was checked was bad

    def noting(self, batches: Iterator[Batch], start: int) -> Iterator[Batch]:
        """`batches`, of which the first is micro-batch number `start`; closing this closes them."""
        try:
            for number, batch in enumerate(batches, start):
                self._samples.append((number, batch.get("sample_index")))
                yield batch
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def add(self, watched: Tensor) -> None:
        """What the sentinel noted of the next step."""
        self._watched.append(watched)

    @property
    def is_full(self) -> bool:
        """Whether a check is due, whatever else is."""
        return len(self._watched) >= MOST

    def check(self, saver: Saver) -> None:
        """Tell of the steps since the last check that were skipped; called on every rank. Syncs.

        Raises NonFiniteLoss, on every rank, where too many in a row were bad. The checkpoints that
        it names are on the disk: raises as `Saver.wait` does.
        """
        since, accumulate = self._checked, self._run.accumulate
        rows = torch.stack(self._watched).tolist() if self._watched else []
        done, self._watched, self._checked = since + len(rows), [], since + len(rows)
        noted = {}
        for step, values in enumerate(rows, since):
            if self._row >= self._run.bad_steps:
                break
            if not values[0]:
                self._row = 0
                continue
            self._row_start = self._row_start if self._row else step
            self._row += 1
            noted[step] = read_note(values, accumulate)
        self.in_row = self._row > 0
        if not noted:
            return
        ends = self._row >= self._run.bad_steps
        kept = saver.wait() if ends else []
        records = self._records(noted)
        if ends:
            raise NonFiniteLoss(self._message(records, since, done, kept))
        self._warn(records)

    def _records(self, noted: Mapping[int, Noted]) -> list[dict[str, Any]]:
        """Of all ranks, put together and written by the main one; on every rank."""
        samples = dict(self._samples)
        accumulate, mine = self._run.accumulate, []
        for step, note in noted.items():
            batches = [samples.get(step * accumulate + a) for a in range(accumulate)]
            ids = [None if batch is None else batch.tolist() for batch in batches]
            seed = step_seed(self._run.seed, step, self._world.rank)
            mine.append((asdict(note) | {"step": step}, ids, seed))
        of_ranks = self._world.gather(mine)
        records = [self._record(list(of_each)) for of_each in zip(*of_ranks, strict=True)]
        if self._world.is_main:
            with self._aside.work(f"writing {self._output / FOLDER}"):
                for record in records:
                    self._write(record)
        return records

    def _record(self, of_ranks: list[tuple[dict[str, Any], list, int]]) -> dict[str, Any]:
        """Of one step: what each rank noted, its samples, its seed."""
        first, step = of_ranks[0][0], of_ranks[0][0]["step"] + 1
        squares: dict[str, float] = {}
        wrong = []
        in_parts = self._world.size > 1 and self._run.parallel == "fsdp"
        for place, (name, group) in enumerate(self._labels):
            norms = [noted["grad_norms"][place] for noted, _, _ in of_ranks]
            square = sum(n**2 for n in (norms if in_parts else norms[:1]))
            squares[group] = squares.get(group, 0.0) + square
            if not math.isfinite(square):
                wrong.append(name)
        return {
            "format": FORMAT,
            "step": step,
            "why": _why(of_ranks),
            "loss": plain(sum(noted["own_loss"] for noted, _, _ in of_ranks) / len(of_ranks)),
            "grad_norm": plain(first["grad_norm"]),
            "mean_before": plain(first["mean"]),
            "deviation_before": plain(first["deviation"]),
            "grad_norms": {group: plain(math.sqrt(s)) for group, s in squares.items()},
            "gradients_not_finite": wrong,
            "ranks": [self._of_rank(*of_rank) for of_rank in of_ranks],
            "world_size": self._world.size,
            "accumulate": self._run.accumulate,
            "seed": self._run.seed,
        }

    def _of_rank(self, noted: dict[str, Any], ids: list, seed: int) -> dict[str, Any]:
        batches = []
        for loss, samples in zip(noted["losses"], ids, strict=True):
            files = None if samples is None else [self._task.sample_name(i) for i in samples]
            batches.append({"loss": plain(loss), "samples": samples, "files": files})
        return {"loss": plain(noted["own_loss"]), "step_seed": seed, "micro_batches": batches}

    def _write(self, record: dict[str, Any]) -> None:
        path = record_path(self._output, record["step"])
        path.parent.mkdir(exist_ok=True)
        paths = checkpoint_paths(self._output)
        before = [p for p in paths if p.name < f"step_{record['step']:08d}"]
        further = {
            "checkpoint": str(before[-1]) if before else None,
            "replay": self._command(record["step"]),
            "environment": environment(),
        }
        text = json.dumps(record | further, indent=1, allow_nan=False)
        replace_file(path, lambda file: file.write(text.encode()))

    def _command(self, step: int) -> str:
        return f"beit-fast replay {self._output} {step}"

    def _warn(self, records: list[dict[str, Any]]) -> None:
        if not self._world.is_main:
            return
        told = [f"step {r['step']} ({_told(r)})" for r in records[:SHOWN]]
        more = f", and {len(records) - len(told)} more" if len(records) > len(told) else ""
        verb = "was" if len(records) == 1 else "were"
        logger.warning(
            "%s%s %s skipped: no weight was changed; see %s",
            *(", ".join(told), more, verb, self._output / FOLDER),
        )

    def _message(
        self, records: list[dict[str, Any]], since: int, done: int, kept: list[Path]
    ) -> str:
        wanted = self._run.bad_steps
        finite = all(record["why"] == "spike" for record in records)
        what = "loss is a spike" if finite else "loss or gradient norm is not finite"
        if wanted == 1:
            where = f"between steps {since + 1} and {done}, first at step {self._row_start + 1}"
        else:
            where = f"in {wanted} steps in a row, first at step {self._row_start + 1}"
        text = f"{what} {where}: no weight was changed from there on. "
        text += f"The last good checkpoint is {kept[-1]}. " if kept else "There is no checkpoint. "
        last = records[-1]
        text += (
            f"What was met is in {record_path(self._output, last['step'])} ({_told(last)}), and "
            f"`{self._command(last['step'])}` says in which module. "
        )
        back = f"go back with {flag('run.resume_from')} ({_steps(kept)}), or "
        back = back if len(kept) > 1 else ""
        bear = f", or let it pass ({flag('run.spike')} larger or null)" if finite else ""
        return text + (
            f"The same command meets the same numbers: lower {flag('optim.lr')}, lengthen the "
            f"warm-up ({flag('optim.warmup_steps')}) or clip harder ({flag('optim.clip_grad')})"
            f"{bear}, and it goes on from there. Where that ends here again, the weights had gone "
            f"off before: {back}start over in another {flag('run.output')}"
        )


def _why(of_ranks: Sequence[tuple[dict[str, Any], list, int]]) -> str:
    if not all(math.isfinite(noted["own_loss"]) for noted, _, _ in of_ranks):
        return "loss"
    if not all(math.isfinite(noted["grad_norm"]) for noted, _, _ in of_ranks):
        return "gradients"
    return "spike"


def _told(record: Mapping[str, Any]) -> str:
    """What was bad of a step and where, with the samples that whoever is to blame had."""
    ranks = record["ranks"]
    if record["why"] == "gradients":
        wrong = record["gradients_not_finite"]
        whose = f" (of {_some(wrong)})" if wrong else ""
        return f"its loss was finite on every rank and its gradients were not{whose}"
    if record["why"] == "spike":
        mean, deviation = record["mean_before"], record["deviation_before"]
        blamed = max(range(len(ranks)), key=lambda rank: ranks[rank]["loss"])
        what = f"its loss was {record['loss']:.4g} after {mean:.4g} +- {deviation:.4g}, most of it "
        return f"{what}{_place([blamed], ranks)}"
    blamed = [rank for rank, of in enumerate(ranks) if isinstance(of["loss"], str)]
    return f"its loss was not finite {_place(blamed, ranks)}"


def _place(blamed: list[int], ranks: Sequence[Mapping[str, Any]]) -> str:
    """ "on rank 1, samples 3, 5": of the micro-batches with a bad loss there, else of all."""
    found: list[int] = []
    for rank in blamed:
        batches = ranks[rank]["micro_batches"]
        bad = [batch for batch in batches if isinstance(batch["loss"], str)] or batches
        found += [sample for batch in bad for sample in batch["samples"] or ()]
    which = f"rank{'s' * (len(blamed) > 1)} {_some(blamed)}"
    return f"on {which}" + (f", samples {_some(found)}" if found else "")


def _some(items: Sequence[Any]) -> str:
    text = ", ".join(map(str, items[:SHOWN]))
    return f"{text} ..." if len(items) > SHOWN else text


def plain(number: float) -> float | str:
    """JSON has no NaN: such numbers are words, "nan", "inf", "-inf"."""
    return number if math.isfinite(number) else str(number)


def _steps(paths: list[Path]) -> str:
    return ", ".join(str(int(path.name.removeprefix("step_"))) for path in paths)
