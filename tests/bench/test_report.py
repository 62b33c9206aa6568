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


def test_a_table_is_written_between_its_markers_alone(report):
    page = (
        "before\n<!-- bench: model -->\nold\n<!-- end -->\nbetween\n"
        "<!-- bench: finetune -->\n<!-- end -->\n"
        "<!-- bench: science -->\n<!-- end -->\n<!-- bench: pretrain -->\n<!-- end -->\n"
        "<!-- bench: gpu -->\n<!-- end -->\nafter"
    )
    made = report.readme_with_tables(page, {"pretrain-base-cuda": pretrain_rows()})
    assert made.startswith("before\n<!-- bench: model -->\nnot measured: `python bench/model.py")
    assert made.endswith("<!-- end -->\nafter")
    assert "old" not in made
    assert report.readme_with_tables(made, {"pretrain-base-cuda": pretrain_rows()}) == made


def test_a_slower_case_is_in_the_table_too(report):
    table = report.pretrain_table({"pretrain-base-cuda": pretrain_rows()})
    (row,) = [line for line in table.splitlines() if line.startswith("| BEiT-B, 224 px")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "5120", "1.40", "0.90", "68 % of measured, 54 % of stated"
    ]  # fmt: skip
    assert "commit abc1234" in table
    assert "| BEiT-L on a GPU | not measured | | | |" in table


def test_a_peer_that_did_not_run_is_no_figure_and_its_reason_is_on_the_page(report):
    rows = [{"error": "", **row} for row in pretrain_rows()]
    for row in rows:
        if row["candidate"] == "timm":
            row |= dict.fromkeys(("ms", "spread", "images_per_second", "ratio"), "nan")
            row["error"] = "FailOnRecompileLimitHit: the limit is reached"
    table = report.pretrain_table({"pretrain-base-cuda": rows})
    assert "| did not run | 0.90 |" in table
    assert "nan" not in table
    text, pictures = report.page({"pretrain-base-cuda": rows})
    assert "FailOnRecompileLimitHit: the limit is reached" in text
    assert len(pictures) == 2


def test_a_readme_without_a_place_for_a_table_is_refused(report):
    with pytest.raises(ValueError, match="no place for"):
        report.readme_with_tables("<!-- bench: model -->\n<!-- end -->", {})
    with pytest.raises(ValueError, match="wants a table 'speed'"):
        report.readme_with_tables("<!-- bench: speed -->\n<!-- end -->", {})


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


def test_a_gpu_is_shown_beside_floor_peers_and_prediction_slower_cases_too(report, bench, tmp_path):
    write_gpu(tmp_path, gpu_facts())
    gpus = bench("report_gpu").read_gpus(tmp_path)
    lines = report.gpu_lines(gpus).splitlines()
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


def test_the_newest_run_of_a_stage_counts(report, bench, tmp_path):
    write_gpu(tmp_path, gpu_facts(ms=0.3), gpu_facts("2026-11-29T10:00:00", ms=0.15)[1:2])
    (facts,) = bench("report_gpu").read_gpus(tmp_path).values()
    table = report.gpu_lines({"NVIDIA H100": facts})
    assert "0.15 ms" in table
    assert "0.3 ms" not in table
    assert "4400 images/s" in table  # of the run before, which had that stage


def test_a_later_run_that_was_cut_hides_no_figure_and_mends_no_error_it_did_not_try(
    report, bench, tmp_path
):
    rest = {"s": 1.0, "stage": "kernels", "item": "attention N197"}
    error = {**rest, "run": "1", "kind": "error", "error": "too slow"}
    other = {**rest, "run": "2", "kind": "error", "error": "fell over", "item": "head D768"}
    later = [{**rest, "run": "2", "kind": "begin"}, {**rest, "run": "2", "kind": "cut"}, other]
    write_gpu(tmp_path, [*gpu_facts("1"), error], later)
    gpus = bench("report_gpu").read_gpus(tmp_path)
    assert "0.15 ms" in report.gpu_lines(gpus)
    (facts,) = gpus.values()
    assert [f["error"] for f in facts if f["kind"] == "error"] == ["fell over"]


def test_without_a_gpu_the_table_has_the_command(report):
    assert "| all: `python bench/gpu.py` | | not measured | | | |" in report.gpu_lines({})
