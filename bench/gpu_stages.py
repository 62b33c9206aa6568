"""What each stage of bench/gpu.py finds out, in a process of its own.

    python bench/gpu_stages.py kernels --facts FILE [--batch 2] [--skip ITEM ...]

So a single stage can be put under compute-sanitizer or a debugger. On a CPU the same work is done
small, to see that all of it runs; what only a GPU can do is said to be left out.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from facts import Facts, read_facts

HERE = Path(__file__).resolve().parent
TESTS = ("tests/kernels", "tests/train/test_graph.py", "tests/train/test_prefetch.py")


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a stage works: `batch` None takes the stage's own."""

    facts: Facts
    path: Path  # of the facts, for what an earlier item found
    run: str
    device: str
    batch: int | None
    output: Path

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    def images(self, on_gpu: int, on_cpu: int = 2) -> int:
        return self.batch or (on_gpu if self.is_cuda else on_cpu)

    def leaves_out(self, item: str, why: str) -> None:
        self.facts.say("note", item=item, left_out=why)


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
    from exactness import Place, items
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
        ("patches-B256-16px", "mask_embed-B256-D768-float32"),
        ("patches-B8-16px", "mask_embed-B8-D768-float32-both"),
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


# --- a whole step in four modes -------------------------------------------------------------------

MODES = {
    "eager": {"compile": "off"},
    "eager, graph": {"compile": "off", "cuda_graph": True},
    "compiled": {"compile": "default"},
    "compiled, graph": {"compile": "default", "cuda_graph": True},
}
# A graph replays the kernels of the mode without it. The compiler rounds elsewhere and draws other
# samples for drop path, which a fresh model's loss hardly depends on.
SAME_LOSS = {"eager, graph": ("eager", 1e-6), "compiled": ("eager", 5e-3),
             "compiled, graph": ("compiled", 1e-6)}  # fmt: skip


def step(room: Room) -> None:
    for item, run in MODES.items():
        if run.get("cuda_graph") and not room.is_cuda:
            room.leaves_out(item, "CUDA graphs need a GPU")
            continue
        # After a capture that failed, a process cannot go on.
        more = {"alone": bool(run.get("cuda_graph"))}
        room.facts.attempt(item, lambda i=item, r=run: _steps(room, i, r), **more)


def _steps(room: Room, item: str, run: dict) -> None:
    """Six steps with seeds of their own, and more against the clock."""
    import torch
    from pretrain import build_ours, release_memory, synthetic_batch, to_device
    from timing import synchronize

    release_memory()
    setting = _setting(room, "base", images=256)
    is_cuda, B = room.is_cuda, setting.batch
    torch.manual_seed(0)
    begun = time.perf_counter()
    candidate, _ = build_ours(setting, **run)
    batch = to_device(synthetic_batch(setting), torch.device(room.device))
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    losses = []
    for number in range(6):
        torch.manual_seed(number)
        losses.append(float(candidate.step(candidate.ready(batch))))
    room.facts.figure(item, "first six steps", time.perf_counter() - begun, "s")
    room.facts.say("note", item=item, losses=losses)
    if item in SAME_LOSS:
        other, allowed = SAME_LOSS[item]
        theirs = next((f["losses"] for f in _of_run(room, "note") if "losses" in f
                       and f["item"] == other), None)  # fmt: skip
        if theirs is None:
            room.facts.say("error", item=item, error=f"no losses of {other} to compare with")
        else:
            room.facts.check(item, f"loss beside {other}", farthest(losses, theirs), allowed)
    log_classes = math.log(setting.model.vocab_size)  # what a fresh model's loss is
    room.facts.check(item, "first loss from ln V", abs(losses[0] - log_classes), 0.5)
    count, queued = 20 if is_cuda else 1, []
    for _ in range(5 if is_cuda else 1):  # each from an empty queue: a full one makes Python wait
        synchronize()
        begun = time.perf_counter()
        candidate.step(candidate.ready(batch))
        queued.append(1e3 * (time.perf_counter() - begun))
    synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        candidate.step(candidate.ready(batch))
    synchronize()
    spent = time.perf_counter() - begun
    room.facts.figure(item, "step", 1e3 * spent / count, "ms")
    room.facts.figure(item, "Python", statistics.median(queued), "ms")
    room.facts.figure(item, "rate", B * count / spent, "images/s")
    if is_cuda:
        peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
        room.facts.figure(item, "peak memory", peak / 2**30, "GiB")
        room.facts.figure(item, "reserved memory", kept / 2**30, "GiB")


