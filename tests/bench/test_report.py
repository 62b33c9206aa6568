"""What the report shows is what the files hold, and nothing else."""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def report(bench):
    return bench("report")


@pytest.fixture
def tables(bench):
    return bench("report_tables")


CONDITIONS = {
    "machine": "Test GPU <1>", "threads": "1", "size": "base", "dtype": "bf16", "rounds": "9",
    "torch": "2.11.0", "timm": "1.0", "transformers": "5", "commit": "abc1234",
}  # fmt: skip


def pretrain_rows():
    place = {"img_size": "224", "batch": "256", "tokenizer": "none", "input": "synthetic"}
    empty = {"mfu_stated": "", "mfu_measured": "", "floor_ms": "", "peak_mib": ""}
    rows = []
    for candidate, ms, ratio in (("ours", 50.0, 1.0), ("timm", 70.0, 1.4), ("official", 45.0, 0.9)):
        rows.append(
            {**place, "part": "step", "candidate": candidate, "ms": str(ms), "spread": "0.01",
             "images_per_second": str(256e3 / ms), "ratio": str(ratio), **empty,
             "mfu_stated": "0.54", "mfu_measured": "0.68", "floor_ms": "41.0", **CONDITIONS}
        )  # fmt: skip
    for stage, ms, floor in (("head", 2.0, 1.1), ("backward", 30.0, 25.0), ("copy", 0.5, "")):
        rows.append(
            {**place, "part": stage, "candidate": "ours", "ms": str(ms), "spread": "0.02",
             "images_per_second": "", "ratio": "", **empty, "floor_ms": str(floor), **CONDITIONS}
        )  # fmt: skip
    return rows


def write_pages(root, tables, **pages):
    """README.md with the places of all tables, and the pages of docs/ by name; "" for none."""
    places = "".join(f"<!-- bench: {name} -->\n<!-- end -->\n" for name in tables.TABLES)
    (root / "docs").mkdir()
    (root / "README.md").write_text(pages.pop("readme", f"before\n{places}after"))
    for name, text in pages.items():
        (root / "docs" / f"{name}.md").write_text(text)


def test_a_table_is_written_between_its_markers_alone(report):
    page = (
        "before\n<!-- bench: model -->\nold\n<!-- end -->\nbetween, `<!-- bench: NAME -->` said\n"
        "<!-- bench: pretrain -->\n<!-- end -->\nafter"
    )
    results = {"pretrain-base-cuda": pretrain_rows()}
    made, names = report.with_tables(page, results, {})
    assert made.startswith("before\n<!-- bench: model -->\nnot measured: `python bench/model.py")
    assert "<!-- end -->\nbetween, `<!-- bench: NAME -->` said\n<!-- bench: pretrain -->" in made
    assert made.endswith("<!-- end -->\nafter")
    assert "old" not in made
    assert names == {"model", "pretrain"}
    assert report.with_tables(made, results, {}) == (made, names)


def test_every_page_gets_its_tables_and_a_table_may_stand_in_two(report, tables, tmp_path):
    place = "<!-- bench: model -->\nold\n<!-- end -->\n"
    write_pages(tmp_path, tables, performance=f"# Speed\n{place}", faq="no table\n")
    made = report.tables_of_pages(tmp_path, {}, {})
    assert [path.name for path in made] == ["README.md", "performance.md"]
    for path, text in made.items():
        assert "not measured: `python bench/model.py --size base --batch 4`" in text
        path.write_text(text)
    assert report.tables_of_pages(tmp_path, {}, {}) == {}


