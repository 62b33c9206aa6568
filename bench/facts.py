"""Facts: what a run on a GPU finds out, a JSON line each, on disk before the next thing begins.

A line always has `run` (when the run started), `s` (seconds since), `kind` and `stage`; the rest by
kind:

    begin     item                                  what happens now; a crash is its fault
    figure    item figure value unit [floor ratio spread ...]
                                                    a measurement; `floor` in the same unit, `ratio`
                                                    a peer's time by ours (above 1, ours is faster)
    check     item figure value allowed right       an error against fp64, bits that must be equal
    error     item error                            what went wrong, in a line
    cut       item                                  what was at work when the time was over
    note      item and whatever is told             machine, versions, commit, a kernel's share
    end       ended seconds limit                   how a stage ended, from the driver

Units are ms, s, images/s, GB/s, TFLOP/s, GiB and launches. Which way is better follows from it.
"""

import json
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

Fact = dict[str, Any]
HIGHER_IS_BETTER = frozenset({"images/s", "GB/s", "TFLOP/s"})
PREDICTIONS = Path(__file__).parent / "predictions.json"


class Facts:
    """The open end of a file of facts. Appending a line is all that it does; nothing is lost by a
    process that dies after it."""

    def __init__(self, path: Path, run: str, stage: str, skip: frozenset[str] = frozenset()):
        """`skip`: items that are not begun, because an earlier attempt of the stage did."""
        self._path, self._run, self._stage, self._skip = path, run, stage, skip
        self._start = time.perf_counter()

    def say(self, kind: str, **rest: object) -> None:
        spent = round(time.perf_counter() - self._start, 1)
        fact = {"run": self._run, "s": spent, "kind": kind, "stage": self._stage, **rest}
        line = json.dumps({name: _plain(value) for name, value in fact.items()})
        print(line, flush=True)
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else "\n" + line  # behind one cut short
            file.write(f"{line}\n".encode())

    def figure(self, item: str, figure: str, value: float, unit: str, **rest: object) -> None:
        """Raises ValueError for a value that is no number; what is none beside it is left out."""
        if not math.isfinite(value):
            raise ValueError(f"{figure} of {item} is {value}: no figure")
        rest = {n: v for n, v in rest.items() if not isinstance(v, float) or math.isfinite(v)}
        self.say("figure", item=item, figure=figure, value=value, unit=unit, **rest)

    def check(self, item: str, figure: str, value: float, allowed: float) -> None:
        """`value` is right up to `allowed`; NaN is not."""
        right = bool(value <= allowed)
        self.say("check", item=item, figure=figure, value=value, allowed=allowed, right=right)

    def attempt(self, item: str, run: Callable[[], object], *, alone: bool = False) -> bool:
        """Run one item; an error is a fact, and the next item goes on. Whether it was run to its
        end.

        Raises SystemExit where the process cannot run a next one: the device's context is gone,
        or the item says that it breaks the process where it fails (`alone`).
        """
        if item in self._skip:
            return False
        self.say("begin", item=item)
        try:
            run()
        except (Exception, SystemExit) as error:  # whatever it is, it is this item's alone
            traceback.print_exc()
            self.say("error", item=item, error=f"{type(error).__name__}: {error}"[:600])
            if alone or is_fatal(error):
                raise SystemExit(f"{item} failed, and its process cannot go on") from error
            return False
        return True


def is_fatal(error: BaseException) -> bool:
    """Whether no CUDA call of this process can work any more."""
    return any(
        part in str(error) for part in ("CUDA error", "illegal memory", "device-side assert")
    )


def read_facts(path: Path) -> list[Fact]:
    """All whole lines of a file; one that a kill cut short, or that is no fact, is left out."""
    facts = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            fact = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(fact, dict) and {"run", "kind", "stage"} <= fact.keys():
            facts.append(fact)
    return facts


# --- predictions ----------------------------------------------------------------------------------


def read_predictions(path: Path = PREDICTIONS) -> list[Fact]:
    return json.loads(path.read_text(encoding="utf-8"))["figures"]


def prediction_of(fact: Fact, predictions: list[Fact]) -> Fact | None:
    """The first whose pattern is that of the fact's "stage/item/figure" and whose unit is its."""
    name = f"{fact['stage']}/{fact['item']}/{fact['figure']}"
    return next(
        (p for p in predictions if p["unit"] == fact["unit"] and fnmatchcase(name, p["match"])),
        None,
    )


class Expected(NamedTuple):
    """A measured quantity beside the range that was predicted of it."""

    of: str  # "" for the value itself, "of the floor", or "times ours" of a peer
    measured: float
    low: float
    high: float
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        if self.low <= self.measured <= self.high:
            return "as predicted"
        return "better" if (self.measured > self.high) == self.higher_is_better else "worse"


def expected(fact: Fact, prediction: Fact | None, gpu: str) -> Expected | None:
    """What was predicted of a figure on the GPU of this name.

    A prediction is a range for each GPU whose name contains a key (`on`), the share of the floor
    that is reached (`of_floor`), or a peer's time by ours (`ratio`): the first of these that the
    fact can be held against. None: nothing was, or not of this GPU; `gpu` "" is a CPU.
    """
    if prediction is None or not gpu:
        return None
    for known, (low, high) in prediction.get("on", {}).items():
        if is_called(gpu, known):
            return Expected("", fact["value"], low, high, fact["unit"] in HIGHER_IS_BETTER)
    share = share_of_floor(fact)
    if "of_floor" in prediction and share is not None:
        return Expected("of the floor", share, *prediction["of_floor"], True)
    if "ratio" in prediction and fact.get("ratio"):
        return Expected("times ours", fact["ratio"], *prediction["ratio"], True)
    return None


def is_called(gpu: str, known: str) -> bool:
    """Whether a prediction for `known` is one for this GPU: an H100 is the SXM module, whole."""
    lesser = known != "NVIDIA" and re.search(r"PCIe|NVL|MIG|40GB", gpu)
    return bool(re.search(rf"\b{known}\b", gpu)) and not lesser


def share_of_floor(fact: Fact) -> float | None:
    """1: the machine can do no better."""
    floor = fact.get("floor")
    if not floor or not fact["value"]:
        return None
    value = fact["value"]
    return value / floor if fact["unit"] in HIGHER_IS_BETTER else floor / value


def gpu_of(facts: list[Fact]) -> str:
    """The name of the GPU that the facts are of; "" for a CPU."""
    return next((fact["gpu"] for fact in facts if "gpu" in fact), "")


def wrong_facts(facts: list[Fact]) -> list[Fact]:
    return [f for f in facts if f["kind"] == "error" or f.get("right") is False]


def trouble_of(fact: Fact) -> str:
    """What is wrong, in words."""
    if fact["kind"] == "error":
        return fact["error"]
    return f"{fact['figure']} is {fact['value']}, allowed {fact['allowed']}"


def of_kind(facts: list[Fact], kind: str) -> Iterator[Fact]:
    return (fact for fact in facts if fact["kind"] == kind)


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity: they are text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
