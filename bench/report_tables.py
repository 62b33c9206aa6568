"""The tables of README.md and docs/*.md, from bench/results: Markdown, with conditions."""

import csv
import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from facts import Fact
from many_gpus import many_gpus_table, memory_table
from report_gpu import gpu_table

# Results that have a place, and the commands that write them.
EXPECTED = {
    "pretrain-base-cuda": "python bench/pretrain.py --size base --batch 128 256 --device cuda",
    "pretrain-large-cuda": "python bench/pretrain.py --size large --batch 128 256 --device cuda",
    "pretrain-base-cpu": "python bench/pretrain.py --size base --batch 4 --device cpu",
    "model-base-cuda": "python bench/model.py --device cuda --dtype bf16 --batch 128",
    "model-base-cpu": "python bench/model.py --size base --batch 4",
    "finetune-base-cuda": "python bench/model.py --finetune --device cuda --dtype bf16 --batch 128",
    "finetune-base-cpu": "python bench/model.py --finetune --size base --batch 4",
    "segmentation-small-cpu": "python bench/model.py --tasks segmentation --size small "
    "--img-size 256 --batch 2",
    "accelerate-base-cpu": "python bench/model.py --accelerate --size base --batch 4 "
    "--tasks classifier",
    "kernels-attention-cuda": "python bench/kernels.py attention",
    "kernels-residual-cuda": "python bench/kernels.py residual",
    "kernels-cross_entropy-cuda": "python bench/kernels.py cross_entropy",
    "kernels-input-cuda": "python bench/kernels.py input",
    "kernels-conv-cuda": "python bench/kernels.py conv",
    "kernels-pieces-cuda": "python bench/kernels.py pieces",
    "tokenizer-speed-random-cuda": "python bench/tokenizer.py speed",
    "tokenizer-speed-trained-cpu": "python bench/tokenizer.py speed --tokenizer FILE.safetensors",
    "tokenizer-agreement-trained-cpu": "python bench/tokenizer.py agreement "
    "--tokenizer FILE.safetensors",
    "data": "python bench/data.py",
    "stores": "python bench/stores.py",
    "checkpoint-stall-cpu": "python bench/checkpoint.py stall --size base large",
    "checkpoint-stall-cuda": "python bench/checkpoint.py stall --size base large --device cuda",
    "checkpoint-ranks-cpu": "python bench/checkpoint.py ranks --size base large",
    "science-evidence": "python bench/science.py evidence",
    "science-table4": "python bench/science.py table4",
    "science-segmentation": "python bench/science.py segmentation",
}
SIZES = {"small": "S", "base": "B", "large": "L"}
PASSES = {"train_step": "training step", "forward": "forward", "slide": "a window slid"}
NOT_MEASURED = "not measured"
LOADERS = "loaders, "  # what the benches of data.py begin with that have peers
OURS_IS_BETTER = "Above 1 ours is faster, or takes less memory."

Row = dict[str, str]


def read_results(folder: Path) -> dict[str, list[Row]]:
    """File name without its end -> its rows."""
    results = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            results[path.stem] = list(csv.DictReader(file))
    return results


def split_row(row: Row) -> tuple[Row, Row]:
    """What was measured, and its conditions: those columns start with the machine."""
    names = list(row)
    first = names.index("machine")
    return {n: row[n] for n in names[:first]}, {n: row[n] for n in names[first:]}


def model_table(results: dict[str, list[Row]]) -> str:
    """BEiT-B on a CPU against timm and transformers, by task and pass."""
    return _against_libraries("model-base-cpu", results)


def finetune_table(results: dict[str, list[Row]]) -> str:
    """The same of whole fine-tuning steps."""
    return _against_libraries("finetune-base-cpu", results)


def segmentation_table(results: dict[str, list[Row]]) -> str:
    """Segmenters on a CPU against transformers': a step, a batch, a window that slides."""
    return _against_libraries("segmentation-small-cpu", results)


