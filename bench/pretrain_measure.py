"""How bench/pretrain.py measures: whole steps in turns, stages of ours, memory of one process."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from memory import resident_kib
from peers_pretrain import Batch, Candidate
from pretrain_candidates import Input, Ours, Setting, build, build_ours, synthetic_batch, to_device
from timing import Timing, fresh_compiler, synchronize, time_interleaved
from torch import Tensor

from beit_fast.train.loop import compile_mode
from beit_fast.train.optim import clip_gradients
from beit_fast.train.step import autocast


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

    For a process of its own.
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


def release_memory() -> None:
    """Give back what candidates had: another process is to find the device empty."""
    fresh_compiler()  # compiled functions and pools of graphs hold on to models
    gc.collect()
    torch.cuda.empty_cache()
