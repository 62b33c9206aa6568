"""Step time and peak memory of our BEiT against timm's and transformers', in one run.

    python bench/model.py --size base --batch 4

Three tasks: `classifier` (1000 classes, a position table per block), `features` (the encoder alone,
shared table) and `mim` (75 of 196 patches hidden; timm has no such model, and transformers scores
every patch where we score the hidden ones). A step is forward, loss and backward, without the
optimiser. The ratio is the peer's time or memory by ours: above 1, ours is better. A peer that
cannot run, or that torch.compile would leave eager, has a row without a time, and the reason in it.

    python bench/model.py --tasks segmentation --size small --img-size 256 --batch 2

times segmenters with UPerNet and its second head: a step, a batch in eval mode, and a window that
slides over an image (model_segmentation.py). It has a file of its own.

    python bench/model.py --accelerate --size base --batch 4 --tasks classifier

compares the libraries' models with themselves after `beit_fast.accelerate`: above 1, it helps.

    python bench/model.py --finetune --size base --batch 4

times whole steps of fine-tuning, optimiser included (finetune.py), with or without `--accelerate`.

Results are written after each task and mode, times before memory is measured, into the place of
what the file had for the same models (records.py has the rule), so that a table may be measured by
task. On a GPU all tasks compile for 15 to 20 minutes, as estimated and not measured;
`--tasks classifier`, `--tasks features` and `--tasks mim` take about 6 each.
"""

import argparse
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from finetune import FinetuneStep, Peer, check, make_step
from memory import in_own_process, resident_kib
from model_segmentation import build_segmenter, segmentation_labels, segmenter_config, slide
from peers_models import timm_beit, transformers_config
from records import Records
from timing import (
    RESULTS,
    conditions,
    conditions_line,
    failed_row,
    format_results,
    fresh_compiler,
    reason_of,
    time_interleaved,
)
from torch import Tensor, nn

from beit_fast.acceleration.patching import accelerate
from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling

PEERS = {
    "classifier": ("timm", "transformers"),
    "features": ("timm", "transformers"),
    "mim": ("transformers",),
}
SEGMENTATION = "segmentation"  # of --tasks where it is asked for
FINETUNE = "finetune"  # whole steps of the classifier, with --finetune
NUM_MASKED = 75


@dataclass(frozen=True)
class Setting:
    """All that a candidate is built from."""

    size: str
    img_size: int
    batch: int
    device: str
    dtype: str
    threads: int

    def config(self, task: str) -> BeitConfig:
        suffix = "" if task in ("classifier", FINETUNE) else "_8k_vocab"
        return beit_config(f"beit_{self.size}_patch16_{self.img_size}{suffix}")


@dataclass(frozen=True)
class Inputs:
    images: Tensor
    labels: Tensor
    mask: Tensor
    masked_index: Tensor
    visual_tokens: Tensor


