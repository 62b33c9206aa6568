import os
import re

import pytest

from beit_fast.data.sources import places
from beit_fast.data.sources.places import (
    Place,
    expand_braces,
    is_url,
    kind_of,
    matching,
    scheme_of,
    split_place,
)

FOLDERS = {
    "images": (["a.jpg", "b.txt"], "folder"),
    "classes": (["x/a.jpg"], "folder"),
    "empty": ([], "folder"),
    "shards": (
        ["a.tar", "b.TAR", "_info.json", "classes.txt", ".hidden/a.jpg", "._a.jpg"],
        "shards",
    ),
    "tables": (["a.parquet", "README.md"], "tables"),
    "arrow": (["a.arrow", "dataset_info.json"], "tables"),
    "images beside shards": (["a.tar", "b.png"], "folder"),
    "folders beside shards": (["a.tar", "b/c.txt"], "folder"),
    "compressed": (["a.tar.gz"], "folder"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_folder_holds_says_its_kind(name, touch, tmp_path):
    names, kind = FOLDERS[name]
    touch(*names)
    assert kind_of(tmp_path) == kind


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("d/a.tar", "shards"),
        ("d/a-*.tar", "shards"),
        ("d/a-{00..12}.tar", "shards"),
        ("d/a-*.parquet", "tables"),
        ("s3://bucket/a-{00..12}.tar", "shards"),
        ("https://host/data/a.parquet", "tables"),
        ("s3://bucket/prefix", "objects"),
        ("d/a.tar.gz", "folder"),
        ("d", "folder"),
        ("d/*.jpg", "folder"),
    ],
)
def test_a_name_says_its_kind_where_nothing_lies(path, kind):
    assert kind_of(path) == kind


def test_links_in_circles_and_what_cannot_be_listed_end_nothing(touch, tmp_path):
    touch("shards/a.tar")
    (tmp_path / "shards" / "loop").symlink_to("loop")
    assert kind_of(tmp_path / "shards") == "shards"
    assert kind_of(tmp_path / "shards" / "loop") == "folder"
    assert kind_of(tmp_path / "shards" / "a.tar" / "below") == "folder"


def test_a_flat_folder_of_images_is_not_listed_to_its_end(touch, tmp_path, monkeypatch):
    touch(*(f"{number}.jpg" for number in range(50)))
    seen, scandir = [], os.scandir

    class Scan:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return (seen.append(entry.name) or entry for entry in self.entries)

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Scan)
    assert kind_of(tmp_path) == "folder"
    assert len(seen) == 1


def test_a_path_is_cut_before_a_pattern_or_a_file_of_many_images(touch, tmp_path):
    assert split_place("d/e/a-*.tar") == Place("d/e", "a-*.tar")
    assert split_place("a.tar") == Place(".", "a.tar")
    assert split_place("d/e") == Place("d/e", "")
    assert split_place("s3://b/p/{a,b}.tar") == Place("s3://b/p", "{a,b}.tar")
    touch("x.tar/a.jpg", "y[1]/a.jpg")
    for name in ("x.tar", "y[1]"):  # folders that are called so
        assert split_place(tmp_path / name) == Place(str(tmp_path / name), "")


def test_braces_stand_for_each_name_and_stars_for_those_that_are_there():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    names = ["a-0.tar", "a-1.tar", "b-0.tar"]
    assert matching(names, "a-{0..2}.tar") == ["a-0.tar", "a-1.tar", "a-2.tar"]
    assert matching(names, "{a,c}-*.tar") == ["a-0.tar", "a-1.tar"]
    assert matching(names, "?-[0].tar") == ["a-0.tar", "b-0.tar"]


def test_braces_that_run_backwards_or_stand_for_too_many_names_are_refused(monkeypatch):
    monkeypatch.setattr(places, "_MOST_NAMES", 1000)
    assert len(expand_braces("{0..99}{0..9}")) == 1000
    for pattern, said in {
        "{3..1}": "{3..1} in {3..1} is no range: write the first number and then the last",
        "{0..1000}": "is no range",
        "{0..99}{0..99}{0..99}{0..99}{0..99}{0..99}": "more than 1000 names: give fewer",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            expand_braces(pattern)


def test_urls_have_a_scheme():
    assert [is_url(path) for path in ("s3://b", "GS://b", "/d", "d:/e", "pipe:x")] == [
        *(True, True, False, False, False)
    ]
    assert [scheme_of(path) for path in ("S3://b", "d")] == ["s3", ""]
