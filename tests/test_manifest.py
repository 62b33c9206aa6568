"""A manifest is what was written, or refused in a line that names it."""

import json
import shutil
from pathlib import Path

import pytest

from beit_fast.files import describe
from beit_fast.manifest import FORMAT, MANIFEST, CheckpointError, manifest_text, read_manifest
from damaged import flipped

pytestmark = pytest.mark.promise("R5", "R6")

OF_A_RUN = Path(__file__).parent / "written_before/format_2/run/checkpoints/step_00000004"
CONTENT = {
    "step": 4,
    "files": {"model.safetensors": "ab" * 32},
    "settings": {
        "model": {"img_size": (24, 64), "init_values": None, "drop_path_rate": 1e-05},
        "classes": ["é", "b\\"],
        "run": {"epochs": float("nan"), "path": "runs/\udcff"},
    },
    "environment": {"torch": "2.11.0", "commit": None},
    "schedule": {"num_steps": 12, "warmup_steps": 3},
    "history": [{"step": 2, "changed": {"optim.lr": [0.1, 0.2]}}],
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    (folder / MANIFEST).write_text(manifest_text(CONTENT), encoding="utf-8")
    return folder


def as_format_1(folder, **changes):
    """As the versions wrote it that gave it no digest."""
    (folder / MANIFEST).write_text(json.dumps({"format": 1, **CONTENT, **changes}, indent=1))
    return folder


def refusal(folder):
    with pytest.raises(CheckpointError) as raised:
        read_manifest(folder)
    line = describe(raised.value)
    assert str(folder / MANIFEST) in line
    assert "\n" not in line
    assert len(line) < 500
    return line


def test_what_is_read_is_what_was_written(folder):
    read = read_manifest(folder)
    digest = read.pop("sha256")
    assert len(digest) == 64
    assert json.dumps(read) == json.dumps({"format": FORMAT, **CONTENT})


@pytest.mark.parametrize("of", ["these tests", "a run"])
def test_every_single_bit_is_seen_or_changes_nothing(of, folder):
    if of == "a run":
        shutil.copy(OF_A_RUN / MANIFEST, folder)
    path, whole = folder / MANIFEST, repr(read_manifest(folder))
    size, refusals, same = path.stat().st_size, [], 0
    for place in range(size):
        for bit in range(8):
            with flipped(path, place, bit):
                try:
                    read = read_manifest(folder)
                except CheckpointError as error:
                    refusals.append(str(error))
                else:  # E for e in an exponent, or in the number of a letter
                    assert repr(read) == whole, (place, bit)
                    same += 1
    assert all(str(path) in line for line in refusals)
    assert len(refusals) + same == 8 * size > 5000
    assert same < 10
    assert repr(read_manifest(folder)) == whole


@pytest.mark.parametrize("step", [0, 5, -4, 4.0, True, "4", None, 10**30])
def test_of_format_1_the_step_is_that_of_its_folder(folder, step):
    as_format_1(folder, step=step)
    assert "its step is" in (line := refusal(folder)) or "its folder is step_00000004" in line
    assert read_manifest(as_format_1(folder))["step"] == 4
    moved = folder.rename(folder.parent / "best")
    assert read_manifest(moved)["step"] == 4  # a copy may be called what it likes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[]", "it holds a list"),
        ("null", "it holds a NoneType"),
        ('"format"', "it holds a str"),
        ("{}", "its format is None"),
        ('{"format": "1"}', "its format is '1'"),
        ('{"format": true}', "its format is True"),
        ('{"format": 2}', "its SHA-256 is not"),
        ('{"format": 3}', "has checkpoint format 3, this version reads 1 to 2: load it with the"),
        ('{"format": 1}', "its step is None"),
        ("[" * 100_000, "RecursionError"),
        ('{"a":' * 100_000, "RecursionError"),
        ('{"format": 1, "step": 4, "files": ' + "[" * 900 + "]" * 900 + "}", "its files is"),
        ('{"format": 1, "step": 1' + "0" * 5000 + "}", "4300"),
        ('{"format": 1, "step": 1e999}', "its step is inf"),
    ],
    ids=lambda value: value[:24],
)
def test_what_is_no_manifest_is_refused_in_a_line(folder, text, why):
    (folder / MANIFEST).write_text(text)
    assert why in refusal(folder)


def test_other_bytes_another_kind_of_file_and_none_are_refused_in_a_line(folder):
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes().replace(b"2.11", b"2\xff11"))
    assert "'utf-8' codec can't decode" in refusal(folder)
    path.unlink()
    assert "is missing: no complete checkpoint" in refusal(folder)
    path.mkdir()
    assert "Is a directory" in refusal(folder)


OTHERS = (None, 3, -1, 0.5, True, "x", [], {}, [None], {"x": None})


@pytest.mark.parametrize("entry", ["step", "files", "settings", "schedule", "history"])
def test_an_entry_of_format_1_that_is_another_kind_is_refused(folder, entry):
    allowed = {"files": ({},), "settings": ({}, {"x": None}), "history": ([],)}
    for other in OTHERS:
        as_format_1(folder, **{entry: other})
        if other in allowed.get(entry, ()):
            read_manifest(folder)
        else:
            refusal(folder)


@pytest.mark.parametrize("entry", ["format", "step", "files", "settings"])
def test_an_entry_that_is_missing_is_named(folder, entry):
    content = json.loads((as_format_1(folder) / MANIFEST).read_text())
    del content[entry]
    (folder / MANIFEST).write_text(json.dumps(content))
    assert f"its {entry} is None" in refusal(folder)
