"""One page of all that was measured, and the tables of the Markdown pages, from bench/results.

    python bench/report.py --html report.html [--png FOLDER]
    python bench/report.py --pages [--check]          # write the tables, or only compare them

Every figure stands with its conditions, in the page and in the tables. A result that is expected
and has no file is "not measured", with the command that measures it; nothing is filled in.

README.md and the pages in docs/ ask for a table by a pair of comments, and what stands between
them is written anew:

    <!-- bench: NAME -->
    <!-- end -->
"""

import argparse
import base64
import html
import io
import math
import re
import sys
import textwrap
from pathlib import Path

from facts import Fact
from report_gpu import gpu_page, read_gpus
from report_tables import (
    EXPECTED,
    NOT_MEASURED,
    TABLES,
    Row,
    pretrain_settings,
    read_results,
    short,
    split_row,
)
from timing import RESULTS, conditions_line

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    "data", "copy", "input", "tokenizer", "encoder forward", "head", "backward", "optimiser",
)  # fmt: skip


def tables_of_pages(
    root: Path, results: dict[str, list[Row]], gpus: dict[str, list[Fact]]
) -> dict[Path, str]:
    """The pages below `root` whose tables are not what the results say, with the text they want.

    `gpus` are the facts of bench/gpu.py by GPU. Raises ValueError that names the page for a table
    that is not in TABLES or has no end, and where one of TABLES stands in no page.
    """
    changed, placed = {}, set()
    for path in [root / "README.md", *sorted(root.glob("docs/**/*.md"))]:
        text = path.read_text(encoding="utf-8")
        try:
            made, names = with_tables(text, results, gpus)
        except ValueError as error:
            raise ValueError(f"{path.relative_to(root)} {error}") from error
        placed |= names
        if made != text:
            changed[path] = made
    if missing := sorted(TABLES.keys() - placed):
        lines = "\n".join(f"<!-- bench: {name} -->\n<!-- end -->" for name in missing)
        raise ValueError(f"no page has a place for {missing}: put into one\n{lines}")
    return changed


def with_tables(
    text: str, results: dict[str, list[Row]], gpus: dict[str, list[Fact]]
) -> tuple[str, set[str]]:
    """A page with its tables written anew, and their names.

    Raises ValueError for a name that is not in TABLES, and for a table without its end.
    """
    found: list[str] = []

    def table(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"wants a table {name!r}: take one of {', '.join(TABLES)}")
        found.append(name)
        made = TABLES[name](gpus if name == "gpu" else results)
        return f"<!-- bench: {name} -->\n{made}\n<!-- end -->"

    # Up to the next comment alone: a table without an end must not swallow what follows.
    place = r"^<!-- bench: (\S+) -->\n(?:(?!<!--).)*?<!-- end -->"
    made = re.sub(place, table, text, flags=re.DOTALL | re.MULTILINE)
    begun = re.findall(r"^<!-- bench: (\S+) -->", text, flags=re.MULTILINE)
    if begun != found:
        raise ValueError(f"begins tables {begun} and ends {found}: close each with <!-- end -->")
    return made, set(found)


# --- the HTML page -----------------------------------------------------------------------------


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
    if kind in ("model", "finetune", "segmentation", "accelerate"):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--html", type=Path, help="write the page here")
    parser.add_argument("--png", type=Path, help="write its pictures into this folder, too")
    parser.add_argument(
        "--pages", action="store_true", help="write the tables of README.md and docs/*.md"
    )
    parser.add_argument("--check", action="store_true", help="with --pages: compare, do not write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args()
    if not (options.html or options.png or options.pages):
        parser.error("nothing to write: pass --html FILE, --png FOLDER or --pages")
    results, gpus = read_results(options.results), read_gpus(options.results)
    if options.pages:
        try:
            made = tables_of_pages(ROOT, results, gpus)
        except ValueError as error:
            parser.error(str(error))
        if options.check and made:
            names = ", ".join(str(path.relative_to(ROOT)) for path in made)
            sys.exit(f"{names}: not what the results say, run python bench/report.py --pages")
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")
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
