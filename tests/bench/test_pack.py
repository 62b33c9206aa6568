"""The bench of pack and check measures every work, and damages every image in every way."""

import csv


def test_every_work_and_every_damage_has_a_row(bench, tmp_path, monkeypatch):
    pack = bench("pack")
    outputs = {"--output": tmp_path / "pack.csv", "--damage_output": tmp_path / "damage.csv"}
    arguments = ["--images", "12", "--rounds", "1", "--damaged", "3"]
    arguments += [str(word) for pair in outputs.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["pack.py", *arguments])
    pack.main()

    def rows(name):
        with outputs[name].open(newline="") as file:
            return list(csv.DictReader(file))

    assert [row["work"] for row in rows("--output")] == [
        *("pack", "pack --short_side 256", "check"),
        *("pack without decoding", "check without decoding"),
    ]
    assert all(float(row["images_per_second"]) > 0 for row in rows("--output"))
    damage = rows("--damage_output")
    assert len(damage) == 5
    for row in damage:
        assert sum(int(row[name]) for name in ("refused", "with a warning", "not found")) == 3
    assert damage[-1]["refused"] == "3"  # cut
