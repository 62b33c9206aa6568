"""bench/data_device.py on a CPU; that all of its parts run there, test_gpu.py has."""

import csv
import sys


def test_a_part_is_measured_and_written_with_its_conditions(bench, monkeypatch, tmp_path):
    data_device = bench("data_device")
    monkeypatch.setattr(data_device.Place, "seconds", 0.01)
    file = tmp_path / "data.csv"
    command = ["--device", "cpu", "--rounds", "1", "--only", "decode", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["data_device.py", *command])
    data_device.main()
    with file.open(newline="") as written:
        (row,) = csv.DictReader(written)
    assert row["bench"] == "the device's decoder"
    assert row["case"] == "batches of 4"
    assert float(row["value"]) > 0
    assert row["images"].startswith("19 of 50 kB")
