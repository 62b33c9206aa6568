"""What each stage of bench/gpu.py finds out, in a process of its own.

    python bench/gpu_stages.py kernels --facts FILE [--batch 2] [--skip ITEM ...]

So a single stage can be put under compute-sanitizer or a debugger. On a CPU the same work is done
small, to see that all of it runs; what only a GPU can do is said to be left out.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from facts import Facts
from gpu_room import Room
from gpu_steps import SETTINGS, profile, step, whole_steps

HERE = Path(__file__).resolve().parent
TESTS = (
    *("tests/kernels", "tests/train/test_graph.py", "tests/train/test_prefetch.py"),
    *("tests/data/test_device_decode.py", "tests/data/test_device_views.py"),
    "tests/tasks/pretrain/test_gpu_views.py",
)


# --- the machine ----------------------------------------------------------------------------------


def machine(room: Room) -> None:
    import torch
    from timing import conditions

    def who() -> None:
        device = torch.device(room.device)
        values = conditions(device, ("triton", "numpy", "timm", "transformers"))
        if room.is_cuda:
            found = torch.cuda.get_device_properties(0)
            values |= {
                "capability": f"{found.major}.{found.minor}",
                "multiprocessors": found.multi_processor_count,
                "memory_GiB": found.total_memory / 2**30,
                "l2_MiB": found.L2_cache_size / 2**20,
                "shared_memory_KiB": found.shared_memory_per_block_optin / 1024,
                "cuda": torch.version.cuda,
            }
        room.facts.say("note", item="conditions", cores=len(os.sched_getaffinity(0)), **values)

    def driver() -> None:
        fields = "driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        values = (value.strip() for value in printed.stdout.splitlines()[0].split(","))
        room.facts.say("note", item="driver", **dict(zip(fields.split(","), values, strict=True)))

    room.facts.attempt("conditions", who)
    if room.is_cuda and shutil.which("nvidia-smi"):
        room.facts.attempt("driver", driver)
    else:
        room.leaves_out("driver", "there is no nvidia-smi, or no GPU")
    room.facts.attempt("roof", lambda: _roof(room))
    room.facts.attempt("products", lambda: _products(room))


def _roof(room: Room) -> None:
    import torch
    from timing import measure_roof

    device = torch.device(room.device)
    for dtype in (torch.bfloat16, torch.float32) if room.is_cuda else (torch.float32,):
        roof, name = measure_roof(device, dtype), str(dtype).removeprefix("torch.")
        room.facts.figure("roof", f"copy, {name}", roof.bytes_per_second / 1e9, "GB/s")
        room.facts.figure("roof", f"product, {name}", roof.flops_per_second / 1e12, "TFLOP/s")


def _products(room: Room) -> None:
    """The products of a block of BEiT-B: 77 % of a step's least time is theirs."""
    import torch
    from timing import measure_roof, time_interleaved

    device, B = torch.device(room.device), room.images(256, 1)
    dtype = torch.bfloat16 if room.is_cuda else torch.float32
    rows = 197 * B
    best = measure_roof(device, dtype).flops_per_second / 1e12
    for name, inputs, outputs in (
        ("qkv", 768, 2304), ("proj", 768, 768), ("fc1", 768, 3072), ("fc2", 3072, 768)
    ):  # fmt: skip
        x, weight, dout = (
            torch.randn(shape, device=device).to(dtype)
            for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        timings = time_interleaved(
            {
                "forward": lambda x=x, w=weight: x @ w.T,
                "input gradient": lambda d=dout, w=weight: d @ w,
                "weight gradient": lambda d=dout, x=x: d.T @ x,
            },
            device=device,
            rounds=9 if room.is_cuda else 1,
            calls=10 if room.is_cuda else 1,
        )
        for part, timing in timings.items():
            rate = 2 * rows * inputs * outputs / timing.median_ms / 1e9
            more = {"floor": best, "spread": timing.spread}
            room.facts.figure(f"{name}, B {B}", part, rate, "TFLOP/s", **more)


# --- kernels --------------------------------------------------------------------------------------


def kernels(room: Room) -> None:
    import torch
    from exactness import items
    from exactness_rule import Place
    from timing import measure_roof

    from beit_fast.kernels.exact_fp32 import exact_fp32

    device, dtype = torch.device(room.device), torch.bfloat16 if room.is_cuda else torch.float32
    place = Place(device, measure_roof(device, dtype), room.images(256), dtype)

    def seeded(run: Callable, item: str) -> None:
        torch.manual_seed(0)  # what is wrong once is wrong again, whatever was skipped before it
        run(room.facts, item)

    with exact_fp32():  # what ours is held against
        for item, run in items(place).items():
            room.facts.attempt(item, lambda run=run, item=item: seeded(run, item))
            torch.cuda.empty_cache()


# Cases of bench/kernels.py by a part of their names, on a GPU and on a CPU.
CASES = {
    "attention": (
        ("B256-H12-N197-forward", "B256-H12-N197-both", "B256-H12-N197-backward",
         "B64-H12-N577-both", "B256-H16-N197-both"),
        ("B4-H12-N197-forward", "B4-H12-N197-both"),
    ),
    "residual": (
        ("B256-N197-D768-float32", "B256-N197-D768-bfloat16", "B256-N197-D1024-float32"),
        ("B4-N197-D768-float32-both",),
    ),
    "head": (("B256-D768", "B256-D1024"), ("B4-D192",)),
    "input": (
        ("ragged_views-B256", "patches-B256-16px", "mask_embed-B256-D768-float32"),
        ("ragged_views-B8-jitter", "patches-B8-16px", "mask_embed-B8-D768-float32-both"),
    ),
    "tokenizer": (("g1", "g2", "g3", "g4"), ("g4-conv2",)),
    "pieces": (("",), ("rel_pos_bias", "layer_norm")),
}  # fmt: skip
AREAS = {"head": "cross_entropy", "tokenizer": "conv"}


def _against_peers(room: Room, stage: str) -> None:
    """Cases of bench/kernels.py, each behind its check against the reference."""
    import torch
    from timing import measure_roof

    from kernels import measure, one_by_one

    device, dtype = torch.device(room.device), torch.bfloat16 if room.is_cuda else torch.float32
    if not room.is_cuda:
        # Threads that wait for each other spin: beside one busy core the small operations of
        # ragged_views took over 45 s by two threads, and 5 s by one.
        torch.set_num_threads(1)
    roof = measure_roof(device, dtype)
    area = importlib.import_module(f"peers_{AREAS.get(stage, stage)}")

    def run(part: str) -> None:
        found = False
        for case in one_by_one(area.cases(device, dtype, part)):
            found = True
            for row in measure(case, device, roof, rounds=9 if room.is_cuda else 1):
                name, reason = row["candidate"], row["error"]
                if reason:
                    room.facts.say("note", item=case.name, figure=name, missing=reason)
                    continue
                more = {n: row[n] for n in ("ratio", "ratio_spread", "spread", "peak_MB")}
                more["floor"] = row["floor_ms"]
                room.facts.figure(case.name, name, row["ms"], "ms", **more)
        if not found:
            raise ValueError(f"no case of {stage} contains {part!r}: mend CASES")

    for part in CASES[stage][0 if room.is_cuda else 1]:
        room.facts.attempt(part or "all", lambda part=part: run(part))


# --- the loader, the tests, tuning ----------------------------------------------------------------


def loader(room: Room) -> None:
    """Image pairs a second by threads: where the rate stops rising, Python's lock is the limit."""
    for package in ("torchcodec", "grain"):
        if importlib.util.find_spec(package) is None:
            room.leaves_out("loader", f"{package} is not installed")
            return
    from data_images import InMemory, ManyTimes

    from beit_fast.data.config import MaskingConfig
    from beit_fast.data.loader import Loader
    from beit_fast.data.samples import PretrainSample
    from beit_fast.data.views.config import ViewConfig

    cores = len(os.sched_getaffinity(0))
    source = ManyTimes(InMemory(None))
    batch, seconds = (128, 4.0) if room.is_cuda else (16, 0.5)

    def run(item: str, threads: int) -> None:
        sample = PretrainSample(ViewConfig(), MaskingConfig(), (14, 14))
        with contextlib.closing(
            Loader(source, sample, batch_size=batch, num_threads=threads).batches()
        ) as batches:
            for _ in range(threads + 1):  # what was read ahead
                next(batches)
            begun, cpu, count = time.perf_counter(), time.process_time(), 0
            while (spent := time.perf_counter() - begun) < seconds:
                next(batches)
                count += batch
        busy = (time.process_time() - cpu) / spent
        room.facts.figure(item, "pairs of views", count / spent, "images/s", busy_cores=busy)

    for threads in (n for n in (1, 2, 4, 8, 12, 16, 24) if n <= 1.5 * cores):
        item = f"{threads} thread{'s' * (threads > 1)}"
        room.facts.attempt(item, lambda i=item, t=threads: run(i, t))


def views(room: Room) -> None:
    """Decoder, kernel and loader of `views.kind gpu`, and the step beside them (data_device.py)."""
    for package in ("torchcodec", "grain"):
        if importlib.util.find_spec(package) is None:
            room.leaves_out("views", f"{package} is not installed")
            return
    import data_device
    import torch
    from data_images import InMemory

    place = data_device.Place(
        torch.device(room.device), InMemory(None), room.images(128, 4), 5 if room.is_cuda else 1
    )

    def run(part: str) -> None:
        _, measure = data_device.PARTS[part]
        for row in measure(place):
            item = f"{part}, {row.pop('case')}"
            for figure, value in row.items():
                unit = "ms" if figure.endswith(" ms") else "images/s"
                if "per" in figure or unit == "ms":
                    room.facts.figure(item, figure, value, unit)
                else:
                    room.facts.say("note", item=item, **{figure: value})

    for part in data_device.PARTS:
        room.facts.attempt(part, lambda part=part: run(part))


def tests(room: Room) -> None:
    """The tests of the kernels, of graphs, prefetching and views of kind gpu, as `pytest` has
    them."""
    import pytest

    root = HERE.parent
    counts: dict[str, int] = {}

    class Reports:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when != "call" and report.outcome == "passed":
                return
            counts[report.outcome] = counts.get(report.outcome, 0) + 1
            if sum(counts.values()) % 100 == 0:  # a run that is cut tells too
                room.facts.say("note", item="tests", **counts)
            if report.failed:
                why = str(report.longrepr).strip().splitlines()[-1:]
                room.facts.say("error", item=report.nodeid, error=" ".join(why)[:300])

    def run() -> None:
        os.chdir(root)
        chosen = TESTS if room.is_cuda else ("tests/kernels/test_philox.py",)
        options = ["-p", "no:cacheprovider", "--tb=short", "--durations=0"]
        if room.is_cuda and importlib.util.find_spec("xdist"):
            workers = max(1, len(os.sched_getaffinity(0)) - 2)
            options += ["-n", str(workers), "--dist", "worksteal"]
        code = pytest.main([*chosen, *options], plugins=[Reports()])
        room.facts.say("note", item="tests", exit_code=int(code), **counts)
        room.facts.check("tests", "failed", counts.get("failed", 0), 0)
        if not counts:
            raise RuntimeError(f"pytest ended with {code!r} and ran no test")

    room.facts.attempt("tests", run)


def tuning(room: Room) -> None:
    """Every configuration of the attention kernels at N = 197, the best beside the table's."""
    if not room.is_cuda:
        room.leaves_out("tuning", "configurations can be timed on a GPU alone")
        return
    import torch
    from timing import time_interleaved
    from tune import SHAPES, Inputs, candidates_of, works

    def run(item: str, shape: tuple[int, ...], part: str) -> None:
        inputs = Inputs(*shape)
        inputs.forward()
        runs = candidates_of(part, inputs, *shape[2:])
        runs = {name: call for name, call in runs.items() if works(call)}
        chosen = next(iter(runs))
        timings = time_interleaved(runs, device=torch.device("cuda"), rounds=5, calls=5)
        best = sorted(timings, key=lambda name: timings[name].median_ms)[:8]
        for name in dict.fromkeys([chosen, *best]):
            ratio, spread = timings[chosen].ratio(timings[name])
            more = {"ratio": ratio, "ratio_spread": spread, "config": name}
            figure = "the table's" if name == chosen else f"rank {best.index(name) + 1}"
            room.facts.figure(item, figure, timings[name].median_ms, "ms", **more)

    shapes = [shape for shape in SHAPES if shape[2] == 197]
    for part, shape in itertools.product(("forward", "backward"), shapes):
        item = "{} B{} H{} N{} K{}".format(part, *shape)
        room.facts.attempt(item, lambda i=item, s=shape, p=part: run(i, s, p))


def _bind(run: Callable[[Room, str], None], name: str) -> Callable[[Room], None]:
    return lambda room: run(room, name)


RUNS: dict[str, Callable[[Room], None]] = {
    "machine": machine,
    "kernels": kernels,
    **{name: _bind(_against_peers, name) for name in CASES},
    "step": step,
    **{name: _bind(whole_steps, name) for name in SETTINGS},
    "loader": loader,
    "views": views,
    "profile": profile,
    "tests": tests,
    "tuning": tuning,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=RUNS)
    parser.add_argument("--facts", type=Path, required=True, help="file that lines are added to")
    parser.add_argument("--run", default="by hand", help="name of the run in them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, help="images, in place of each stage's own number")
    parser.add_argument("--skip", nargs="*", default=[], metavar="ITEM")
    options = parser.parse_args()
    facts = Facts(options.facts, options.run, options.stage, frozenset(options.skip))
    sys.path.insert(0, str(HERE))
    room = Room(
        facts, options.facts, options.run, options.device, options.batch, options.facts.parent
    )
    RUNS[options.stage](room)


if __name__ == "__main__":
    main()