def _against_libraries(name: str, results: dict[str, list[Row]]) -> str:
    rows = results.get(name)
    if not rows:
        return _not_measured(name)
    first = rows[0]
    lines = _sentence(
        f"BEiT-{SIZES[first['size']]} at {first['img_size']} px, batch {first['batch']}, "
        f"{first['dtype']}, {_where(name, first)} {OURS_IS_BETTER}"
    )
    titles = (
        "task, pass", "ours, ms", "timm / ours", "transformers / ours", "peak memory, the same"
    )  # fmt: skip
    cells = []
    tasks = {
        "classifier": "classifier",
        "features": "features",
        "mim": "masked image modelling",
        "finetune": "fine-tuning",
        "segmentation": "segmentation",
    }
    for task, title in tasks.items():
        for kind, called in PASSES.items():
            who = {
                r["model"]: r
                for r in rows
                if (r["task"], r["pass"], r["mode"]) == (task, kind, "eager")
            }
            if not who:
                continue
            peers = [who.get(peer) for peer in ("timm", "transformers")]
            ratios = [_ratio(p) if p else "has none" for p in peers]
            memory = ", ".join(
                f"{float(p['memory_ratio']):.2f}" for p in peers if p and p["memory_ratio"]
            )
            ours = f"{float(who['ours']['ms']):.0f}"
            cells.append([f"{title}, {called}", ours, *ratios, memory])
    return "\n".join([*lines, "", *_table(titles, cells)])


def accelerate_table(results: dict[str, list[Row]]) -> str:
    """A library's model before `beit_fast.accelerate`, by itself after."""
    name = "accelerate-base-cpu"
    rows = results.get(name)
    if not rows:
        return _not_measured(name)
    first = rows[0]
    lines = _sentence(
        f"BEiT-{SIZES[first['size']]} at {first['img_size']} px, batch {first['batch']}, "
        f"{first['dtype']}, {_where(name, first)} Above 1 it is faster after, or takes less memory."
    )
    measured = {(row["model"], row["pass"]): row for row in rows if row["mode"] == "eager"}
    titles = ("model, pass", "before, ms", "after, ms", "before / after", "peak memory, the same")
    cells = []
    for library in ("timm", "transformers"):
        for kind in ("train_step", "forward"):
            called, before = PASSES[kind], measured[library, kind]
            after = measured[f"accelerated {library}", kind]
            memory = before["memory_ratio"] and f"{float(before['memory_ratio']):.2f}"
            times = [f"{float(row['ms']):.0f}" for row in (before, after)]
            cells.append([f"{library}, {called}", *times, _ratio(before), memory])
    return "\n".join([*lines, "", *_table(titles, cells)])


def stages_table(results: dict[str, list[Row]]) -> str:
    """Where the time of our pre-training step goes, beside the least that each stage can take."""
    name = "pretrain-base-cpu"
    rows = results.get(name)
    if not rows:
        return _not_measured(name)
    lines = _sentence(
        f"BEiT-{SIZES[rows[0]['size']]}, {rows[0]['dtype']}, {_measured_by(name, rows[0])}. "
        "Stages run one after another in an instrumented step."
    )
    cells = []
    for setting, group in pretrain_settings(rows):
        ours = [row for row in group if row["candidate"] == "ours"]
        whole = sum(float(row["ms"]) for row in ours if row["part"] != "step")
        for row in ours:
            floor = row["floor_ms"] and short(row["floor_ms"])
            if row["part"] == "step":
                cells.append([f"step, {setting}", short(row["ms"]), "", floor])
            else:
                share = f"{100 * float(row['ms']) / whole:.0f} %"
                cells.append([row["part"], short(row["ms"]), share, floor])
    titles = ("stage", "ms", "of all stages", "least time, ms")
    return "\n".join([*lines, "", *_table(titles, cells)])