def farthest(losses: list[float], theirs: list[float]) -> float:
    """The largest relative distance; infinite where one is no number."""
    far = [abs(a - b) / abs(b) for a, b in zip(losses, theirs, strict=True)]
    return max(far) if all(map(math.isfinite, far)) else math.inf


def _of_run(room: Room, kind: str) -> list[dict]:
    facts = read_facts(room.path)
    return [f for f in facts if f["run"] == room.run and f["kind"] == kind]


def _setting(
    room: Room, size: str, images: int, *, img_size: int = 224, tokenizer: bool = False
) -> object:
    """A setting of bench/pretrain.py; on a CPU one block, of S for B and of B for L."""
    from pretrain import Setting, encoder_of_width

    from beit_fast.model.config import beit_config

    small = {} if room.is_cuda else {"depth": 1, "vocab_size": 512}
    if not room.is_cuda:
        size = {"base": "small", "large": "base"}[size]
    dvae = encoder_of_width(256 if room.is_cuda else 16)
    dvae = dataclasses.replace(dvae, vocab_size=small.get("vocab_size", dvae.vocab_size))
    return Setting(
        model=beit_config(
            f"beit_{size}_patch16_{img_size}_8k_vocab",
            drop_path_rate=0.1,
            skip_unread_rows=True,
            **small,
        ),
        batch=room.images(images),
        device=room.device,
        dtype="bf16" if room.is_cuda else "fp32",
        tokenizer=dvae if tokenizer else None,
        input="synthetic",
    )


# --- whole steps against what else a user could run -----------------------------------------------

# What is built, and peers in groups, quick ones first: ours is built anew beside each group, and a
# peer that hangs or has no time costs its group. Compiled peers take minutes (max-autotune).
SETTINGS = {
    "steps": ({"size": "base", "images": 256}, (
        ("ours-graph",), ("timm", "official"), ("timm-compiled",), ("transformers-compiled",))),
    "steps-tokenizer": ({"size": "base", "images": 256, "tokenizer": True}, (
        ("ours-graph",), ("official",), ("timm-compiled",))),
    "large": ({"size": "large", "images": 128}, (("ours-graph",), ("timm-compiled",))),
    "px384": ({"size": "base", "images": 64, "img_size": 384}, (
        ("ours-graph",), ("timm-compiled",))),
}  # fmt: skip