def make_inputs(setting: Setting) -> Inputs:
    """The same for every candidate; each image hides as many patches."""
    generator = torch.Generator().manual_seed(0)
    L = setting.config("mim").num_patches
    hidden = torch.stack([torch.randperm(L, generator=generator) for _ in range(setting.batch)])
    hidden = hidden[:, : NUM_MASKED * L // 196]
    mask = torch.zeros(setting.batch, L, dtype=torch.bool).scatter_(1, hidden, True)
    images = make_images(setting)
    tensors = (
        images,
        torch.randint(1000, (setting.batch,), generator=generator),
        mask,
        mask.flatten().nonzero().flatten().int(),
        torch.randint(8192, (setting.batch, L), generator=generator),
    )
    return Inputs(*(t.to(setting.device) for t in tensors))


def make_images(setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, 3, setting.img_size, setting.img_size)
    return torch.randn(shape, generator=generator).to(setting.device)


def autocast_of(setting: Setting) -> Callable[[], AbstractContextManager]:
    if setting.dtype == "bf16":
        return functools.partial(torch.autocast, setting.device, torch.bfloat16)
    return nullcontext


# --- the candidates: a model, and how it turns inputs into (loss, output) -------------------------


def build_ours(task: str, config: BeitConfig) -> tuple[nn.Module, Callable[[Inputs], Tensor]]:
    if task == "classifier":
        model = BeitForImageClassification(config)
        return model, lambda i: F.cross_entropy(model(i.images), i.labels)
    if task == "features":
        model = Beit(config)
        return model, lambda i: model(i.images).square().mean()
    model = BeitForMaskedImageModeling(config)
    return model, lambda i: model.loss(i.images, i.mask, i.masked_index, i.visual_tokens)[0]


def build_timm(task: str, config: BeitConfig) -> tuple[nn.Module, Callable[[Inputs], Tensor]]:
    model = timm_beit(config, config.num_classes if task == "classifier" else 0)
    if task == "classifier":
        return model, lambda i: F.cross_entropy(model(i.images), i.labels)
    return model, lambda i: model.forward_features(i.images).square().mean()


def build_transformers(
    task: str, config: BeitConfig
) -> tuple[nn.Module, Callable[[Inputs], Tensor]]:
    import transformers

    theirs = transformers_config(config, use_mask_token=task == "mim")
    if task == "classifier":
        model = transformers.BeitForImageClassification(theirs)
        return model, lambda i: F.cross_entropy(model(i.images).logits, i.labels)
    if task == "features":
        model = transformers.BeitModel(theirs, add_pooling_layer=False)
        return model, lambda i: model(i.images).last_hidden_state.square().mean()
    model = transformers.BeitForMaskedImageModeling(theirs)
    return model, lambda i: model(i.images, i.mask, labels=i.visual_tokens[i.mask]).loss


BUILD = {"ours": build_ours, "timm": build_timm, "transformers": build_transformers}
ACCELERATED = "accelerated "  # before a library's name: its model after `accelerate`


def build(name: str, task: str, config: BeitConfig) -> tuple[nn.Module, Callable[[Inputs], Tensor]]:
    model, loss = BUILD[name.removeprefix(ACCELERATED)](task, config)
    if name.startswith(ACCELERATED):
        report = accelerate(model)
        assert not report.left, report
    return model, loss


@dataclass(frozen=True)
class Candidate:
    """One model's timed calls."""

    train_step: Callable[[], object]
    forward: Callable[[], object]
    slide: Callable[[], object] | None = None  # of a segmenter


def build_peer(name: str, config: BeitConfig) -> Peer | None:
    """A library's classifier for finetune.py, after `accelerate` where the name says so."""
    if name == "ours":
        return None
    model, _ = build(name, "classifier", config)
    if name.endswith("timm"):
        return Peer(model, lambda model, images: model(images), "house")
    return Peer(model, lambda model, images: model(images).logits, "hf5")


def make_candidate(name: str, task: str, setting: Setting, compiled: bool = False) -> Candidate:
    torch.manual_seed(0)
    if task == FINETUNE:
        step = finetune_step(name, setting, compiled)
        return Candidate(step, step.forward)
    if task == SEGMENTATION:
        return segmenter_candidate(name, setting, compiled)
    with torch.device(setting.device):
        model, loss = build(name, task, setting.config(task))
    model.train()
    inputs = make_inputs(setting)
    if compiled:
        loss = torch.compile(loss, dynamic=False)
    autocast = autocast_of(setting)

    def train_step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            value = loss(inputs)
        value.backward()

    @torch.no_grad()
    def forward() -> None:
        with autocast():
            loss(inputs)

    return Candidate(train_step, forward)


def segmenter_candidate(name: str, setting: Setting, compiled: bool) -> Candidate:
    config = segmenter_config(setting.size, setting.img_size)
    with torch.device(setting.device):
        model, loss = build_segmenter(name, config)
    images = make_images(setting)
    labels = segmentation_labels(config, setting.batch, setting.device)
    call = model
    if compiled:
        loss, call = torch.compile(loss, dynamic=False), torch.compile(model, dynamic=False)
        call.config = model.config
    over_image = slide(call, config, setting.device)
    autocast = autocast_of(setting)

    def train_step() -> None:
        model.train().zero_grad(set_to_none=True)
        with autocast():
            value = loss(images, labels)
        value.backward()

    @torch.no_grad()
    def forward() -> None:
        model.eval()
        with autocast():
            call(images)

    @torch.no_grad()
    def slide_over() -> None:
        model.eval()
        with autocast():
            over_image()

    return Candidate(train_step, forward, slide_over)


def finetune_step(name: str, setting: Setting, compiled: bool) -> FinetuneStep:
    config = setting.config(FINETUNE)
    return make_step(
        config,
        build_peer(name, config),
        batch=setting.batch,
        device=setting.device,
        precision=setting.dtype,
        compiled=compiled,
    )


# --- memory ---------------------------------------------------------------------------------------


def peak_cpu_mib(name: str, task: str, setting: Setting) -> float:
    """What one training step adds to the resident memory of a process that holds the model.

    For a process of its own.
    """
    candidate = make_candidate(name, task, setting)
    before = resident_kib("VmRSS")
    candidate.train_step()
    candidate.train_step()
    return (resident_kib("VmHWM") - before) / 2**10


def peak_cuda_mib(candidate: Candidate) -> float:
    """What one training step adds to the allocated memory beside the model and its gradients."""
    candidate.train_step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    candidate.train_step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# --- the run --------------------------------------------------------------------------------------


def bench(
    task: str,
    names: tuple[str, ...],
    setting: Setting,
    compiled: bool,
    rounds: int,
    written: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """The candidates in one run; ratios are of each by the first.

    `written` is given all rows when they are timed, and again with the peaks of memory.
    """
    fresh_compiler()
    candidates, failed = {}, {}
    for name in names:
        try:
            candidate = make_candidate(name, task, setting, compiled)
            candidate.train_step()
            candidate.forward()
            candidates[name] = candidate
        except Exception as error:  # a peer that cannot run stops no other
            if name == names[0]:
                raise
            failed[name] = reason_of(error)
    rows = []
    device = torch.device(setting.device)
    place = {"task": task, "mode": "compiled" if compiled else "eager"}
    for kind in ("train_step", "forward", *(("slide",) if task == SEGMENTATION else ())):
        calls = {name: getattr(candidate, kind) for name, candidate in candidates.items()}
        timings = time_interleaved(calls, device=device, rounds=rounds)
        for name, timing in timings.items():
            ratio, ratio_spread = timings[names[0]].ratio(timing)
            rows.append(
                {
                    **place,
                    "pass": kind,
                    "model": name,
                    "ms": timing.median_ms,
                    "spread": timing.spread,
                    "images_per_second": 1e3
                    * (1 if kind == "slide" else setting.batch)
                    / timing.median_ms,
                    "ratio": ratio,
                    "ratio_spread": ratio_spread,
                    "peak_mib": "",
                    "memory_ratio": "",
                    "error": "",
                }
            )
        place_of = {**place, "pass": kind}
        rows += [failed_row(rows[0], why, model=name, **place_of) for name, why in failed.items()]
    written(rows)
    _add_memory([row for row in rows if row["pass"] == "train_step"], candidates, setting)
    written(rows)
    return rows


def _add_memory(rows: list[dict], candidates: dict[str, Candidate], setting: Setting) -> None:
    """Peaks beside the times of rows, and by the first one's; where there is none, why."""
    first = None
    for row in rows:
        if (name := row["model"]) not in candidates:
            continue
        try:
            if setting.device == "cuda":
                peak = peak_cuda_mib(candidates[name])
            else:
                peak = in_own_process(
                    peak_cpu_mib, name, row["task"], setting, threads=setting.threads
                )
        except Exception as error:  # the times are right
            row["error"] = f"memory: {reason_of(error)}"
            continue
        first = peak if row is rows[0] else first
        row["peak_mib"], row["memory_ratio"] = peak, peak / first if first else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=["small", "base", "large"], default="base")
    parser.add_argument("--img-size", type=int, choices=[224, 256, 384, 512], default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", choices=[*PEERS, SEGMENTATION], default=list(PEERS))
    parser.add_argument(
        "--finetune", action="store_true", help="whole steps of fine-tuning, in place of --tasks"
    )
    parser.add_argument(
        "--accelerate", action="store_true", help="each library before and after accelerate()"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--output", type=Path, help="CSV; default results/<what>-<size>-<device>.csv"
    )
    options = parser.parse_args()
    if SEGMENTATION in options.tasks and (options.accelerate or options.tasks != [SEGMENTATION]):
        parser.error(f"{SEGMENTATION} has a file of its own: ask for it alone")

    torch.set_num_threads(options.threads)
    setting = Setting(
        options.size,
        options.img_size,
        options.batch,
        options.device,
        options.dtype,
        options.threads,
    )
    values = conditions(
        torch.device(setting.device),
        ("timm", "transformers"),
        size=setting.size,
        img_size=setting.img_size,
        batch=setting.batch,
        dtype=setting.dtype,
        rounds=options.rounds,
    )
    print(conditions_line(values))
    stem = "accelerate" if options.accelerate else "model"
    if options.finetune:
        stem = "finetune-accelerate" if options.accelerate else FINETUNE
    elif options.tasks == [SEGMENTATION]:
        stem = SEGMENTATION
    path = options.output or RESULTS / f"{stem}-{setting.size}-{setting.device}.csv"
    records = Records(path, values, ("task", "mode", "pass", "model"))
    for task in (FINETUNE,) if options.finetune else options.tasks:
        peers = PEERS.get("classifier" if task == FINETUNE else task, ("transformers",))
        runs = [("ours", *peers)]
        if options.accelerate:
            runs = [(ACCELERATED + peer, peer) for peer in peers]
        if task == FINETUNE:
            for name in {name for names in runs for name in names} - {"ours"}:
                check(functools.partial(build_peer, name), name, setting.device)
        for compiled in (False, True) if setting.device == "cuda" else (False,):
            for names in runs:
                rows = bench(task, names, setting, compiled, options.rounds, records.add)
                print(format_results(rows, "model"), flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