def kernels_table(results: dict[str, list[Row]]) -> str:
    """Every operator that was timed alone, with the times of its peers by ours."""
    names = [name for name in results if name.startswith("kernels-")]
    if not names:
        return _not_measured("kernels-attention-cuda")
    pages = []
    for name in names:
        rows = results[name]
        dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
        lines = _sentence(
            f"{dtypes}, {_measured_by(name, rows[0])}. Above 1 ours is faster, below 1 slower."
        )
        cases: dict[str, list[Row]] = {}
        for row in rows:
            cases.setdefault(row["case"], []).append(row)
        cells = []
        for case, group in cases.items():
            ours = next(row for row in group if row["candidate"] == "ours")
            peers = ", ".join(
                f"{row['candidate']} {_ratio(row)}"
                for row in group
                if row is not ours and not math.isnan(float(row["ms"]))
            )
            cells.append([case, short(ours["ms"]), peers, f"{100 * float(ours['floor']):.0f} %"])
        titles = ("case", "ours, ms", "a peer's time by ours", "of the floor")
        pages += [*lines, "", *_table(titles, cells), ""]
    return "\n".join(pages[:-1])


def tokenizer_table(results: dict[str, list[Row]]) -> str:
    """Images a second of the dVAE's encoder, and how many tokens a precision changes."""
    name, other = "tokenizer-speed-trained-cpu", "tokenizer-agreement-trained-cpu"
    if name not in results or other not in results:
        return _not_measured(name)
    speed, agreement = results[name], results[other]
    lines = _sentence(
        f"dVAE {speed[0]['tokenizer']}, {_measured_by(name, speed[0])}. Above 1 faster than eager."
    )
    titles = ("encoder", "images/s", "eager's time by its own", "of the floor")
    cells = [
        [
            row["candidate"],
            short(row["images/s"]),
            f"{float(row['speedup']):.2f}",
            f"{100 * float(row['floor']):.0f} %",
        ]
        for row in speed
    ]
    tables = [*lines, "", *_table(titles, cells), ""]
    tables += _sentence(
        f"Tokens equal to those of eager fp32, {agreement[0]['images']} images, "
        f"{_measured_by(other, agreement[0])}."
    )
    titles = ("convolutions in", "scores in", "equal tokens")
    cells = [[r["convolutions"], r["scores"], f"{r['equal_%']} %"] for r in agreement]
    return "\n".join([*tables, "", *_table(titles, cells)])


def data_table(results: dict[str, list[Row]]) -> str:
    """Masks, views and batches a second, and how far the fast transform is from the reference."""
    rows = results.get("data")
    if not rows:
        return _not_measured("data")
    shown = rows[0]
    lines = _sentence(f"Images: {shown['images']}; {_measured_by('data', shown)}.")
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["bench"].startswith(LOADERS):
            continue
        figure = f"{row['figure']} {short(row['value'])}"
        groups.setdefault((row["bench"], row["case"]), []).append(figure)
    cells = [[bench, case, ", ".join(figures)] for (bench, case), figures in groups.items()]
    return "\n".join([*lines, "", *_table(("what", "case", "measured"), cells)])


def stores_table(results: dict[str, list[Row]]) -> str:
    """Images a second from a store, by how they are asked for and how long it takes to answer."""
    rows = results.get("stores")
    if not rows:
        return _not_measured("stores")
    shown = rows[0]
    lines = _sentence(
        f"{shown['images']} images of 100 kB from a server on loopback, read by {shown['readers']} "
        f"threads and not decoded; in brackets the microseconds of CPU that one costs. obstore "
        f"{shown['obstore']}, medians of {shown['rounds']} rounds, {_measured_by('stores', shown)}."
    )
    latencies = list(dict.fromkeys(row["latency_ms"] for row in rows))
    measured = {
        (row["candidate"], row["latency_ms"]): f"{short(row['images_per_second'])} "
        f"({short(row['cpu_us_per_image'])})"
        for row in rows
    }
    cells = [
        [candidate, *(measured[candidate, latency] for latency in latencies)]
        for candidate in dict.fromkeys(row["candidate"] for row in rows)
    ]
    heads = [f"images/s, answers after {float(latency):g} ms" for latency in latencies]
    return "\n".join([*lines, "", *_table(("how", *heads), cells)])


