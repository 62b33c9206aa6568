"""Whole pre-training steps: ours, and what else a user could run, in one run.

    python bench/pretrain.py --size base --batch 4 --tokenizer none            # a CPU
    python bench/pretrain.py --size base --batch 128 256 --dtype bf16          # a GPU
    python bench/pretrain.py --input jpeg --data TRAIN                         # from files

A step is visual tokens, forward, backward, clip and AdamW; peers_pretrain.py says who is compared.
Nothing is timed while the peers' losses and gradients differ from ours. Candidates take turns; a
ratio is the peer's time by ours: above 1, ours is faster, and slower cases are printed too. The
time of a step is the clock's. The input is `synthetic` (uint8 batches on the device), `host` (the
same, copied in each step) or `jpeg` (a loader for each candidate, decoding while it trains; the
official one with the official transform). With `--tokenizer none` the visual tokens are given.

Model FLOP utilisation counts encoder and head without recomputation, not the tokenizer: of the rate
that the maker states, and of a matrix product measured in the same run. `floor` is the share of
bench/roofline.py's least time, at the ceilings of this run, that is reached. Stages are those of
ours, one after another in an instrumented step without graph. Memory is what one candidate takes in
a process of its own, measured when the times are written. Rates are per GPU: one process, one
device. A candidate that cannot run, or that torch.compile would leave eager, has a row without a
time, and the reason in it; so has one whose memory could not be measured.

Results are written after each part of a setting, into the place of what the file had for the same
candidates (records.py has the rule): `--peers`, `--batch` and `--tokenizer` split a table into
runs. Compilation takes most of the time. On a GPU, as estimated and not measured,

    python bench/pretrain.py --batch 256 --tokenizer none --peers timm ours-graph --no-memory

takes 4 minutes, each of timm-compiled and transformers-compiled 5 to 8 for each batch, and all
there is, `--batch 128 256` with memory, more than an hour.
"""

import argparse
import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from data import InMemory, ManyTimes
from model import resident_kib
from peers_pretrain import (
    PEERS,
    Batch,
    Candidate,
    PreparedSample,
    build_peer,
    check,
    eager_tokens,
)
from records import Records
from roofline import MACHINES, Machine, floors, model_flops_per_image
from timing import (
    RESULTS,
    Timing,
    conditions,
    conditions_line,
    failed_row,
    format_results,
    format_table,
    fresh_compiler,
    measure_roof,
    reason_of,
    synchronize,
    time_interleaved,
)
from torch import Tensor, nn

