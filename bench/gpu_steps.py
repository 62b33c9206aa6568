"""Stages of bench/gpu.py that take whole training steps: in four modes, beside peers, in a profile.

`_setting` is a setting of bench/pretrain.py, whose candidates these are.
"""

import dataclasses
import math
import statistics
import time

from facts import read_facts
from gpu_room import Room

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
    from pretrain_candidates import build_ours, synthetic_batch, to_device
    from pretrain_measure import release_memory
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
    from pretrain_candidates import Setting, encoder_of_width

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


def whole_steps(room: Room, stage: str) -> None:
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


# --- where the time goes --------------------------------------------------------------------------


def profile(room: Room) -> None:
    """Where a compiled step's time goes, kernel by kernel, and how long the device is idle."""

    def run(item: str) -> None:
        import torch
        from pretrain_candidates import build_ours, synthetic_batch, to_device
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
