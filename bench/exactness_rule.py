"""The rule of bench/exactness.py: same bits twice, and at most twice the error of eager PyTorch.

Memory that a kernel should write is full of NaN before it does. Ours and eager PyTorch in the same
dtype are held against fp64 on the same fresh random numbers: ours may err twice as much, plus one
rounding of the largest element.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from facts import Facts
from timing import Roof, time_interleaved
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where and how large: on a CPU the same work on few images, in fp32."""

    device: torch.device
    roof: Roof
    batch: int
    dtype: torch.dtype

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def normal(self, *shape: int, dtype: torch.dtype | None = None, trained: bool = False):
        values = torch.randn(shape, device=self.device).to(dtype or self.dtype)
        return values.requires_grad_(trained)


class Errors:
    """The largest errors of ours and of eager, over parts of what they give."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
        exact = exact.detach().double()
        found = [(t.detach().double() - exact).abs().amax() for t in (ours, eager)]
        values = [float(v) for v in (*found, exact.abs().amax())] if exact.numel() else [0.0] * 3
        # max() would lose a NaN that comes second: a comparison with it is never true.
        before = self._found.get(name, [0.0] * 3)
        self._found[name] = [
            v if v != v or v > b else b for v, b in zip(values, before, strict=True)
        ]
        self._dtypes[name] = ours.dtype

    def say(self, facts: Facts, item: str) -> None:
        for name, (error, theirs, largest) in self._found.items():
            rounding = torch.finfo(self._dtypes[name]).eps * largest
            facts.check(item, f"error of {name}", error, 2 * theirs + rounding)


def say_errors(
    facts: Facts,
    item: str,
    names: Sequence[str],
    ours: Sequence[Tensor],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
) -> None:
    """The errors of all that a kernel gives, by name."""
    errors = Errors()
    for name, *three in zip(names, ours, eager, exact, strict=True):
        errors.add(name, *three)
    errors.say(facts, item)


@contextmanager
def deterministic(poisoned: bool) -> Iterator[None]:
    """Libraries choose algorithms that give the same bits; `poisoned`: NaN, or the largest integer,
    is in all memory that torch allocates and does not write."""
    fills = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills.fill_uninitialized_memory = poisoned
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fills.fill_uninitialized_memory = before[1]


def twice(facts: Facts, item: str, run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What `run` gives with poisoned memory, after saying whether it gives the same bits again."""
    with deterministic(poisoned=True):
        first = run()
    with deterministic(poisoned=False):
        again = run()
    different = sum(not torch.equal(a, b) for a, b in zip(first, again, strict=True))
    facts.check(item, "tensors that differ the second time", different, 0)
    return first


def milliseconds(
    facts: Facts, place: Place, item: str, runs: dict[str, tuple[Callable[[], object], float]]
) -> None:
    """`runs` is name -> (call, its least time in ms)."""
    timings = time_interleaved(
        {name: run for name, (run, *_) in runs.items()},
        device=place.device,
        rounds=9 if place.is_cuda else 1,
        calls=10 if place.is_cuda else 1,
    )
    for name, timing in timings.items():
        more = {"floor": runs[name][1], "spread": timing.spread}
        facts.figure(item, name, timing.median_ms, "ms", **more)


def exactly(leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values in fp64, trained where these are."""
    return [
        t.detach().double().requires_grad_(t.requires_grad)
        if t is not None and t.is_floating_point()
        else t
        for t in leaves
    ]
