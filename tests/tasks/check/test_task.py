"""Everything is looked at once, and what is told is what is there."""

import io
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from beit_fast import cli
from beit_fast.data.bad_samples import BadDataError
from beit_fast.data.loader import Loader
from beit_fast.data.sources.decode import BadImageError, decode_fast
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.tasks.check import task
from beit_fast.tasks.check.complaints import Complaints
from beit_fast.tasks.check.config import CheckConfig
from beit_fast.tasks.check.findings import look_at
from beit_fast.tasks.check.task import run_check
from beit_fast.train.stop import Interrupted
from labelled_images import write_class_folders
from object_server import serving
from shards import picture, write_shards
from tables import row, write_table


def encoded(width, height, kind, mode="RGB", seed=0, **options):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height)).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def check(tmp_path):
    """`check(images, **settings)`: the report, as it was written."""

    def check(images, **settings):
        output = tmp_path / "reports" / "check.json"
        options = {"num_threads": 2, "img_size": 40} | settings
        run_check(CheckConfig(images=str(images), output=str(output), **options))
        return json.loads(output.read_text())

    return check


@pytest.fixture
def planted(tmp_path):
    """Two classes, and in them one of everything that a check tells."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a/whole.jpg": encoded(80, 60, "JPEG", seed=1),
        "a/whole too.png": encoded(90, 50, "PNG", seed=2),
        "a/grey.jpg": encoded(81, 60, "JPEG", "L", seed=3),
        "a/cmyk.jpg": encoded(82, 60, "JPEG", "CMYK", seed=4),
        "a/same.jpg": encoded(80, 60, "JPEG", seed=1),
        "b/same in b.jpg": encoded(80, 60, "JPEG", seed=1),
        "b/same as well.png": encoded(70, 70, "PNG", "RGBA", seed=5),
        "b/and this.png": encoded(70, 70, "PNG", "RGBA", seed=5),
        "b/small.png": encoded(100, 39, "PNG", seed=6),
        "b/not small.png": encoded(40, 100, "PNG", seed=6),
        "b/blank.png": _blank(),
        "b/turned.jpg": encoded(60, 50, "JPEG", seed=7, exif=exif),
        "b/is a jpeg.png": encoded(60, 50, "JPEG", seed=8),
        "b/palette.gif": encoded(60, 50, "GIF", "P", seed=9),
        "b/empty.jpg": b"",
        "b/text.jpg": b"<html>",
        "b/cut.jpg": encoded(300, 200, "JPEG", seed=10)[:2000],
        "b/cut.png": encoded(300, 200, "PNG", seed=11)[:-100],
    }
    folder = tmp_path / "images"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def _blank():
    file = io.BytesIO()
    Image.new("RGB", (60, 60), (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


def test_the_report_is_what_was_planted(planted, check, tmp_path):
    with pytest.raises(ValueError, match=r"4 of 18 images cannot be used: .*Repair or remove them"):
        check(planted)
    report = json.loads((tmp_path / "reports" / "check.json").read_text())

    def names(*short):
        return [str(planted / name) for name in short]

    bad = {entry["image"]: entry["why"] for entry in report["cannot_be_used"]}
    assert sorted(bad) == names("b/cut.jpg", "b/cut.png", "b/empty.jpg", "b/text.jpg")
    assert bad[str(planted / "b/empty.jpg")] == "the file is empty"
    assert (report["images"], report["usable"], report["unread"]) == (18, 14, 0)
    assert report["formats"] == {"JPEG": 7, "PNG": 6, "GIF": 1}
    assert report["modes"] == {"RGB": 9, "RGBA": 2, "L": 1, "CMYK": 1, "P": 1}
    assert report["small"] == {"below": 40, "images": names("b/small.png")}
    assert report["blank"] == names("b/blank.png")
    assert report["turned_by_exif"] == names("b/turned.jpg")
    assert report["named_as_another_format"] == names("b/is a jpeg.png")
    assert report["duplicates"] == [
        {
            "images": names("a/same.jpg", "a/whole.jpg", "b/same in b.jpg"),
            "in_several_classes": True,
        },
        {"images": names("b/and this.png", "b/same as well.png"), "in_several_classes": False},
    ]
    assert report["classes"] == {
        "count": 2,
        "images": {"a": 5, "b": 13},
        "without_a_usable_image": [],
    }
    sides = {(80, 60): 3, (90, 50): 1, (81, 60): 1, (82, 60): 1, (70, 70): 2, (100, 39): 1}
    sides |= {(40, 100): 1, (60, 60): 1, (60, 50): 3}
    for name, values in {
        "width": [width for (width, _), count in sides.items() for _ in range(count)],
        "short_side": [min(size) for size, count in sides.items() for _ in range(count)],
    }.items():
        found, values = report[name], sorted(values)
        assert (found["min"], found["max"]) == (values[0], values[-1])
        assert found["median"] in values[6:8]
    assert report["bytes"] == sum(
        path.stat().st_size for path in planted.rglob("*.*") if str(path) not in bad
    )


def test_the_table_says_the_same(planted, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", str(planted), "--img_size", "40"]) == 1
    said = capsys.readouterr()
    rows = {}
    for line in said.out.splitlines():
        if line.startswith("  ") and line[2] != " ":
            rows[line[2:20].strip()] = line[21:]
    assert rows["decoded"].startswith("14 of 18, ")
    assert rows["cannot be used"] == "4"
    assert rows["formats"] == "7 JPEG, 6 PNG, 1 GIF"
    assert rows["below 40 px"] == "1, enlarged by training"
    assert rows["duplicates"] == (
        "3, equal to another file to the last byte; files with several classes: 1"
    )
    assert rows["classes"] == "2; images of each: min 5 (a), median 13, max 13 (b)"
    assert f"{planted / 'b/empty.jpg'} (the file is empty)" in said.out
    (last,) = (line for line in said.err.splitlines() if line.startswith("beit-fast: "))
    assert "Training, which bears 1, would stop; as test images none is borne" in last
    assert "check.json names them all" in last
    assert (tmp_path / "check.json").exists()


def test_a_whole_set_ends_with_0_and_nothing_is_changed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_class_folders(tmp_path / "images", 3, seed=0)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert cli.main(["check", str(folder), "--output", "sub/report.json"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    report = json.loads((tmp_path / "sub" / "report.json").read_text())
    assert (report["images"], report["usable"], report["duplicates"]) == (9, 9, [])
    assert report["source"] == f"{folder}: 9 images, 3 classes"


def test_what_it_says_of_training_is_what_training_does(planted, check):
    class Pixels:
        def __call__(self, data, seed):
            return {"size": np.int64(len(decode_fast(data)) * 0)}

        def collate(self, samples):
            return {k: np.stack([sample[k] for sample in samples]) for k in samples[0]}

    def train(share):
        loader = Loader(
            ImageFolder(planted), Pixels(), batch_size=18, num_threads=0, max_bad_share=share
        )
        for number, _ in zip(range(3), loader.batches(), strict=False):
            assert number < 3
        return loader.bad_samples

    for share, borne, does in ((0.001, 1, "would stop"), (0.25, 4, "bears them and replaces each")):
        with pytest.raises(ValueError, match=f"which bears {borne}, {does}"):
            check(planted, max_bad_share=share)
    assert len(train(0.25)) == 4
    with pytest.raises(BadDataError):
        train(0.001)


@pytest.mark.parametrize("num_threads", [1, 7])
def test_the_report_does_not_depend_on_threads(planted, check, tmp_path, num_threads):
    def report(num_threads):
        with pytest.raises(ValueError, match="cannot be used"):
            check(planted, num_threads=num_threads)
        found = json.loads((tmp_path / "reports" / "check.json").read_text())
        return {k: v for k, v in found.items() if k not in ("seconds", "num_threads")}

    assert report(num_threads) == report(3)


def test_shards_are_checked_and_a_damaged_one_is_told(check, tmp_path):
    folder = write_shards(tmp_path / "shards")
    report = check(folder)
    assert (report["images"], report["formats"]) == (15, {"JPEG": 15})
    assert report["classes"]["images"] == {"0": 5, "1": 5, "2": 5}
    path = folder / "train-0001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"used: {path} .*Training, which bears 1, bears"):
        check(folder)
    report = json.loads((tmp_path / "reports" / "check.json").read_text())
    assert list(report["damage"]) == [str(path)]
    assert report["cannot_be_used"] == []


def test_tables_and_stores_are_checked_too(check, tmp_path, monkeypatch):
    table = write_table(tmp_path / "tables" / "a.parquet", [row(number) for number in range(7)])
    report = check(table)
    assert (report["usable"], report["formats"]) == (7, {"JPEG": 7})
    assert report["classes"]["images"] == {"cat": 3, "dog": 2, "owl": 2}
    objects = {f"set/{'ab'[n % 2]}/{n}.jpg": picture(n) for n in range(9)}
    objects["set/b/9.jpg"] = b"broken"
    with serving(objects) as server:
        for name, value in server.s3().items():
            monkeypatch.setenv(name, value)
        server.meets("set/a/2.jpg", "500", "reset")
        with pytest.raises(ValueError, match="1 of 10 images cannot be used: s3://bucket/set/b/9"):
            check("s3://bucket/set")
    report = json.loads((tmp_path / "reports" / "check.json").read_text())
    assert (report["usable"], report["unread"]) == (9, 0)
    assert report["classes"]["images"] == {"a": 5, "b": 5}


def test_without_classes_it_says_why(check, tmp_path, capsys):
    for number in range(3):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(picture(number))
    report = check(tmp_path / "flat")
    assert report["classes"] is None
    assert "lies in" in report["no_classes"]
    assert "classes            none: 0.jpg lies in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not exist"):
        check(tmp_path / "missing")


@pytest.mark.parametrize("name", ["photographs", "digits:valid", "digit-scenes:test:3"])
def test_data_sets_without_a_folder_are_checked_too(check, name):
    report = check(name, img_size=32)
    assert report["images"] == report["usable"] > 10 or name.startswith("digit-scenes")


def test_a_class_of_which_nothing_is_usable_is_told(check, tmp_path, capsys):
    folder = write_class_folders(tmp_path / "images", 3, seed=0)
    for path in (folder / "red").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 9"):
        check(folder)
    report = json.loads((tmp_path / "reports" / "check.json").read_text())
    assert report["classes"]["without_a_usable_image"] == ["red"]
    assert "1 have no usable image" in capsys.readouterr().out


def test_of_no_usable_image_there_is_a_report_too(check, tmp_path):
    folder = tmp_path / "images"
    for name in ("a/1.png", "b/2.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of 2"):
        check(folder)
    report = json.loads((tmp_path / "reports" / "check.json").read_text())
    assert (report["usable"], report["width"], report["duplicates"]) == (0, {}, [])


def test_what_cannot_be_read_is_told_apart_from_what_is_broken(
    check, tmp_path, monkeypatch, capsys
):
    folder = write_class_folders(tmp_path / "images", 3, seed=0)
    read = ImageFolder.read

    def fail(self, index):
        if self.paths[index] == "red/1.png":
            time.sleep(0.6)
        if self.paths[index] == "red/2.png":
            raise BadImageError("broken")
        return read(self, index)

    monkeypatch.setattr(ImageFolder, "read", fail)
    with pytest.raises(ValueError, match="2 of 9"):
        check(folder, read_timeout=0.3)
    report = json.loads((tmp_path / "reports" / "check.json").read_text())
    assert report["unread"] == 1
    why = {entry["image"]: entry["why"] for entry in report["cannot_be_used"]}
    assert why == {
        str(folder / "red" / "1.png"): "no answer within 0.3 s",
        str(folder / "red" / "2.png"): "broken",
    }
    assert "cannot be used     2, of which 1 could not be read" in capsys.readouterr().out


def test_a_signal_ends_it_and_says_how_far_it_came(check, tmp_path, monkeypatch):
    folder = write_class_folders(tmp_path / "images", 3, seed=0)
    add, calls = task.Findings.add, []

    def stop(self, index, look):
        calls.append(index)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, index, look)

    monkeypatch.setattr(task.Findings, "add", stop)
    with pytest.raises(Interrupted, match=r"SIGTERM while checking; 4 of 9 .*begins anew") as told:
        check(folder)
    assert told.value.exit_code == 143
    assert not (tmp_path / "reports" / "check.json").exists()


def test_names_that_are_no_text_are_told(check, tmp_path, capsys):
    folder = write_class_folders(tmp_path / "images", 2, seed=0)
    name = os.fsdecode(os.fsencode(folder / "red") + b"/\xff\n[b].png")
    with open(name, "wb") as file:
        file.write(b"")
    with pytest.raises(ValueError, match="1 of 7"):
        check(folder)
    report = json.loads((tmp_path / "reports" / "check.json").read_text())
    assert report["cannot_be_used"][0]["image"] == name
    assert r"/red/\udcff\n[b].png (the file is empty)" in capsys.readouterr().out


def test_of_many_broken_ones_some_are_named_and_the_report_has_all(check, tmp_path, caplog):
    folder = tmp_path / "images"
    for number in range(40):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number) if number < 4 else b"broken")
    with pytest.raises(ValueError, match=r"36 of 40 images cannot be used.* and 31 more"):
        check(folder)
    assert caplog.text.count("cannot use") == task._NAMED
    assert "further ones are counted, and named in the report" in caplog.text
    report = json.loads((tmp_path / "reports" / "check.json").read_text())
    assert len(report["cannot_be_used"]) == 36


def test_a_report_that_could_not_be_written_is_refused_before_the_work(planted, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    for output in (file / "below.json", tmp_path):
        with pytest.raises(OSError, match="--output"):
            run_check(CheckConfig(images=str(planted), output=str(output)))


def test_every_image_is_read_once(tmp_path, check, monkeypatch):
    folder = write_class_folders(tmp_path / "images", 4, seed=0)
    read, seen = ImageFolder.read, []
    monkeypatch.setattr(ImageFolder, "read", lambda self, n: seen.append(n) or read(self, n))
    check(folder)
    assert sorted(seen) == list(range(12))


def test_an_image_of_one_colour_but_for_a_pixel_is_not_blank():
    pixels = np.zeros((64, 64, 3), np.uint8)
    for change, is_blank in ((0, True), (1, False)):
        pixels[37, 41, 2] = change
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        with Complaints() as complaints:
            assert look_at(file.getvalue(), 10**9, complaints).is_blank == is_blank


def test_equal_files_are_found_among_many(check, tmp_path):
    folder = tmp_path / "images"
    for number in range(60):
        path = folder / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number % 50))
    report = check(folder)
    pairs = {tuple(os.path.basename(n)[:2] for n in one["images"]) for one in report["duplicates"]}
    assert pairs == {(f"{number:02d}", f"{number + 50}") for number in range(10)}
    assert not any(one["in_several_classes"] for one in report["duplicates"])
    shutil.copy(folder / "a" / "30.jpg", folder / "b")
    (found,) = (one for one in check(folder)["duplicates"] if one["in_several_classes"])
    assert [os.path.basename(name) for name in found["images"]] == ["30.jpg", "30.jpg"]


def with_a_hole(number):
    """A JPEG that misses some bytes in the middle; it decodes."""
    data = encoded(200, 150, "JPEG", seed=number, quality=95)
    return data[: 900 + 13 * number] + data[940 + 13 * number :]


@pytest.mark.parametrize("num_threads", [1, 6])
def test_what_the_library_complains_of_has_a_name_and_nothing_else_is_lost(
    tmp_path, capfd, num_threads
):
    folder, wanted = tmp_path / "images", {}
    for number in range(60):
        path = folder / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(with_a_hole(number) if number % 3 == 0 else picture(number))
        decode_fast(path.read_bytes())  # alone, it says what it has to say here
        if said := capfd.readouterr().err:
            wanted[str(path)] = said.rstrip("\n")
    assert len(wanted) > 10
    (folder / "a" / "00.jpg").write_bytes(b"broken")
    wanted.pop(str(folder / "a" / "00.jpg"), None)
    output = tmp_path / "check.json"
    arguments = ["--num_threads", str(num_threads), "--output", str(output)]
    assert cli.main(["check", str(folder), *arguments]) == 1
    report = json.loads(output.read_text())
    found = {entry["image"]: entry["why"] for entry in report["decoded_with_a_warning"]}
    assert found == wanted
    said = capfd.readouterr()
    assert f"with a warning     {len(wanted)}, damaged and used all the same" in said.out
    assert "Corrupt JPEG data" not in said.err
    assert "beit-fast: 1 of 60 images cannot be used" in said.err


def test_what_others_write_meanwhile_goes_where_it_would_have_gone(capfd):
    with Complaints() as complaints:
        place = complaints.place()
        os.write(2, b"first\nCorrupt JPEG data: 3 extraneous bytes before marker 0xd9\nsec")
        complaints.pass_on()
        assert capfd.readouterr().err == "first\n"
        assert complaints.since(place).startswith("Corrupt JPEG data: 3 extraneous")
        os.write(2, b"ond\nno end")
        complaints.pass_on()
        assert capfd.readouterr().err == "second\n"
    assert capfd.readouterr().err == "no end"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_standard_error_that_is_closed_stays_so():
    kept = os.dup(2)
    os.close(2)
    try:
        with Complaints() as complaints:
            os.write(2, b"Corrupt JPEG data: premature end of data segment\n")
            assert complaints.since(0) == "Corrupt JPEG data: premature end of data segment"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(2)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
