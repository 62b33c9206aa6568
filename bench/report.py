"""One page of all that was measured, and the README's tables, from bench/results.

    python bench/report.py --html report.html [--png FOLDER]
    python bench/report.py --readme [--check]         # write the tables, or only compare them

Every figure stands with its conditions, in the page and in the README. A result that is expected
and has no file is "not measured", with the command that measures it; nothing is filled in.
"""

import argparse
import base64
import csv
import html
import io
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from facts import Fact
from report_gpu import gpu_page, gpu_table, read_gpus
from timing import RESULTS, conditions_line

README = Path(__file__).resolve().parents[1] / "README.md"
# Results that the page has a place for, and the commands that write them.
EXPECTED = {
    "pretrain-base-cuda": "python bench/pretrain.py --size base --batch 128 256 --device cuda",
    "pretrain-large-cuda": "python bench/pretrain.py --size large --batch 128 256 --device cuda",
    "pretrain-base-cpu": "python bench/pretrain.py --size base --batch 4 --device cpu",
    "model-base-cuda": "python bench/model.py --device cuda --dtype bf16 --batch 128",
    "model-base-cpu": "python bench/model.py --size base --batch 4",
    "finetune-base-cuda": "python bench/model.py --finetune --device cuda --dtype bf16 --batch 128",
    "finetune-base-cpu": "python bench/model.py --finetune --size base --batch 4",
    "kernels-attention-cuda": "python bench/kernels.py attention",
    "kernels-residual-cuda": "python bench/kernels.py residual",
    "kernels-cross_entropy-cuda": "python bench/kernels.py cross_entropy",
    "kernels-input-cuda": "python bench/kernels.py input",
    "kernels-conv-cuda": "python bench/kernels.py conv",
    "kernels-pieces-cuda": "python bench/kernels.py pieces",
    "tokenizer-speed-random-cuda": "python bench/tokenizer.py speed",
    "data": "python bench/data.py",
    "science-evidence": "python bench/science.py evidence",
    "science-table4": "python bench/science.py table4",
}
SIZES = {"small": "S", "base": "B", "large": "L"}
STAGES = (
    "data", "copy", "input", "tokenizer", "encoder forward", "head", "backward", "optimiser",
)  # fmt: skip
NOT_MEASURED = "not measured"

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


# --- the README -----------------------------------------------------------------------------------