from beit_fast.data.config import PHOTOGRAPHS, DataConfig, MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.masking import draw_mask
from beit_fast.data.samples import PretrainSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.views.config import ViewConfig
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tokenizer.config import STRIDE, DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.loop import TaskLoss, compile_mode, graphed, preparation
from beit_fast.train.optim import Schedule, build_optimizer, clip_gradients
from beit_fast.train.parallel import World
from beit_fast.train.prefetch import device_batches
from beit_fast.train.step import Sentinel, TrainStep, autocast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a candidate is built from."""

    model: BeitConfig
    batch: int
    device: str
    dtype: str
    tokenizer: DvaeConfig | None  # None: visual tokens are given
    input: str
    loader_threads: int = 0

    @property
    def tokenizer_name(self) -> str:
        return "none" if self.tokenizer is None else f"dVAE-{self.tokenizer.encoder_width}"

    @property
    def pretrain(self) -> PretrainConfig:
        """The recipe's, for images and a grid of this size; its rate changes next to nothing."""
        model = self.model
        L = model.num_patches
        token_size = tuple(side * STRIDE for side in model.grid)
        return PretrainConfig(
            model=model,
            data=DataConfig(path=PHOTOGRAPHS, batch_size=self.batch),
            # Exactly as many in each image: the same work for all candidates in every batch.
            masking=MaskingConfig(
                strategy="block_exact", num_masked=num_masked(model), min_block=min(16, L // 8)
            ),
            views=ViewConfig(size=model.image_pixels, token_size=token_size),
            optim=OptimConfig(lr=1e-6, min_lr=1e-6, warmup_steps=0),
            run=RunConfig(output="unused", steps=1, precision=self.dtype, device=self.device),
            tokenizer="random weights",
            tokenizer_precision="fp16" if self.device == "cuda" else "fp32",
        )


def num_masked(model: BeitConfig) -> int:
    """75 of 196 patches, and as large a share of other grids."""
    return round(75 / 196 * model.num_patches)


# --- ours: the engine is built here, and nowhere else ---------------------------------------------

# What a run can choose: fields of RunConfig.
OURS = {
    "ours": {},
    "ours-graph": {"cuda_graph": True},
    "ours-reduce-overhead": {"compile": "reduce-overhead"},
    "ours-eager": {"compile": "off"},
}


class Ours:
    """The step of the loop for one process: task, compiler, TrainStep, graph, as `train` has it."""

    def __init__(self, config: PretrainConfig, tokenizer: nn.Module, device: torch.device) -> None:
        optim, run = config.optim, config.run
        self.run, self.device, self.optim = run, device, optim
        self.task = PretrainTask(config, tokenizer, World(0, 1, device))
        self.task.to(device)
        self.task.model.train()
        if (mode := compile_mode(run, device)) != "off":
            self.task.compile(mode)
        groups = self.task.param_groups(optim.weight_decay)
        self.optimizer = build_optimizer(groups, optim, device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule = Schedule(self.optimizer, optim, num_steps=2**31, warmup=0, start=0)
        module = TaskLoss(self.task)
        sentinel = Sentinel(self.optimizer, device, 0)
        take = TrainStep(module, self.optimizer, sentinel, optim=optim, run=run, device=device)
        self.take = graphed(take, run, World(0, 1, device))
        # Patches and tokens, from a batch on the device.
        self.ready = preparation(self.task, run, device)

    def step(self, batch: Batch) -> Tensor:
        loss = self.take([batch])["loss"]
        self.schedule.step()
        return loss


def build_ours(setting: Setting, **run: object) -> tuple[Candidate, Ours]:
    """The candidate, with fields of RunConfig replaced, and what its stages are measured on."""
    device = torch.device(setting.device)
    config = setting.pretrain
    config = replace(config, run=replace(config.run, **run))
    ours = Ours(config, make_tokenizer(setting), device)
    return Candidate(model=ours.task.model, step=ours.step, ready=ours.ready), ours


# --- candidates and their input -------------------------------------------------------------------


class GivenTokens(nn.Module):
    """A tokenizer that is no work: the same random ids for every batch."""

    stride = STRIDE

    def __init__(self, model: BeitConfig, batch: int) -> None:
        super().__init__()
        self.vocab_size = model.vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.vocab_size, (batch, *model.grid), generator=generator)
        self.register_buffer("ids", ids)

    def encode(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        del images
        if index is None:
            return self.ids
        ids = self.ids.flatten().index_select(0, index.clamp(min=0))
        return torch.where(index >= 0, ids, -1)


def make_tokenizer(setting: Setting) -> nn.Module:
    """A dVAE of random weights, or given tokens."""
    if setting.tokenizer is None:
        return GivenTokens(setting.model, setting.batch)
    torch.manual_seed(0)
    return Dvae(setting.tokenizer).eval()


def encoder_of_width(width: int) -> DvaeConfig:
    """DALL-E's has 256. The decoder, which nothing here runs, is as small as it can be."""
    return DvaeConfig(encoder_width=width, decoder_width=4, decoder_input_width=1)


def build(name: str, setting: Setting) -> Candidate:
    """Ours or a peer, ready to train."""
    if name in OURS:
        return build_ours(setting, **OURS[name])[0]
    device = torch.device(setting.device)
    tokenizer = make_tokenizer(setting).to(device)
    if setting.tokenizer is None:

        def tokenize(views: Tensor) -> Tensor:
            return tokenizer.encode(views).flatten(1)
    else:
        tokenize = partial(eager_tokens, tokenizer, half=device.type == "cuda")
    optim, dtype = setting.pretrain.optim, DTYPES[setting.dtype]
    return build_peer(name, setting.model, tokenize, optim, device, dtype)


def sample_of(setting: Setting, candidate: Candidate) -> PreparedSample:
    """What the candidate's loader makes of a file."""
    config = setting.pretrain
    views = ViewConfig(
        kind=candidate.views, size=config.views.size, token_size=config.views.token_size
    )
    return PreparedSample(views, config.masking, setting.model.grid, candidate.prepare)


def synthetic_batch(setting: Setting) -> Batch:
    """Noise in the loader's layout, on the CPU; masks are drawn as the loader draws them."""
    config, rng = setting.pretrain, np.random.default_rng(0)
    sample = PretrainSample(config.views, config.masking, setting.model.grid)
    samples = []
    for i in range(setting.batch):
        sizes = {"images": config.views.size, "token_images": config.views.token_size}
        made = {n: rng.integers(0, 256, (*size, 3), np.uint8) for n, size in sizes.items()}
        mask = draw_mask(sample.grid, config.masking, SampleSeed(0, 0, i).rng("mask"))
        samples.append(made | {"mask": mask.reshape(-1)})
    return {name: torch.from_numpy(array) for name, array in sample.collate(samples).items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class Input:
    """Batches for one candidate, as the setting says. A loader runs while one is `open`."""

    def __init__(self, setting: Setting, candidate: Candidate, source: "ManyTimes | None") -> None:
        self.setting, self.candidate, self.source = setting, candidate, source
        self.device = torch.device(setting.device)
        if setting.input != "jpeg":
            batch = candidate.prepare(synthetic_batch(setting))
            if self.device.type == "cuda":
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            self.batch = to_device(batch, self.device) if setting.input == "synthetic" else batch

    @contextmanager
    def open(self) -> Iterator[Iterator[Batch]]:
        """What the candidate's step takes; `next` does the work that it takes to get there."""
        with self.raw() as batches:
            if self.setting.input == "synthetic":
                yield map(self.candidate.ready, batches)
            else:
                yield device_batches(batches, self.device, self.candidate.ready)

    @contextmanager
    def raw(self) -> Iterator[Iterator[Batch]]:
        """Batches on the CPU or, synthetic ones, on the device."""
        if self.setting.input != "jpeg":
            yield itertools.repeat(self.batch)
            return
        loader = Loader(
            self.source,
            sample_of(self.setting, self.candidate),
            batch_size=self.setting.batch,
            num_threads=self.setting.loader_threads,
        )
        batches = loader.batches()
        try:
            yield batches
        finally:
            batches.close()


# --- measuring ------------------------------------------------------------------------------------


def time_steps(
    candidates: dict[str, Candidate], inputs: dict[str, Input], rounds: int
) -> dict[str, Timing]:
    """Whole steps, in turns; on a GPU ten in a row, as training runs them."""
    (device, is_jpeg), *_ = ((i.device, i.setting.input == "jpeg") for i in inputs.values())
    if is_jpeg:
        return _time_from_files(candidates, inputs, rounds)

    with ExitStack() as stack:
        batches = {name: stack.enter_context(inputs[name].open()) for name in candidates}
        return time_interleaved(
            {n: (lambda n=n: candidates[n].step(next(batches[n]))) for n in candidates},
            device=device,
            rounds=rounds,
            warmup=4 if device.type == "cuda" else 1,
            calls=10 if device.type == "cuda" else 1,
            wall=True,
        )


def _time_from_files(
    candidates: dict[str, Candidate], inputs: dict[str, Input], rounds: int
) -> dict[str, Timing]:
    """In turns of many steps: a turn opens its own loader, and the batches that were read ahead
    are used up before the clock starts."""
    rounds_ms: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for name in order:
            steps = inputs[name].setting.loader_threads + 2
            with inputs[name].open() as batches:
                for timed in (False, True):
                    synchronize()
                    start = time.perf_counter()
                    for _ in range(steps):
                        candidates[name].step(next(batches))
                    synchronize()
                    if timed:
                        rounds_ms[name].append(1e3 * (time.perf_counter() - start) / steps)
        order.reverse()
    return {name: Timing(tuple(values)) for name, values in rounds_ms.items()}


class StageClock:
    """Time between marks, added up by name; on a GPU that of the stream."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, object]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        """What happened since the last mark is `name`."""
        if self._is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((name, now))

    def milliseconds(self) -> dict[str, float]:
        synchronize()
        total: dict[str, float] = {}
        for (_, before), (name, now) in itertools.pairwise(self._marks):
            ms = before.elapsed_time(now) if self._is_cuda else 1e3 * (now - before)
            total[name] = total.get(name, 0.0) + ms
        return total


def staged_step(ours: Ours, batches: Iterator[Batch], resident: bool) -> dict[str, float]:
    """Milliseconds of each stage of one step; the same step, cut between encoder and head.

    `ours` is built with compile "off", for the cut; where it would be compiled, the encoder is.
    `input` is jitter, normalisation and what lies between stages; `head` is its loss and backward.
    Raises RuntimeError where the model or the task does not call what a stage is tied to.
    """
    synchronize()
    clock, cut = StageClock(ours.device), {}

    def tokenizer_tap(encode: Callable, *args: object, **kwargs: object) -> Tensor:
        clock.mark("input")
        ids = encode(*args, **kwargs)
        clock.mark("tokenizer")
        return ids

    def encoder_tap(encode: Callable, *args: object, **kwargs: object) -> Tensor:
        features = encode(*args, **kwargs)
        clock.mark("encoder forward")
        cut["features"], cut["leaf"] = features, features.detach().requires_grad_()
        return cut["leaf"]

    batch = next(batches)
    if not resident:
        clock.mark("data")
        batch = to_device(batch, ours.device)
    clock.mark("copy")
    with tap(ours.task.tokenizer, "encode", tokenizer_tap):
        batch = ours.ready(batch)
    clock.mark("input")
    with (
        tap(ours.task.model, "_encode", encoder_tap),
        autocast(ours.run, ours.device),
    ):
        loss = ours.task.loss(batch)[0]
    if "leaf" not in cut:
        raise RuntimeError(
            "the loss did not call the model's _encode: tie the stages to what it calls"
        )
    loss.backward()
    clock.mark("head")
    cut["features"].backward(cut["leaf"].grad)
    clock.mark("backward")
    clip_gradients(ours.parameters, ours.optim.clip_grad)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    ours.schedule.step()
    clock.mark("optimiser")
    return clock.milliseconds()


@contextmanager
def tap(owner: object, method: str, around: Callable) -> Iterator[None]:
    """`owner.method(...)` calls `around(the method, ...)` instead."""
    own = vars(owner).get(method)  # set on the instance already, or its class's
    setattr(owner, method, partial(around, getattr(owner, method)))
    try:
        yield
    finally:
        delattr(owner, method)
        if own is not None:
            setattr(owner, method, own)


def time_stages(ours: Ours, source: Input, rounds: int) -> dict[str, Timing]:
    """Each stage over rounds, after a step that warms up."""
    resident = source.setting.input == "synthetic"
    with source.raw() as batches:
        staged_step(ours, batches, resident)
        steps = [staged_step(ours, batches, resident) for _ in range(rounds)]
    unused = {"copy"} if resident else {"data"} if source.setting.input == "host" else set()
    names = [name for name in steps[0] if name not in unused]
    return {name: Timing(tuple(step[name] for step in steps)) for name in names}


def build_staged(setting: Setting) -> Ours:
    """Ours for `staged_step`."""
    mode = compile_mode(setting.pretrain.run, torch.device(setting.device))
    _, ours = build_ours(setting, compile="off")
    if mode != "off":
        model = ours.task.model
        model._encode = torch.compile(model._encode, mode=mode, dynamic=False)
    return ours


def peak_mib(name: str, setting: Setting) -> float:
    """Memory that one candidate needs to train, weights and optimiser included.

    For a process of its own: neither the high-water mark of a process nor the pool of a CUDA graph
    falls again.
    """
    before = resident_kib("VmRSS")
    candidate = build(name, setting)
    device = torch.device(setting.device)
    batch = to_device(candidate.prepare(synthetic_batch(setting)), device)
    for _ in range(5):  # the fourth is captured, if there is a graph
        candidate.step(candidate.ready(batch))
    if device.type == "cuda":
        synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return (resident_kib("VmHWM") - before) / 2**10


def _peak_mib_apart(name: str, setting: Setting, num_torch_threads: int) -> float:
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), torch.set_num_threads, (num_torch_threads,)
    ) as pool:
        return pool.submit(peak_mib, name, setting).result()


# --- the table ------------------------------------------------------------------------------------


def measure(
    setting: Setting,
    names: list[str],
    rounds: int,
    machine: Machine,
    source: "ManyTimes | None" = None,
    memory: bool = True,
    written: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """A row for each candidate's step, then one for each stage of ours.

    `written` is given the rows of steps, of stages, and each candidate's again with its memory, as
    soon as they are known.
    """
    fresh_compiler()
    floor_ms = floors_of(setting, machine)
    steps = measure_steps(setting, names, rounds, machine, source, sum(floor_ms.values()))
    written(steps)
    stages = measure_stages(setting, rounds, source, floor_ms, dict.fromkeys(steps[0], ""))
    written(stages)
    if memory:
        release_memory()
        for row in steps:
            if not row["error"]:
                row |= _memory_of(row["candidate"], setting)
                written([row])
    return [*steps, *stages]


def floors_of(setting: Setting, machine: Machine) -> dict[str, float]:
    """Milliseconds of each stage at least."""
    return floors(
        setting.model,
        setting.batch,
        machine,
        num_masked=num_masked(setting.model),
        tokenizer=setting.tokenizer,
        element_bytes=DTYPES[setting.dtype].itemsize,
    )


def measure_steps(
    setting: Setting,
    names: list[str],
    rounds: int,
    machine: Machine,
    source: "ManyTimes | None",
    floor_ms: float,
) -> list[dict]:
    """A row for each candidate; those that cannot run have nan for figures, and the reason."""
    candidates, inputs, failed = {}, {}, {}
    for name in ["ours", *names]:
        try:
            candidate = build(name, setting)
            single = Input(setting, candidate, source)
            with single.open() as batches:
                # On a GPU graphs are captured by the second to the fourth.
                for _ in range(5 if setting.device == "cuda" else 1):
                    candidate.step(next(batches))
            candidates[name], inputs[name] = candidate, single
        except Exception as error:  # a peer that cannot run stops no other
            if name == "ours":
                raise
            failed[name] = reason_of(error)
            candidate = single = None
            gc.collect()
            torch.cuda.empty_cache()
    timings = time_steps(candidates, inputs, rounds)
    flops = model_flops_per_image(setting.model, num_masked(setting.model))
    rows = []
    for name, timing in timings.items():
        ratio, ratio_spread = timings["ours"].ratio(timing)
        rate = 1e3 * setting.batch / timing.median_ms
        stated = machine.peak_flops
        rows.append(
            {
                **_place(setting, "step", name),
                "ms": timing.median_ms,
                "spread": timing.spread,
                "images_per_second": rate,
                "ratio": ratio,
                "ratio_spread": ratio_spread,
                "mfu_stated": rate * flops / stated if stated else "not stated",
                "mfu_measured": rate * flops / machine.flops_per_second,
                "floor_ms": floor_ms,
                "floor": floor_ms / timing.median_ms,
                "peak_mib": "",
                "error": "",
            }
        )
    for name, reason in failed.items():
        known = {**_place(setting, "step", name), "floor_ms": floor_ms}
        rows.append(failed_row(rows[0], reason, **known))
    return rows


def measure_stages(
    setting: Setting,
    rounds: int,
    source: "ManyTimes | None",
    floor_ms: dict[str, float],
    empty: dict[str, str],
) -> list[dict]:
    """A row for each stage of ours, with the columns of `empty`."""
    ours = build_staged(setting)
    candidate = Candidate(model=ours.task.model, step=ours.step, ready=ours.ready)
    stages = time_stages(ours, Input(setting, candidate, source), rounds)
    rows = []
    for stage, timing in stages.items():
        row = {**empty, **_place(setting, stage, "ours")}
        row |= {"ms": timing.median_ms, "spread": timing.spread}
        if stage in floor_ms:
            row |= {"floor_ms": floor_ms[stage], "floor": floor_ms[stage] / timing.median_ms}
        rows.append(row)
    return rows


def release_memory() -> None:
    """Give back what candidates had: another process is to find the device empty."""
    fresh_compiler()  # compiled functions and pools of graphs hold on to models
    gc.collect()
    torch.cuda.empty_cache()


def _memory_of(name: str, setting: Setting) -> dict:
    """The columns of memory: a peak, or nothing and why."""
    try:
        return {"peak_mib": _peak_mib_apart(name, setting, torch.get_num_threads())}
    except Exception as error:  # the times that stand beside it are right
        return {"peak_mib": "", "error": f"memory: {reason_of(error)}"}


def _place(setting: Setting, part: str, name: str) -> dict:
    return {
        "img_size": setting.model.image_pixels[0],
        "batch": setting.batch,
        "tokenizer": setting.tokenizer_name,
        "input": setting.input,
        "part": part,
        "candidate": name,
    }


def profile(setting: Setting, names: list[str], source: "ManyTimes | None", folder: Path) -> None:
    """For each candidate a chrome trace of two steps in the folder, and its most costly kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ["ours", *names]:
        fresh_compiler()
        candidate = build(name, setting)
        single = Input(setting, candidate, source)
        with single.open() as batches:
            for _ in range(3):
                candidate.step(next(batches))
            with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
                for _ in range(2):
                    candidate.step(next(batches))
                synchronize()
        path = folder / f"{name}.json"
        profiler.export_chrome_trace(str(path))
        order = f"self_{setting.device}_time_total"
        print(f"{name}, trace in {path}")
        print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


def stated_peak(device: torch.device, dtype: str) -> float | None:
    """What the maker states for products of this type, where roofline.py knows the machine."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((m.peak_flops for known, m in MACHINES.items() if known in name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=["small", "base", "large"], default="base")
    parser.add_argument("--img-size", type=int, nargs="+", choices=[224, 384, 512], default=[224])
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, else fp32")
    parser.add_argument(
        "--tokenizer", nargs="+", choices=["live", "none"], default=["live", "none"]
    )
    parser.add_argument(
        "--tokenizer-width", type=int, default=256, help="channels of the first group; DALL-E's 256"
    )
    parser.add_argument("--input", choices=["synthetic", "host", "jpeg"], default="synthetic")
    parser.add_argument("--data", type=Path, help="folder of images; default the photographs")
    parser.add_argument("--loader-threads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's")
    rivals = [*PEERS, *(name for name in OURS if name != "ours")]
    parser.add_argument("--peers", nargs="*", choices=rivals, help="default: all that can run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="chrome traces there, and no timing"
    )
    parser.add_argument("--no-memory", action="store_true", help="spare a process per candidate")
    parser.add_argument("--output", type=Path, help="default results/pretrain-<size>-<device>.csv")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    peers = options.peers
    if peers is None:
        peers = rivals if device.type == "cuda" else [n for n in PEERS if "compiled" not in n]
    check(device)
    source = ManyTimes(InMemory(options.data)) if options.input == "jpeg" else None
    settings = [
        Setting(
            model=beit_config(
                f"beit_{options.size}_patch16_{img_size}_8k_vocab",
                drop_path_rate=0.1,
                skip_unread_rows=True,
            ),
            batch=batch,
            device=device.type,
            dtype=dtype,
            tokenizer=encoder_of_width(options.tokenizer_width) if tokenizer == "live" else None,
            input=options.input,
            loader_threads=options.loader_threads,
        )
        for img_size, batch, tokenizer in itertools.product(
            options.img_size, options.batch, options.tokenizer
        )
    ]
    if options.profile is not None:
        for setting in settings:
            profile(setting, peers, source, options.profile)
        return
    roof = measure_roof(device, DTYPES[dtype])
    machine = Machine.of(roof, stated_peak(device, dtype))
    values = conditions(
        device,
        ("timm", "transformers"),
        size=options.size,
        dtype=dtype,
        rounds=options.rounds,
        loader_threads=options.loader_threads if options.input == "jpeg" else "",
        copy_GB_per_s=round(roof.bytes_per_second / 1e9, 1),
        product_TFLOP_per_s=round(roof.flops_per_second / 1e12, 3),
    )
    print(conditions_line(values))
    path = options.output or RESULTS / f"pretrain-{options.size}-{device.type}.csv"
    names = ("img_size", "batch", "tokenizer", "input", "part", "candidate")
    records = Records(path, values, names)
    for setting in settings:
        memory = not options.no_memory
        rows = measure(setting, peers, options.rounds, machine, source, memory, records.add)
        steps = [row for row in rows if row["part"] == "step"]
        shown = ("part", "ms", "spread", "floor_ms", "floor")
        stages = [{n: row[n] for n in shown} for row in rows if row["part"] != "step"]
        print(f"\n{format_results(steps, 'candidate')}\n\n{format_table(stages)}", flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
