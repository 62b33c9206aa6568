"""What bench/gpu.py found, by GPU, for the page and the tables of bench/report.py.

A folder results/gpu-<name> holds the facts of one GPU; of each figure the newest counts. It stands
beside the share of the machine's least time that it reaches, the peer's time by ours, and what was
predicted before anything was measured.
"""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from facts import (
    Fact,
    expected,
    gpu_of,
    of_kind,
    prediction_of,
    read_facts,
    read_predictions,
    share_of_floor,
    wrong_facts,
)

# Of the table: stage, item and figure as they are called by patterns, and what to call them there.
SHOWN = (
    ("kernels", "attention N197", "forward", "attention, B 256, N 197, forward"),
    ("kernels", "attention N197", "backward", "attention with its bias's gradient, backward"),
    ("kernels", "residual D768 fp32", "forward", "residual and norm, forward"),
    ("kernels", "residual D768 fp32", "backward", "residual and norm, backward"),
    ("kernels", "head D768", "forward and backward", "masked loss, both"),
    ("kernels", "tokenizer", "encode, triton", "tokens of 256 images"),
    ("step", "compiled, graph", "step", "a step of BEiT-B, tokens given"),
)
PEERS = (
    ("steps", "whole steps of BEiT-B, tokens given"),
    ("steps-tokenizer", "the same with the tokenizer"),
    ("large", "whole steps of BEiT-L"),
    ("px384", "BEiT-B at 384 px"),
)
COMMAND = "python bench/gpu.py"


def read_gpus(folder: Path) -> dict[str, list[Fact]]:
    """Name of a GPU -> the newest of each figure, check and note, and the errors of items
    that no later run began."""
    found = {}
    for path in sorted(folder.glob("gpu-*/facts.jsonl")):
        facts = read_facts(path)
        if not (name := gpu_of(facts)):
            continue
        begun = {(f["stage"], f["item"]): f["run"] for f in of_kind(facts, "begin")}
        newest = {}
        for number, fact in enumerate(facts):
            place = (fact["stage"], fact.get("item"))
            if fact["kind"] in ("figure", "check", "note"):
                key = (fact["kind"], *place, fact.get("figure"), fact.get("kernel"))
            elif fact["kind"] == "error" and begun.get(place, fact["run"]) == fact["run"]:
                key = (number,)
            else:
                continue
            newest[key] = fact
        found[name] = list(newest.values())
    return found


def gpu_table(gpus: dict[str, list[Fact]]) -> tuple[Sequence[str], list[list[str]]]:
    """Titles and cells of the table; "not measured" with the command where there is no GPU."""
    titles = ("figure", "GPU", "measured", "of the floor", "a peer's time by ours", "predicted")
    if not gpus:
        return titles, [[f"all: `{COMMAND}`", "", "not measured", "", "", ""]]
    cells = []
    for gpu, facts in gpus.items():
        for stage, item, figure, title in SHOWN:
            cells += [_cells(title, gpu, f) for f in _named(facts, stage, item, figure)]
        for stage, title in PEERS:
            mine = [f for f in of_kind(facts, "figure") if f["stage"] == stage]
            ours = [f for f in mine if f["figure"] == "ours"][:1]
            peers = [f for f in mine if "ratio" in f and f["figure"] != "ours"]
            cells += [_cells(title, gpu, f) for f in ours]
            cells += [_cells(f"{title}: {f['figure']}", gpu, f) for f in peers]
    return titles, cells


def _named(facts: list[Fact], stage: str, item: str, figure: str) -> Iterator[Fact]:
    for fact in of_kind(facts, "figure"):
        if (fact["stage"], fact["item"], fact["figure"]) == (stage, item, figure):
            yield fact


def _cells(title: str, gpu: str, fact: Fact) -> list[str]:
    share, ratio = share_of_floor(fact), fact.get("ratio")
    found = expected(fact, prediction_of(fact, read_predictions()), gpu)
    predicted = ""
    if found:
        of = f" {found.of}" if found.of else f" {fact['unit']}"
        predicted = f"{found.low:.3g} to {found.high:.3g}{of}: {found.verdict}"
    return [
        title,
        gpu,
        f"{fact['value']:.4g} {fact['unit']}",
        f"{100 * share:.0f} %" if share else "",
        f"{ratio:.2f}" if ratio and fact["figure"] != "ours" else "",
        predicted,
    ]


def gpu_page(gpus: dict[str, list[Fact]]) -> str:
    """The HTML of all facts: what is wrong first, then every figure."""
    if not gpus:
        return f"<h2>on a GPU</h2><p>not measured: <code>{COMMAND}</code></p>"
    parts = []
    for gpu, facts in gpus.items():
        parts.append(f"<h2>{html.escape(gpu)}</h2>")
        notes = [f for f in of_kind(facts, "note") if f["item"] in ("conditions", "driver")]
        told = (
            f"{name} {value}"
            for note in notes
            for name, value in note.items()
            if name not in ("run", "s", "kind", "stage", "item")
        )
        checks = list(of_kind(facts, "check"))
        right = sum(f["right"] for f in checks)
        parts.append(f"<p>{html.escape(', '.join(told))}</p>")
        parts.append(f"<p>{right} of {len(checks)} checks against fp64 and for equal bits hold</p>")
        if wrong := wrong_facts(facts):
            rows = [[f["stage"], f["item"], _trouble(f)] for f in wrong]
            parts.append(_table(("stage", "item", "wrong"), rows))
        titles, rows = (
            ("figure", "measured", "of the floor", "a peer's time by ours", "predicted"),
            [],
        )
        for fact in of_kind(facts, "figure"):
            name = f"{fact['stage']}: {fact['item']}, {fact['figure']}"
            title, _, *cells = _cells(name, gpu, fact)
            rows.append([title, *cells])
        parts.append(_table(titles, rows))
        if kernels := [f for f in of_kind(facts, "note") if "kernel" in f]:
            rows = [[f["kernel"], f"{f['ms']:.3f}", f"{f['count']:g}"] for f in kernels]
            parts.append(_table(("kernel of a compiled step", "ms", "launches"), rows))
    return "\n".join(parts)


def _trouble(fact: Fact) -> str:
    if fact["kind"] == "error":
        return fact["error"]
    return f"{fact['figure']} is {fact['value']}, allowed {fact['allowed']}"


def _table(titles: Sequence[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>\n{body}</table>"
