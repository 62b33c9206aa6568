"""The first page: short, and its map names every room of the house and nothing else."""

import csv
import fnmatch
import os
import re
from pathlib import Path

from pages import README, ROOT, blocks_of, text_of

WORDS = 1200
# Their folders are one line of the map: they mirror the others, or hold results and pictures.
WHOLE = ("tests", "bench", "docs")


def places_on_the_map() -> list[Path]:
    """What the block of the map names, by its indentation, relative to the repository."""
    (tree,) = [b.text for b in blocks_of(text_of(README)) if b.text.startswith("kernels/")]
    found, above = [], {-2: Path()}
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        above[depth] = above[depth - 2] / line.split()[0]
        found.append(above[depth])
    return found


def folders_of_the_repository() -> set[Path]:
    """Those that hold files, without hidden ones and those that .gitignore names."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    ignored = [".*", *(line.rstrip("/") for line in lines)]
    folders = set()
    for folder, below, files in os.walk(ROOT):
        below[:] = [n for n in below if not any(fnmatch.fnmatch(n, one) for one in ignored)]
        if files:
            folders |= {Path(folder).relative_to(ROOT), *Path(folder).relative_to(ROOT).parents}
    return folders - {Path()}


def test_it_is_read_in_five_minutes():
    assert len(text_of(README).split()) <= WORDS


def test_what_the_map_names_exists():
    assert [place for place in places_on_the_map() if not (ROOT / place).exists()] == []


def test_the_map_names_every_folder():
    rooms = folders_of_the_repository()
    folders = {room for room in rooms if room.parts[0] not in WHOLE or len(room.parts) == 1}
    assert folders - set(places_on_the_map()) == set()


def test_every_line_of_the_map_says_what_is_there():
    (tree,) = [b.text for b in blocks_of(text_of(README)) if b.text.startswith("kernels/")]
    assert all(len(line.split()) > 1 or line == "beit_fast/" for line in tree.splitlines())


def test_the_picture_is_small():
    assert (ROOT / "docs" / "images" / "demo.png").stat().st_size < 50_000


def test_the_table_of_speed_is_the_measured_one():
    with (ROOT / "bench" / "results" / "model-base-cpu.csv").open(newline="") as file:
        measured = {(r["task"], r["pass"], r["model"]): r for r in csv.DictReader(file)}
    tasks = {"classifier": "classifier", "features": "features", "masked image modelling": "mim"}
    passes = {"training step": "train_step", "forward": "forward"}
    pattern = r"^\| ([a-z ]+), ([a-z ]+) \| (\d+) \| (.*?) \| (.*?) \|"
    rows = re.findall(pattern, text_of(README), re.MULTILINE)
    assert len(rows) == 6
    for task, kind, ours, timm, transformers in rows:
        key = (tasks[task], passes[kind])
        assert ours == f"{float(measured[*key, 'ours']['ms']):.0f}"
        for name, ratio in (("timm", timm), ("transformers", transformers)):
            if ratio != "has none":
                assert ratio == f"{float(measured[*key, name]['ratio']):.2f}", (key, name)
                assert float(ratio) >= 1
