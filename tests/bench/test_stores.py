"""The bench of stores reads from a server, and its table has every way."""

import csv


def test_every_way_is_measured_and_stands_in_the_table(bench, tmp_path, monkeypatch):
    stores, tables = bench("stores"), bench("report_tables")
    monkeypatch.setattr(stores, "BATCH", 4)
    path = tmp_path / "stores.csv"
    arguments = ["--latency", "0", "5", "--images", "16", "--rounds", "1", "--output", path]
    monkeypatch.setattr("sys.argv", ["stores.py", *map(str, arguments)])
    stores.main()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    rate = {(r["candidate"], float(r["latency_ms"])): float(r["images_per_second"]) for r in rows}
    # Each of four threads waits for four answers, one after the other or together.
    assert rate["loose, one after the other", 5] < 16 / 0.020
    text = tables.stores_table({"stores": rows})
    assert text.count("\n| loose, a batch at once | ") == 1
    assert "answers after 0 ms | images/s, answers after 5 ms |" in text
    assert tables.stores_table({}) == "not measured: `python bench/stores.py`"
