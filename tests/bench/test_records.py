"""A file of results keeps what it has: over a kill, over runs of parts, over other conditions."""

import csv
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
CONDITIONS = {"machine": "A", "rounds": 9, "copy_GB_per_s": 26, "commit": "abc1234"}


@pytest.fixture
def records(bench):
    return bench("records")


def row(case, candidate, ms):
    return {"case": case, "candidate": candidate, "ms": ms, "error": ""}


def read(path):
    with path.open(newline="") as file:
        return {(r["case"], r["candidate"]): r for r in csv.DictReader(file)}


@pytest.fixture
def table(records, tmp_path):
    def make(**changes):
        values = {**CONDITIONS, **changes}
        return records.Records(tmp_path / "table.csv", values, ("case", "candidate"))

    return make


def test_a_row_is_written_as_soon_as_it_is_added(table):
    made = table()
    made.add([row("a", "ours", 1.0), row("a", "eager", 2.0)])
    assert read(made.path).keys() == {("a", "ours"), ("a", "eager")}
    made.add([row("b", "ours", 3.0)])
    assert list(read(made.path)) == [("a", "ours"), ("a", "eager"), ("b", "ours")]


def test_a_run_of_a_part_replaces_its_rows_and_leaves_the_others(table):
    table().add([row("a", "ours", 1.0), row("a", "eager", 2.0), row("b", "ours", 3.0)])
    table(copy_GB_per_s=31).add([row("a", "eager", 5.0), row("c", "ours", 7.0)])
    found = read(table().path)
    assert {name: r["ms"] for name, r in found.items()} == {
        ("a", "ours"): "1.0",
        ("a", "eager"): "5.0",
        ("b", "ours"): "3.0",
        ("c", "ours"): "7.0",
    }
    # The ceiling is of the run that measured the row, and no reason to begin anew.
    assert found["a", "ours"]["copy_GB_per_s"] == "26"
    assert found["a", "eager"]["copy_GB_per_s"] == "31"


@pytest.mark.parametrize(
    "changes", [{"machine": "B"}, {"rounds": 3}, {"commit": "abc1234+changes"}, {"torch": "2.12"}]
)
def test_other_conditions_begin_a_file_anew_and_lose_nothing(table, changes, capsys):
    old = table()
    old.add([row("a", "ours", 1.0)])
    before = old.path.read_text()
    table(**changes).add([row("b", "ours", 3.0)])
    assert read(old.path).keys() == {("b", "ours")}
    kept = old.path.with_name("table.csv.abc1234.old")
    assert kept.read_text() == before
    assert str(kept) in capsys.readouterr().out


def test_other_columns_begin_a_file_anew(table):
    table().add([row("a", "ours", 1.0)])
    table().add([{**row("b", "ours", 3.0), "peak": 5.0}])
    assert read(table().path).keys() == {("b", "ours")}


def test_a_file_without_rows_is_no_obstacle(table):
    table().path.write_text("")
    table().add([row("a", "ours", 1.0)])
    assert read(table().path).keys() == {("a", "ours")}


def test_a_failed_write_leaves_the_file_whole(bench, tmp_path):
    timing, path = bench("timing"), tmp_path / "table.csv"
    timing.write_results(path, [{"a": 1}], {})
    with pytest.raises(ValueError, match="fields"):
        timing.write_results(path, [{"a": 1}, {"b": 2}], {})
    assert path.read_text().split() == ["a", "1"]
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_json_results_follow_the_same_rule(bench, tmp_path):
    tune, path = bench("tune"), tmp_path / "tune.json"
    for part, shape, best in (("forward", 197, 1), ("backward", 197, 2), ("forward", 197, 3)):
        tune.record(path, CONDITIONS, {"part": part, "shape": {"N": shape}, "ms": best})
    kept = bench("records").kept_results(path, CONDITIONS | {"copy_GB_per_s": 1})
    assert [(r["part"], r["ms"]) for r in kept] == [("backward", 2), ("forward", 3)]
    assert bench("records").kept_results(path, CONDITIONS | {"machine": "B"}) == []
    assert path.with_name("tune.json.abc1234.old").exists()


def test_a_killed_bench_leaves_the_cases_that_it_had(tmp_path):
    """The second case never returns; the process is killed there."""
    script = f"""
    import os, sys, torch
    sys.path.insert(0, {str(BENCH)!r})
    import kernels, peers_pieces
    from pathlib import Path
    from timing import Roof
    kernels.RESULTS = Path({str(tmp_path)!r})
    kernels.measure_roof = lambda *_: Roof(1e9, 1e9)
    def cases(device, dtype, only):
        for name in ("first", "second"):
            if name == "second":
                print("case two", flush=True)
                os.read(0, 1)
            if only in name:
                yield kernels.Case(name, {{"ours": list, "eager": dict}}, 1.0, 1.0)
    peers_pieces.cases = cases
    sys.argv = ["kernels.py", "pieces", "--device", "cpu", "--rounds", "2"]
    kernels.main()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "case two" not in (line := process.stdout.readline()):
        assert line, "it ended before the second case"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = read(tmp_path / "kernels-pieces-cpu.csv")
    assert found.keys() == {("first", "ours"), ("first", "eager")}


def test_a_bench_of_one_case_keeps_the_others(bench, tmp_path, monkeypatch):
    kernels, peers, timing = bench("kernels"), bench("peers_pieces"), bench("timing")

    def cases(device, dtype, only):
        for name in ("one", "two"):
            if only in name:
                yield kernels.Case(name, {"ours": list}, 1.0, 1.0, failed={"eager": "no reason"})

    monkeypatch.setattr(peers, "cases", cases)
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    monkeypatch.setattr(kernels, "measure_roof", lambda *_: timing.Roof(1e9, 1e9))
    for only in ("one", "two", "one"):
        command = f"kernels.py pieces --device cpu --rounds 2 --only {only}"
        monkeypatch.setattr("sys.argv", command.split())
        kernels.main()
    found = read(tmp_path / "kernels-pieces-cpu.csv")
    assert list(found) == [("one", "ours"), ("one", "eager"), ("two", "ours"), ("two", "eager")]
    assert found["two", "eager"]["error"] == "no reason"
    assert found["two", "eager"]["ms"] == "nan"


@pytest.mark.parametrize("where", ["no git", "no repository"])
def test_a_commit_is_unknown_without_git_or_history(bench, tmp_path, monkeypatch, where):
    timing = bench("timing")
    if where == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert timing.conditions(timing.torch.device("cpu"))["commit"] == "unknown"


def test_conditions_say_what_is_not_installed(bench):
    timing = bench("timing")
    values = timing.conditions(timing.torch.device("cpu"), ("no-such-package", "numpy"))
    assert values["no-such-package"] == "not installed"
    assert values["numpy"][0].isdigit()
