"""The bench of checkpoints: what it measures is there, and finds its way into the pages."""

import csv

import pytest
import torch


@pytest.fixture
def checkpoint(bench, monkeypatch):
    module = bench("checkpoint")
    monkeypatch.setattr(module, "STEP_MS", 2)
    return module


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_loop_is_timed_with_a_save_and_without(checkpoint, tmp_path):
    threads, path = torch.get_num_threads(), tmp_path / "checkpoint-stall-cpu.csv"
    command = ["stall", "--size", "tiny", "--folder", str(tmp_path), "--rounds", "2"]
    checkpoint.main([*command, "--threads", str(threads), "--output", str(path)])
    rows = {row["candidate"]: row for row in rows_of(path)}
    assert list(rows) == ["none", "waits", "beside"]
    assert float(rows["none"]["stall_ms"]) == 0
    bytes_ = (
        3
        * 4
        * sum(
            p.numel()
            for p in checkpoint.BeitForMaskedImageModeling(checkpoint.model_of("tiny")).parameters()
        )
    )
    for name in ("waits", "beside"):
        assert float(rows[name]["GB"]) == pytest.approx(bytes_ / 1e9)
        assert 0 < float(rows[name]["call_ms"]) < float(rows[name]["ms"])
        assert float(rows[name]["write_s"]) > float(rows[name]["sha256_s"]) > 0
    assert not list(tmp_path.glob("checkpoint_*"))  # the folder that it wrote to


def test_two_ranks_save_in_every_way(checkpoint, tmp_path):
    path = tmp_path / "checkpoint-ranks-cpu.csv"
    command = ["ranks", "--size", "tiny", "--folder", str(tmp_path), "--rounds", "1"]
    threads = torch.get_num_threads()
    checkpoint.main([*command, "--threads", str(threads), "--output", str(path)])
    rows = {row["candidate"]: row for row in rows_of(path)}
    assert list(rows) == ["gather", "gather-later", "dcp", "dcp-async"]
    assert all(0 < float(row["stall_ms"]) <= float(row["ms"]) for row in rows.values())


def test_the_table_shows_both_and_says_what_is_not_measured(bench):
    tables = bench("report_tables")
    conditions = {"machine": "CPU", "threads": "1", "rounds": "7", "torch": "2", "commit": "c"}
    figures = {"size": "base", "stall_ms": "1000.0", "stall_low_ms": "900.0", "ms": "2000"}
    figures |= {"stall_high_ms": "1100.0", "call_ms": "90.0", "GB": "1.1", "write_s": "1.5"}
    figures |= {"sha256_s": "0.7", "load": "0.1"}
    rows = [figures | {"candidate": name} | conditions for name in ("none", "waits", "beside")]
    text = tables.checkpoint_table({"checkpoint-stall-cpu": rows})
    assert "| BEiT-B, 1.1 GB | 1000 (900 to 1100) | 1000 (900 to 1100) | 90 | 1.5 | 0.7 |" in text
    assert text.count("not measured: `python bench/checkpoint.py") == 2
    ranks = [figures | {"candidate": "gather"} | conditions]
    text = tables.checkpoint_table({"checkpoint-ranks-cpu": ranks})
    assert "| BEiT-B, gather | 1000 (900 to 1100) | 2000 |" in text