def readme_with_tables(
    text: str, results: dict[str, list[Row]], gpus: dict[str, list[Fact]] | None = None
) -> str:
    """The page with what stands between `<!-- bench: NAME -->` and `<!-- end -->` written anew.

    `gpus` are the facts of bench/gpu.py by GPU. Raises ValueError for a name that is not in TABLES,
    and where one of them has no place.
    """
    found = set()

    def table(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"the README wants a table {name!r}: take one of {', '.join(TABLES)}")
        found.add(name)
        made = TABLES[name](gpus or {} if name == "gpu" else results)
        return f"<!-- bench: {name} -->\n{made}\n<!-- end -->"

    text = re.sub(r"<!-- bench: (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)
    if missing := TABLES.keys() - found:
        lines = "\n".join(f"<!-- bench: {name} -->\n<!-- end -->" for name in sorted(missing))
        raise ValueError(f"the README has no place for {sorted(missing)}: put in\n{lines}")
    return text


def model_table(results: dict[str, list[Row]]) -> str:
    """BEiT-B on a CPU against timm and transformers, by task and pass."""
    return _against_libraries("model-base-cpu", results)


def finetune_table(results: dict[str, list[Row]]) -> str:
    """The same of whole fine-tuning steps."""
    return _against_libraries("finetune-base-cpu", results)


def _against_libraries(name: str, results: dict[str, list[Row]]) -> str:
    rows = results.get(name)
    if not rows:
        return _not_measured(name)
    first = rows[0]
    lines = _sentence(
        f"BEiT-{SIZES[first['size']]} at {first['img_size']} px, batch {first['batch']}, "
        f"{first['dtype']}, {_where(name, first)}"
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
    }
    passes = {"train_step": "training step", "forward": "forward"}
    for task, title in tasks.items():
        for kind, called in passes.items():
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
            f"BEiT-{SIZES[rows[0]['size']]}, {rows[0]['dtype']}, {_where(name, rows[0])}"
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


def mean_and_error(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.1f} ± {error:.1f}"


def gpu_lines(gpus: dict[str, list[Fact]]) -> str:
    """What bench/gpu.py found, beside floors, peers and predictions."""
    return "\n".join(_table(*gpu_table(gpus)))


TABLES: dict[str, Callable[[dict], str]] = {
    "model": model_table,
    "finetune": finetune_table,
    "pretrain": pretrain_table,
    "science": science_table,
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
        f"(`bench/results/{name}.csv`, commit {row['commit']}). Above 1 ours is faster, or takes "
        "less memory."
    )


def _sentence(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def _table(titles: Sequence[str], rows: list[list[str]]) -> list[str]:
    """Lines of markdown."""
    lines = ["".join(f"| {cell} " if cell else "| " for cell in row) for row in (titles, *rows)]
    return [f"{lines[0]}|", f"|{' --- |' * len(titles)}", *(f"{line}|" for line in lines[1:])]


def _not_measured(name: str) -> str:
    return f"{NOT_MEASURED}: `{EXPECTED[name]}`"


# --- the page -------------------------------------------------------------------------------------


def page(
    results: dict[str, list[Row]], gpus: dict[str, list[Fact]] | None = None
) -> tuple[str, dict[str, bytes]]:
    """The HTML, pictures included, and the pictures by name."""
    parts, pictures = [gpu_page(gpus or {})], {}
    for name in [*EXPECTED, *(n for n in results if n not in EXPECTED)]:
        parts.append(f"<h2>{html.escape(name)}</h2>")
        rows = results.get(name)
        if not rows:
            parts.append(f"<p>{NOT_MEASURED}: <code>{html.escape(EXPECTED[name])}</code></p>")
            continue
        parts.append(f"<p>{html.escape(conditions_line(split_row(rows[0])[1]))}</p>")
        for number, (title, picture) in enumerate(charts(name, rows)):
            pictures[f"{name}-{number}"] = picture
            source = base64.b64encode(picture).decode()
            parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{source}">')
        parts.append(html_table([split_row(row)[0] for row in rows]))
    style = (
        "body{font:15px sans-serif;margin:2em;max-width:75em} img{display:block;margin:1em 0} "
        "table{border-collapse:collapse} td,th{padding:2px 9px;text-align:right;"
        "border-bottom:1px solid #ddd}"
    )
    head = f"<meta charset='utf-8'><title>beit_fast, measured</title><style>{style}</style>"
    body = "\n".join(parts)
    text = f"<!doctype html><html><head>{head}</head><body><h1>beit_fast, measured</h1>\n{body}\n"
    return f"{text}</body></html>\n", pictures


def charts(name: str, rows: list[Row]) -> list[tuple[str, bytes]]:
    """Pictures of a file: what it is about, and PNG."""
    kind = name.partition("-")[0]
    note = textwrap.fill(conditions_line(split_row(rows[0])[1]), 130)
    if kind == "pretrain":
        drawn = []
        for setting, group in pretrain_settings(rows):
            steps = [row for row in group if row["part"] == "step"]
            floor = float(steps[0]["floor_ms"])
            by_name = {row["candidate"]: row for row in steps}
            drawn.append(_bars(f"step, {setting}", by_name, floor, note))
            stages = [row for row in group if row["part"] in STAGES]
            drawn.append(_stack(f"stages of ours, {setting}", stages, note))
        return drawn
    if kind == "kernels":
        cases: dict[str, dict[str, Row]] = {}
        for row in rows:
            cases.setdefault(row["case"], {})[row["candidate"]] = row
        return [
            _bars(case, group, float(next(iter(group.values()))["floor_ms"]), note)
            for case, group in cases.items()
        ]
    if kind in ("model", "finetune", "accelerate"):
        groups: dict[str, dict[str, Row]] = {}
        for row in rows:
            title = f"{row['task']}, {row['pass']}, {row['mode']}"
            groups.setdefault(title, {})[row["model"]] = row
        return [_bars(title, group, None, note) for title, group in groups.items()]
    return []


def _bars(title: str, rows: dict[str, Row], floor_ms: float | None, note: str) -> tuple[str, bytes]:
    """Milliseconds by candidate with their spread, and the floor as a line."""
    figure, axes = _axes(title, note, height=1.3 + 0.35 * len(rows))
    names = [name for name in rows if not math.isnan(float(rows[name]["ms"]))][::-1]
    values = [float(rows[name]["ms"]) for name in names]
    spreads = [v * float(rows[n]["spread"] or 0) for n, v in zip(names, values, strict=True)]
    colors = ["tab:blue" if name.startswith("ours") else "silver" for name in names]
    axes.barh(names, values, xerr=spreads, color=colors)
    if floor_ms is not None:
        axes.axvline(floor_ms, color="tab:red", linestyle="--", label=f"floor {floor_ms:.3g} ms")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return title, _png(figure)


def _stack(title: str, stages: list[Row], note: str) -> tuple[str, bytes]:
    """One bar of all stages, and beside it the bar of their floors."""
    figure, axes = _axes(title, note, height=2.3)
    left = {"measured": 0.0, "floor": 0.0}
    for number, row in enumerate(stages):
        widths = {"measured": float(row["ms"]), "floor": float(row["floor_ms"] or 0)}
        for bar, width in widths.items():
            label = f"{row['part']} {width:.3g} ms" if bar == "measured" else None
            axes.barh(bar, width, left=left[bar], color=f"C{number}", label=label)
            left[bar] += width
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return title, _png(figure)


def _axes(title: str, note: str, height: float) -> tuple:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="ms")
    figure.supxlabel(note, fontsize=6)  # a picture is passed on without its page
    return figure, axes


def _png(figure: object) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def html_table(rows: list[Row]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(short(value))}</td>' for value in row.values())}</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"


def short(value: str) -> str:
    """A number with three significant digits, other text as it is."""
    try:
        number = float(value)
    except ValueError:
        return value
    return value if value.isdigit() else f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--html", type=Path, help="write the page here")
    parser.add_argument("--png", type=Path, help="write its pictures into this folder, too")
    parser.add_argument("--readme", action="store_true", help="write the README's tables")
    parser.add_argument("--check", action="store_true", help="with --readme: compare, do not write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args()
    if not (options.html or options.png or options.readme):
        parser.error("nothing to write: pass --html FILE, --png FOLDER or --readme")
    results, gpus = read_results(options.results), read_gpus(options.results)
    if options.readme:
        text = README.read_text(encoding="utf-8")
        made = readme_with_tables(text, results, gpus)
        if options.check and made != text:
            sys.exit("README.md is not what the results say: run python bench/report.py --readme")
        if not options.check:
            README.write_text(made, encoding="utf-8")
    if options.html or options.png:
        text, pictures = page(results, gpus)
        if options.html:
            options.html.write_text(text, encoding="utf-8")
        if options.png:
            options.png.mkdir(parents=True, exist_ok=True)
            for name, picture in pictures.items():
                (options.png / f"{name}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