def loaders_table(results: dict[str, list[Row]]) -> str:
    """Images a second and core of ours and of other libraries, and the cores that GPUs want."""
    rows = [row for row in results.get("data", []) if row["bench"].startswith(LOADERS)]
    if not rows:
        return _not_measured("data")
    lines = _sentence(f"Images: {rows[0]['images']}; {_measured_by('data', rows[0])}.")
    cases: dict[tuple[str, str], Row] = {}
    for row in rows:
        cases.setdefault((row["bench"], row["case"]), {})[row["figure"]] = short(row["value"])
    cores = sorted({figure for case in cases.values() for figure in case if "cores" in figure})
    cells = []
    for (bench, name), case in cases.items():
        what = bench.removeprefix(LOADERS).split(", per")[0]
        known = (case["median"], case["ours by it"], *(case.get(figure, "") for figure in cores))
        cells.append([what, name, *known])
    titles = ("what", "loader", "images/s and core", "ours by it", *cores)
    return "\n".join([*lines, "", *_table(titles, cells)])


def pretrain_table(results: dict[str, list[Row]]) -> str:
    """Whole steps: images a second of ours, and the times of peers by ours."""
    names = [name for name in EXPECTED if name.startswith("pretrain-")]
    names += sorted(n for n in results if n.startswith("pretrain-") and n not in names)
    peers = ["timm", "timm-compiled", "transformers", "transformers-compiled", "official"]
    measured = {row["candidate"] for name in names for row in results.get(name, [])}
    peers = [peer for peer in peers if peer in measured]
    titles = ("step", "ours, images/s", *(f"{peer} / ours" for peer in peers), "MFU")
    cells, sentences = [], []
    for name in names:
        rows = results.get(name)
        if not rows:
            size, device = name.split("-")[1:3]
            where = "a GPU" if device == "cuda" else "a CPU"
            blank = [""] * (len(peers) + 1)
            cells.append([f"BEiT-{SIZES[size]} on {where}", NOT_MEASURED, *blank])
            continue
        sentences += _sentence(
            f"BEiT-{SIZES[rows[0]['size']]}, {rows[0]['dtype']}, {_where(name, rows[0])} "
            f"{OURS_IS_BETTER}"
        )
        for setting, group in pretrain_settings(rows):
            steps = {r["candidate"]: r for r in group if r["part"] == "step"}
            ratios = [_ratio(steps[p]) if p in steps else "" for p in peers]
            ours = steps["ours"]
            rate = short(ours["images_per_second"])
            title = f"BEiT-{SIZES[ours['size']]}, {setting}"
            cells.append([title, rate, *ratios, utilisation(ours)])
    blank = [""] if sentences else []
    return "\n".join([*sentences, *blank, *_table(titles, cells)])


def _ratio(row: Row) -> str:
    """A peer's time by ours, or that it has none: the page of the report has the reason."""
    return "did not run" if math.isnan(float(row["ratio"])) else f"{float(row['ratio']):.2f}"


def utilisation(row: Row) -> str:
    """Of the products measured in the same run, and of what the maker states where it does."""
    shares = [f"{100 * float(row['mfu_measured']):.0f} % of measured"]
    if row["mfu_stated"] != "not stated":
        shares.append(f"{100 * float(row['mfu_stated']):.0f} % of stated")
    return ", ".join(shares)


