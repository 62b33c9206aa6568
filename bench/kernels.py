"""Every kernel against its peers: time, spread, share of the machine's roof, peak memory.

    python bench/kernels.py attention|residual|cross_entropy|input|conv|pieces [--only NAME]

All candidates of a case run interleaved in one process, behind the tests: no number is printed
while a candidate disagrees with the reference. A ratio is the peer's time by ours: above 1, ours is
faster. The floor is the larger of bytes / copy bandwidth and operations / matrix rate, both
measured in the same run; `floor` is the share of it that a candidate reaches. Peak memory is what
a call allocates beyond its inputs. On a CPU the shapes are small. A peer that cannot run, or that
torch.compile would leave eager, has a row without a time, and the reason in it.

Results are written after each case, with `--only` too (records.py has the rule), so that an area
may be measured in parts. On a GPU compilation takes nearly all of the time; as estimated, not
measured: attention 20 to 30 minutes, of which `--only B256-H12-N197` 4 and `--only
B256-H12-N197-forward` 1.5; cross_entropy 8 (`--only B256-D768`, `--only B256-D1024`, `--only
argmax`), conv 6 (`--only g1` to `--only g4`), residual 5 (`--only D768`, `--only D1024`), pieces 4,
input 3.
"""

import argparse
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from records import Records
from timing import (
    RESULTS,
    Roof,
    conditions,
    conditions_line,
    failed_row,
    format_results,
    fresh_compiler,
    measure_roof,
    reason_of,
    time_interleaved,
)
from torch import Tensor

from beit_fast.kernels.exact_fp32 import exact_fp32

AREAS = ("attention", "residual", "cross_entropy", "input", "conv", "pieces")


@dataclass
class Case:
    """One shape and one pass (forward, backward, both ...) of an area.

    A candidate is a function without arguments. `ours` names the one that ratios are about.
    `failed` says why a peer is not there.
    """

    name: str
    candidates: dict[str, Callable[[], object]]
    num_bytes: float
    num_flops: float
    ours: str = "ours"
    failed: dict[str, str] = field(default_factory=dict)
    check: Callable[[], None] | None = None  # raises where candidates disagree


def measure(case: Case, device: torch.device, roof: Roof, rounds: int) -> list[dict]:
    """One row for each candidate; those that failed have nan for figures, and the reason."""
    if case.ours not in case.candidates:
        reason = case.failed.get(case.ours, "is not among the candidates")
        raise RuntimeError(f"{case.name}: {case.ours}: {reason}: nothing to compare with")
    if case.check is not None:
        with exact_fp32():  # a reference in fp32 is not to be cuDNN's TF32
            case.check()
    peaks_mb = {name: _peak_mb(run, device) for name, run in case.candidates.items()}
    timings = time_interleaved(
        case.candidates, device=device, rounds=rounds, calls=10 if device.type == "cuda" else 1
    )
    floor_ms = roof.floor_ms(case.num_bytes, case.num_flops)
    rows = []
    for name, timing in timings.items():
        ratio, ratio_spread = timings[case.ours].ratio(timing)
        seconds = timing.median_ms / 1e3
        rows.append(
            {
                "case": case.name,
                "candidate": name,
                "ms": timing.median_ms,
                "spread": timing.spread,
                "ratio": ratio,
                "ratio_spread": ratio_spread,
                "floor_ms": floor_ms,
                "floor": floor_ms / timing.median_ms,
                "GB/s": case.num_bytes / seconds / 1e9,
                "TFLOP/s": case.num_flops / seconds / 1e12,
                "peak_MB": peaks_mb[name],
                "error": "",
            }
        )
    known = {"case": case.name, "floor_ms": floor_ms}
    failed = [failed_row(rows[0], why, candidate=n, **known) for n, why in case.failed.items()]
    return rows + failed


def one_by_one(cases: Iterator[Case]) -> Iterator[Case]:
    """The cases, each made after all that was compiled for the last one is forgotten."""
    while True:
        fresh_compiler()
        try:
            case = next(cases)
        except StopIteration:
            return
        yield case


def run_of(
    part: str, forward: Callable[[], object], leaves: Sequence[Tensor], douts: object
) -> Callable[[], object]:
    """What is timed of a pass: the forward without gradients, both, or the backward alone, again
    and again over one forward."""
    if part == "forward":
        return torch.no_grad()(forward)
    if part == "both":
        return lambda: torch.autograd.grad(forward(), leaves, douts)
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, douts, retain_graph=True)


def compiled(function: Callable) -> dict[str, Callable]:
    """torch.compile of a peer, as it comes and with its longest search."""
    return {
        "compile": torch.compile(function, dynamic=False),
        "compile-max": torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs"),
    }


def require_close(
    ours: Iterable[Tensor], theirs: Iterable[Tensor], dtype: torch.dtype | None = None
) -> None:
    """Raise AssertionError where ours is further from the reference, in norm, than two roundings of
    `dtype` (by default its own), or than sums in another order are in fp32."""
    for our, their in zip(ours, theirs, strict=True):
        error = (our.double() - their.double()).norm() / their.double().norm()
        if not error <= max(2 * torch.finfo(dtype or their.dtype).eps, 1e-5):  # NaN, too
            raise AssertionError(f"ours is {error:.2e} from the reference: nothing is timed")


def require_as_exact(
    ours: Iterable[Tensor], eager: Iterable[Tensor], exact: Iterable[Tensor]
) -> None:
    """Raise AssertionError where ours is further from the exact tensors than eager twice, plus a
    rounding of the largest element: no time is printed for wrong numbers."""
    for our, their, want in zip(ours, eager, exact, strict=True):
        rounding = torch.finfo(our.dtype).eps * want.abs().max()
        allowed = 2 * (their.double() - want).abs().max() + rounding
        error = (our.double() - want).abs().max()
        if not error <= allowed:
            raise AssertionError(
                f"ours is {error:.2e} from fp64, allowed {allowed:.2e}: nothing is timed"
            )


def try_all(makers: dict[str, Callable[[], Callable]]) -> tuple[dict, dict[str, str]]:
    """Run each maker; candidates that exist, and the reasons of those that do not."""
    made, failed = {}, {}
    for name, make in makers.items():
        try:
            candidate = make()
            candidate()
            made[name] = candidate
        except Exception as error:  # a peer that cannot run must not stop the others
            failed[name] = reason_of(error)
    return made, failed


def _peak_mb(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return float("nan")
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("area", choices=AREAS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="default results/kernels-<area>-<device>.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    roof = measure_roof(device, dtype)
    values = conditions(
        device,
        ["triton", "numpy"],
        dtype=str(dtype).removeprefix("torch."),
        rounds=arguments.rounds,
        copy_GB_per_s=round(roof.bytes_per_second / 1e9),
        product_TFLOP_per_s=round(roof.flops_per_second / 1e12, 2),
    )
    print(conditions_line(values))
    # A peer's file makes cases one at a time, so that one case's tensors are gone before the next.
    peers = importlib.import_module(f"peers_{arguments.area}")
    path = arguments.output or RESULTS / f"kernels-{arguments.area}-{device.type}.csv"
    records = Records(path, values, ("case", "candidate"))
    measured = False
    for case in one_by_one(peers.cases(device, dtype, arguments.only)):
        rows = measure(case, device, roof, arguments.rounds)
        records.add(rows)
        print(format_results(rows, "candidate"), flush=True)
        measured = True
    if not measured:
        parser.error(f"no case contains {arguments.only!r}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
