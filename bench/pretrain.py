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
from collections.abc import Callable
from pathlib import Path

import torch
from data_images import InMemory, ManyTimes
from memory import in_own_process
from peers_pretrain import PEERS, Candidate, check
from pretrain_candidates import DTYPES, OURS, Input, Setting, build, encoder_of_width, num_masked
from pretrain_measure import build_staged, peak_mib, release_memory, time_stages, time_steps
from records import Records
from roofline import MACHINES, Machine, floors, model_flops_per_image
from timing import (
    RESULTS,
    conditions,
    conditions_line,
    failed_row,
    format_results,
    format_table,
    fresh_compiler,
    measure_roof,
    reason_of,
    synchronize,
)

from beit_fast.model.config import beit_config


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


def _memory_of(name: str, setting: Setting) -> dict:
    """The columns of memory: a peak, or nothing and why."""
    try:
        peak = in_own_process(peak_mib, name, setting, threads=torch.get_num_threads())
    except Exception as error:  # the times that stand beside it are right
        return {"peak_mib": "", "error": f"memory: {reason_of(error)}"}
    return {"peak_mib": peak}


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