def test_pages_are_written_and_compared_by_the_command(
    report, tables, tmp_path, monkeypatch, capsys
):
    write_pages(tmp_path, tables)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    command = f"report.py --results {tmp_path} --pages"
    monkeypatch.setattr("sys.argv", f"{command} --check".split())
    with pytest.raises(SystemExit, match=r"README\.md: not what the results say"):
        report.main()
    assert (tmp_path / "README.md").read_text().count("not measured") == 0
    monkeypatch.setattr("sys.argv", command.split())
    report.main()
    assert (tmp_path / "README.md").read_text().count("not measured") >= len(tables.TABLES)
    monkeypatch.setattr("sys.argv", f"{command} --check".split())
    report.main()
    (tmp_path / "README.md").write_text("<!-- bench: speed -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "README.md wants a table 'speed'" in capsys.readouterr().err


def test_a_slower_case_is_in_the_table_too(tables):
    table = tables.pretrain_table({"pretrain-base-cuda": pretrain_rows()})
    (row,) = [line for line in table.splitlines() if line.startswith("| BEiT-B, 224 px")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "5120", "1.40", "0.90", "68 % of measured, 54 % of stated"
    ]  # fmt: skip
    assert "commit abc1234" in table
    assert "| BEiT-L on a GPU | not measured | | | |" in table


def test_a_peer_that_did_not_run_is_no_figure_and_its_reason_is_on_the_page(report, tables):
    rows = [{"error": "", **row} for row in pretrain_rows()]
    for row in rows:
        if row["candidate"] == "timm":
            row |= dict.fromkeys(("ms", "spread", "images_per_second", "ratio"), "nan")
            row["error"] = "FailOnRecompileLimitHit: the limit is reached"
    table = tables.pretrain_table({"pretrain-base-cuda": rows})
    assert "| did not run | 0.90 |" in table
    assert "nan" not in table
    text, pictures = report.page({"pretrain-base-cuda": rows})
    assert "FailOnRecompileLimitHit: the limit is reached" in text
    assert len(pictures) == 2


def test_pages_that_leave_a_table_without_its_place_are_refused(report, tables, tmp_path):
    write_pages(tmp_path, tables, readme="<!-- bench: model -->\n<!-- end -->", speed="")
    with pytest.raises(ValueError, match=r"no page has a place for .*'pretrain'"):
        report.tables_of_pages(tmp_path, {}, {})
    page = tmp_path / "docs" / "speed.md"
    page.write_text("<!-- bench: speed -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"docs/speed\.md wants a table 'speed': take one of"):
        report.tables_of_pages(tmp_path, {}, {})
    # What stands behind a table that has lost its end stays.
    page.write_text("<!-- bench: model -->\nold\nprose\n<!-- bench: data -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"speed\.md begins tables .* close each with"):
        report.tables_of_pages(tmp_path, {}, {})


def test_tables_show_every_measured_row_slower_ones_too(report, tables):
    results = report.read_results(ROOT / "bench" / "results")
    kernels = tables.kernels_table(results)
    assert "| B4-D192-V1024-forward | 2.65 | eager 0.83, eager-all 1.60 | 51 % |" in kernels
    assert "xformers" not in kernels  # did not run on this machine
    cases = {(n, r["case"]) for n in results if n.startswith("kernels-") for r in results[n]}
    assert kernels.count(" % |") == len(cases)
    accelerate = tables.accelerate_table(results)
    assert "| timm, training step | 5995 | 4906 | 1.21 | 1.45 |" in accelerate
    assert "| transformers, forward | 2177 | 1716 | 1.28 | |" in accelerate
    stages = tables.stages_table(results)
    assert "| backward | 1807 | 63 % | 1742 |" in stages
    assert "| ours bf16 | tf32x3 (chosen) | 98.27 % |" in tables.tokenizer_table(results)
    assert "| ours bf16 | 191 | 2.09 | 64 % |" in tables.tokenizer_table(results)
    data = tables.data_table(results)
    views = [r for r in results["data"] if (r["case"], r["figure"]) == ("fast", "median")]
    median = tables.short(views[0]["value"])
    assert f"| images to two views, per core second | fast | median {median}, low" in data


def test_loaders_stand_with_the_cores_that_gpus_want_and_not_among_the_other_figures(tables):
    figures = {"median": 800.0, "low": 790.0, "ours by it": 1.0, "cores for 3000/s": 3.75}
    bench = "loaders, one view, per core second"
    rows = [
        {"bench": bench, "case": case, "figure": name, "value": str(value), "images": "19"}
        | CONDITIONS
        for case in ("ours", "timm")
        for name, value in figures.items()
    ]
    table = tables.loaders_table({"data": rows})
    assert "| what | loader | images/s and core | ours by it | cores for 3000/s |" in table
    assert "| one view | timm | 800 | 1 | 3.75 |" in table
    assert "timm" not in tables.data_table({"data": rows})
    assert tables.loaders_table({}) == "not measured: `python bench/data.py`"


def test_the_page_needs_no_other_file_and_names_what_is_missing(report):
    text, pictures = report.page({"pretrain-base-cuda": pretrain_rows()})
    assert len(pictures) == 2  # bars of the steps, a stack of the stages
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    sources = re.findall(r'(?:src|href)="(.{11})', text)
    assert sources == ["data:image/"] * 2
    assert text.count("not measured: <code>") == len(report.EXPECTED) - 1 + 1  # and any GPU
    assert "Test GPU &lt;1&gt;" in text
    assert "<td>45</td>" in text


def test_every_file_of_results_has_its_place(report):
    results = report.read_results(ROOT / "bench" / "results")
    text, _ = report.page(results)
    for name, rows in results.items():
        measured, conditions = report.split_row(rows[0])
        assert f"<h2>{name}</h2>" in text
        assert next(iter(conditions)) == "machine"
        assert "commit" in conditions
        assert measured


def test_kernels_are_bars_against_their_floor(report):
    row = {"case": "B4-forward", "candidate": "ours", "ms": "3.0", "spread": "nan"}
    rows = [row | {"floor_ms": "2.0"} | CONDITIONS, row | {"candidate": "eager", "floor_ms": "2.0"}]
    ((title, picture),) = report.charts("kernels-attention-cuda", rows)
    assert title == "B4-forward"
    assert picture.startswith(b"\x89PNG")


def test_commands_write_the_files_that_are_expected(report, bench):
    """The names of EXPECTED are those the benches write."""
    assert all(Path(ROOT, command.split()[1]).exists() for command in report.EXPECTED.values())
    kernels = {name.split("-")[1] for name in report.EXPECTED if name.startswith("kernels-")}
    assert kernels == set(bench("kernels").AREAS)


def test_the_command_writes_page_and_pictures(report, tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    rows = pretrain_rows()
    with (results / "pretrain-base-cuda.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    command = f"report.py --results {results} --html {tmp_path}/r.html --png {tmp_path}/png"
    monkeypatch.setattr("sys.argv", command.split())
    report.main()
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert len(list((tmp_path / "png").glob("pretrain-base-cuda-*.png"))) == 2


def gpu_facts(run="2026-11-28T10:00:00", ms=0.15):
    rest = {"run": run, "s": 1.0}
    figure = {**rest, "kind": "figure", "stage": "kernels", "item": "attention N197"}
    steps = {**rest, "kind": "figure", "stage": "steps", "item": "base", "unit": "images/s"}
    return [
        {**rest, "kind": "note", "stage": "machine", "item": "conditions", "gpu":
         "NVIDIA H100 <80GB>", "capability": "9.0", "torch": "2.11.0", "commit": "abc1234"},
        {**figure, "figure": "forward", "value": ms, "unit": "ms", "floor": 0.09},
        {**rest, "kind": "check", "stage": "kernels", "item": "attention N197",
         "figure": "error of dq", "value": 1.0, "allowed": 0.1, "right": False},
        {**steps, "figure": "ours", "value": 4400.0, "ratio": 1.0, "floor": 6000.0},
        {**steps, "figure": "timm-compiled", "value": 4500.0, "ratio": 0.98, "floor": 6000.0},
    ]  # fmt: skip


def write_gpu(folder, *runs):
    place = folder / "gpu-nvidia-h100"
    place.mkdir(parents=True)
    lines = [json.dumps(fact) for run in runs for fact in run]
    (place / "facts.jsonl").write_text("\n".join(lines) + "\n")


def test_a_gpu_is_shown_beside_floor_peers_and_prediction_slower_cases_too(
    report, tables, bench, tmp_path
):
    write_gpu(tmp_path, gpu_facts())
    gpus = bench("report_gpu").read_gpus(tmp_path)
    lines = tables.gpu_lines(gpus).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [
        ["attention, B 256, N 197, forward", "NVIDIA H100 <80GB>", "0.15 ms", "60 %", "",
         "0.13 to 0.17 ms: as predicted"],
        ["whole steps of BEiT-B, tokens given", "NVIDIA H100 <80GB>", "4400 images/s", "73 %", "",
         "3.8e+03 to 4.75e+03 images/s: as predicted"],
        ["whole steps of BEiT-B, tokens given: timm-compiled", "NVIDIA H100 <80GB>",
         "4500 images/s", "75 %", "0.98", "1.12 to 1.45 times ours: worse"],
    ]  # fmt: skip
    text, _ = report.page({}, gpus)
    assert "<h2>NVIDIA H100 &lt;80GB&gt;</h2>" in text
    assert "0 of 1 checks" in text
    assert "error of dq is 1.0, allowed 0.1" in text


def test_the_newest_run_of_a_stage_counts(tables, bench, tmp_path):
    write_gpu(tmp_path, gpu_facts(ms=0.3), gpu_facts("2026-11-29T10:00:00", ms=0.15)[1:2])
    (facts,) = bench("report_gpu").read_gpus(tmp_path).values()
    table = tables.gpu_lines({"NVIDIA H100": facts})
    assert "0.15 ms" in table
    assert "0.3 ms" not in table
    assert "4400 images/s" in table  # of the run before, which had that stage


def test_a_later_run_that_was_cut_hides_no_figure_and_mends_no_error_it_did_not_try(
    tables, bench, tmp_path
):
    rest = {"s": 1.0, "stage": "kernels", "item": "attention N197"}
    error = {**rest, "run": "1", "kind": "error", "error": "too slow"}
    other = {**rest, "run": "2", "kind": "error", "error": "fell over", "item": "head D768"}
    later = [{**rest, "run": "2", "kind": "begin"}, {**rest, "run": "2", "kind": "cut"}, other]
    write_gpu(tmp_path, [*gpu_facts("1"), error], later)
    gpus = bench("report_gpu").read_gpus(tmp_path)
    assert "0.15 ms" in tables.gpu_lines(gpus)
    (facts,) = gpus.values()
    assert [f["error"] for f in facts if f["kind"] == "error"] == ["fell over"]


def test_without_a_gpu_the_table_has_the_command(tables):
    assert "| all: `python bench/gpu.py` | | not measured | | | |" in tables.gpu_lines({})