def science_table(results: dict[str, list[Row]]) -> str:
    """Test accuracies on digits: mean and standard error over seeds."""
    pages = []
    measures = ("fine-tuned", "linear", "kNN")
    titles = ("fine-tuned, {labels_per_class} labels a class", "linear probe", "kNN")
    for name, corner in (
        ("science-evidence", "weights at the start"),
        ("science-table4", "pre-training"),
    ):
        rows = results.get(name)
        if not rows:
            pages += [_not_measured(name), ""]
            continue
        seeds = len({row["seed"] for row in rows})
        shown = rows[0]
        took = f"{shown['minutes']} minutes in {shown['processes']} processes, "
        means = f"mean and standard error over {seeds} seeds" if seeds > 1 else "one seed"
        lines = _sentence(
            f"Test accuracy in %, {means}; {took if shown['minutes'] else ''}{shown['machine']}, "
            f"torch {shown['torch']} (`bench/results/{name}.csv`, commit {shown['commit']})."
        )
        groups: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            of_variant = groups.setdefault(row["variant"], {})
            of_variant.setdefault(row["measure"], []).append(100 * float(row["accuracy"]))
        cells = []
        for variant, found in groups.items():
            paper = next(row["paper"] for row in rows if row["variant"] == variant)
            beside = [f"{float(paper):.2f}"] if name == "science-table4" else []
            cells.append([variant, *beside, *(mean_and_error(found[m]) for m in measures)])
        heads = [corner, *(title.format(**rows[0]) for title in titles)]
        if name == "science-table4":
            heads.insert(1, "paper, ImageNet-1K")
        else:
            first, second = groups.values()
            gains = [
                mean_and_error([a - b for a, b in zip(first[m], second[m], strict=True)])
                for m in measures
            ]
            cells.append(["difference, seed by seed", *gains])
        pages += [*lines, "", *_table(heads, cells), ""]
    return "\n".join(pages[:-1])


def science_segmentation_table(results: dict[str, list[Row]]) -> str:
    """mIoU on scenes of digits: mean and standard error over seeds, of both sides and paired."""
    name = "science-segmentation"
    rows = results.get(name)
    if not rows:
        return _not_measured(name)
    shown, seeds = rows[0], len({row["seed"] for row in rows})
    took = f"{shown['minutes']} minutes in {shown['processes']} processes, "
    means = f"mean and standard error over {seeds} seeds" if seeds > 1 else "one seed"
    lines = _sentence(
        f"In %, on test scenes, after fine-tuning on {shown['labelled_scenes']} labelled ones; "
        f"{means}; {took if shown['minutes'] else ''}{shown['cpu_minutes']} minutes of one core "
        f"for all training, {shown['machine']}, torch {shown['torch']} "
        f"(`bench/results/{name}.csv`, commit {shown['commit']})."
    )
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of_variant = groups.setdefault(row["variant"], {})
        of_variant.setdefault(row["measure"], []).append(100 * float(row["value"]))
    settings = {row["variant"]: row["setting"] for row in rows}
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    cells = [
        [variant, settings[variant], *(mean_and_error(found[m]) for m in measures)]
        for variant, found in groups.items()
    ]
    first, second = groups.values()
    gains = [[a - b for a, b in zip(first[m], second[m], strict=True)] for m in measures]
    cells.append(["difference, seed by seed", "", *map(mean_and_error, gains)])
    heads = ("weights at the start", "chosen on validation", *measures)
    return "\n".join([*lines, "", *_table(heads, cells)])


def mean_and_error(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.1f} ± {error:.1f}"