def _whole_steps(room: Room, stage: str) -> None:
    """Ours beside a group of peers at a time; the stages of ours beside the first."""
    import torch
    from peers_pretrain import check
    from pretrain import (
        DTYPES,
        floors_of,
        measure_stages,
        measure_steps,
        release_memory,
        stated_peak,
    )
    from roofline import Machine
    from timing import measure_roof

    options, groups = SETTINGS[stage]
    setting = _setting(room, **options)
    device = torch.device(room.device)
    tokens = "tokens given" if setting.tokenizer is None else setting.tokenizer_name
    size, pixels = options["size"], setting.model.image_pixels[0]
    name = f"{size} {pixels} px, batch {setting.batch}, {tokens}"
    agree = "ours and the peers agree"
    if stage == "steps":
        room.facts.attempt(agree, lambda: check(device))
        if any(fact["item"] == agree for fact in _of_run(room, "error")):
            return  # nothing is timed that is wrong
    roof = measure_roof(device, DTYPES[setting.dtype])
    limits = Machine.of(roof, stated_peak(device, setting.dtype))
    if not room.is_cuda:
        groups = (("timm",),)

    floor_ms = floors_of(setting, limits)
    rounds = 5 if room.is_cuda else 1

    def steps(item: str, peers: tuple[str, ...]) -> None:
        release_memory()
        floor = sum(floor_ms.values())
        for row in measure_steps(setting, list(peers), rounds, limits, None, floor):
            if row["error"]:
                room.facts.say("note", item=item, figure=row["candidate"], missing=row["error"])
                continue
            more = {n: row[n] for n in ("ratio", "ratio_spread", "spread", "ms", "mfu_measured")}
            more["floor"] = 1e3 * setting.batch / floor
            rate = row["images_per_second"]
            room.facts.figure(item, row["candidate"], rate, "images/s", **more)

    def stages(item: str) -> None:
        release_memory()
        for row in measure_stages(setting, rounds, None, floor_ms, {}):
            floor = {"floor": row["floor_ms"]} if "floor_ms" in row else {}
            name = f"stage: {row['part']}"
            room.facts.figure(item, name, row["ms"], "ms", spread=row["spread"], **floor)

    for peers in groups:
        item = f"{name}, beside {' and '.join(peers)}"
        room.facts.attempt(item, lambda i=item, p=peers: steps(i, p))
        if peers == groups[0]:
            room.facts.attempt(f"{name}, stages", lambda: stages(f"{name}, stages"))


# --- the loader, a profile, the tests, tuning -----------------------------------------------------


def loader(room: Room) -> None:
    """Image pairs a second by threads: where the rate stops rising, Python's lock is the limit."""
    for package in ("torchcodec", "grain"):
        if importlib.util.find_spec(package) is None:
            room.leaves_out("loader", f"{package} is not installed")
            return
    from data import InMemory, ManyTimes

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


def profile(room: Room) -> None:
    """Where a compiled step's time goes, kernel by kernel, and how long the device is idle."""

    def run(item: str) -> None:
        import torch
        from pretrain import build_ours, synthetic_batch, to_device
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity

        setting = _setting(room, "base", images=256)
        candidate, _ = build_ours(setting, compile="default" if room.is_cuda else "off")
        batch = to_device(synthetic_batch(setting), torch.device(room.device))
        for _ in range(3):
            candidate.step(candidate.ready(batch))
        activity = ProfilerActivity.CUDA if room.is_cuda else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
            for _ in range(2):
                candidate.step(candidate.ready(batch))
            if room.is_cuda:
                torch.cuda.synchronize()
        time_of = "self_device_time_total" if room.is_cuda else "self_cpu_time_total"
        # The host's calls into CUDA are listed there too.
        where = DeviceType.CUDA if room.is_cuda else DeviceType.CPU
        rows = [e for e in profiler.key_averages() if e.device_type == where]
        rows.sort(key=lambda e: -getattr(e, time_of))
        busy = sum(getattr(e, time_of) for e in rows) / 2e3
        room.facts.figure(item, "kernels of a step", busy, "ms")
        room.facts.figure(item, "launches of a step", sum(e.count for e in rows) / 2, "launches")
        for event in rows[:40]:
            spent = round(getattr(event, time_of) / 2e3, 4)
            room.facts.say(
                "note", item=item, kernel=event.key[:90], ms=spent, count=event.count / 2,
                share=spent / busy,
            )  # fmt: skip
        profiler.export_chrome_trace(str(room.output / "profile.json"))

    room.facts.attempt("a compiled step", lambda: run("a compiled step"))


def tests(room: Room) -> None:
    """The tests of the kernels, of graphs and of prefetching, as `pytest` has them."""
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
    **{name: _bind(_whole_steps, name) for name in SETTINGS},
    "loader": loader,
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