def checkpoint_table(results: dict[str, list[Row]]) -> str:
    """What a save costs training, waited for and beside it; then how two ranks save."""
    lines = []
    for name in ("checkpoint-stall-cpu", "checkpoint-stall-cuda"):
        if name not in results:
            lines += [_not_measured(name), ""]
            continue
        shown, cells = results[name][0], []
        loads = sorted({row["load"] for row in results[name]})
        for size in dict.fromkeys(row["size"] for row in results[name]):
            ways = {row["candidate"]: row for row in results[name] if row["size"] == size}
            stalls = [_stall(ways[way]) for way in ("waits", "beside")]
            beside = ways["beside"]
            taken = [short(beside[figure]) for figure in ("call_ms", "write_s", "sha256_s")]
            cells.append([f"BEiT-{SIZES[size]}, {short(beside['GB'])} GB", *stalls, *taken])
        lines += _sentence(
            f"A step waits so long for a save, medians of {shown['rounds']} rounds and the range; "
            f"{_measured_by(name, shown)}, load {' and '.join(loads)}."
        )
        heads = ("state", "`save_async false`, ms", "`true`, ms", "the copy, ms", "writing, s")
        lines += ["", *_table((*heads, "one SHA-256 of it, s"), cells), ""]
    name = "checkpoint-ranks-cpu"
    if name not in results:
        return "\n".join([*lines, _not_measured(name)])
    shown = results[name][0]
    lines += _sentence(
        f"Two ranks over gloo that hold a part of the model each; medians of {shown['rounds']} "
        f"rounds and the range; {_measured_by(name, shown)}."
    )
    cells = [
        [f"BEiT-{SIZES[row['size']]}, {row['candidate']}", _stall(row), short(row["ms"])]
        for row in results[name]
    ]
    heads = ("how they save", "training waits, ms", "on the disk after, ms")
    return "\n".join([*lines, "", *_table(heads, cells)])


def _stall(row: Row) -> str:
    low, high = short(row["stall_low_ms"]), short(row["stall_high_ms"])
    return f"{short(row['stall_ms'])} ({low} to {high})"


def gpu_lines(gpus: dict[str, list[Fact]]) -> str:
    """What bench/gpu.py found, beside floors, peers and predictions."""
    return "\n".join(_table(*gpu_table(gpus)))


TABLES: dict[str, Callable[[dict], str]] = {
    "model": model_table,
    "accelerate": accelerate_table,
    "finetune": finetune_table,
    "segmentation": segmentation_table,
    "pretrain": pretrain_table,
    "stages": stages_table,
    "kernels": kernels_table,
    "tokenizer": tokenizer_table,
    "data": data_table,
    "stores": stores_table,
    "loaders": loaders_table,
    "checkpoint": checkpoint_table,
    "many-gpus": many_gpus_table,
    "memory-of-ranks": memory_table,
    "science": science_table,
    "science-segmentation": science_segmentation_table,
    "gpu": gpu_lines,
}


def pretrain_settings(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The settings of a file of pretrain.py in its order, named, with their rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        tokens = "tokens given" if row["tokenizer"] == "none" else f"tokenizer {row['tokenizer']}"
        name = f"{row['img_size']} px, batch {row['batch']}, {tokens}, {row['input']}"
        groups.setdefault(name, []).append(row)
    yield from groups.items()


def _where(name: str, row: Row) -> str:
    """The conditions of a row as the end of a sentence."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] != '1')} of "
    versions = ", ".join(f"{p} {row[p]}" for p in ("torch", "timm", "transformers") if p in row)
    return (
        f"{threads}{row['machine']}, {versions}; medians of {row['rounds']} interleaved rounds "
        f"(`bench/results/{name}.csv`, commit {row['commit']})."
    )


def _measured_by(name: str, row: Row) -> str:
    """The same of a file without peers of other libraries, and without rounds."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] != '1')} of {row['machine']}"
    return f"{threads}, torch {row['torch']} (`bench/results/{name}.csv`, commit {row['commit']})"


def _sentence(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def _table(titles: Sequence[str], rows: list[list[str]]) -> list[str]:
    """Lines of markdown."""
    lines = ["".join(f"| {cell} " if cell else "| " for cell in row) for row in (titles, *rows)]
    return [f"{lines[0]}|", f"|{' --- |' * len(titles)}", *(f"{line}|" for line in lines[1:])]


def _not_measured(name: str) -> str:
    return f"{NOT_MEASURED}: `{EXPECTED[name]}`"


def short(value: str) -> str:
    """A number with three significant digits, other text as it is."""
    try:
        number = float(value)
    except ValueError:
        return value
    return value if value.isdigit() else f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
