"""What a scan reads of a tree with links, and that it tells of everything else."""

import os

import pytest

from beit_fast.data.sources.scan import scan


@pytest.fixture
def link(tmp_path):
    def link(name, target):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(tmp_path / target, path.parent))

    return link


def test_links_to_files_and_folders_are_followed_wherever_they_lead(tmp_path, touch, link):
    touch("outside/far.jpg", "data/near.jpg", "data/sub/x.jpg")
    link("data/file.jpg", "outside/far.jpg")
    link("data/folder", "outside")
    paths, found = scan(tmp_path / "data", True)
    assert paths == ["file.jpg", "folder/far.jpg", "near.jpg", "sub/x.jpg"]
    assert (found.num_linked, found.folders, found.left_out()) == (2, ["folder", "sub"], "")
    paths, found = scan(tmp_path / "data", False)
    assert paths == ["near.jpg", "sub/x.jpg"]
    assert (found.folders, found.left_out()) == (["sub"], "2 links left out")


def test_a_link_back_is_not_entered_and_is_told(tmp_path, touch, link):
    touch("data/sub/x.jpg", "a.jpg")
    link("data/sub/back", "data")
    link("data/itself", "data")
    paths, found = scan(tmp_path / "data", True)
    assert paths == ["sub/x.jpg"]
    assert found.folders == ["sub"]  # no class of that name
    assert found.left_out() == "2 links to folders that are read already (itself, sub/back)"
    link("data/up", ".")  # out of the tree and, in there, to the tree again
    paths, found = scan(tmp_path / "data", True)
    assert paths == ["sub/x.jpg", "up/a.jpg"]
    assert found.read_before == ["itself", "sub/back", "up/data"]


def test_folders_that_link_to_each_other_are_read_and_end(tmp_path, touch, link):
    touch("data/a/1.jpg", "data/b/2.jpg")
    link("data/a/to_b", "data/b")
    link("data/b/to_a", "data/a")
    paths, found = scan(tmp_path / "data", True)
    assert paths == ["a/1.jpg", "a/to_b/2.jpg", "b/2.jpg", "b/to_a/1.jpg"]
    assert found.read_before == ["a/to_b/to_a", "b/to_a/to_b"]


def test_a_folder_that_two_links_lead_to_is_read_for_both(tmp_path, touch, link):
    """As torchvision and timm read it: the images may be of two classes."""
    touch("outside/1.jpg", "outside/deep/2.jpg")
    link("data/one", "outside")
    link("data/other", "outside")
    paths, found = scan(tmp_path / "data", True)
    assert paths == ["one/1.jpg", "one/deep/2.jpg", "other/1.jpg", "other/deep/2.jpg"]
    assert (found.num_linked, found.left_out()) == (4, "")


def test_a_folder_is_read_once_in_each_class_and_under_its_own_name(tmp_path, touch, link):
    touch("outside/3.jpg", "outside/deep/4.jpg", "data/a/z/1.jpg", "data/a/z/deep/2.jpg")
    for name, target in (("b_first", "data/a/z"), ("c_part", "outside/deep"), ("d", "outside")):
        link(f"data/a/{name}", target)
    link("data/a/e", "outside")
    paths, found = scan(tmp_path / "data", True)
    assert paths == ["a/c_part/4.jpg", "a/d/3.jpg", "a/z/1.jpg", "a/z/deep/2.jpg"]
    assert found.read_before == ["a/b_first", "a/d/deep", "a/e"]


def test_however_folders_link_to_each_other_there_is_an_end(tmp_path, touch, link):
    """Twenty folders, each with links to all others: there are 20! ways through them."""
    names = [f"class_{number:02}" for number in range(20)]
    for name in names:
        touch(f"data/{name}/1.jpg")
        for other in names:
            link(f"data/{name}/{other}", f"data/{other}")
    paths, found = scan(tmp_path / "data", True)
    assert len(paths) == 20 * 20  # all images, in every class
    assert found.folders == names
    assert len(set(paths)) == len(paths)


def test_everything_that_is_not_read_is_counted(tmp_path, touch, link):
    touch("1.jpg", "2.avif", "sub/3.AVIF", "4.heic", "5.jp2", "noending", ".DS_Store")
    (tmp_path / ".cache").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    link("to_pipe.jpg", "pipe.jpg")
    link("gone.jpg", "nowhere.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    paths, found = scan(tmp_path, True)
    assert paths == ["1.jpg"]
    assert found.left_out() == (
        "5 other files (2 .avif, 1 .heic, 1 .jp2, 1 without ending), 2 hidden names, "
        "2 pipes or devices left out, 2 broken links (circle.jpg, gone.jpg)"
    )


def test_many_endings_are_told_with_the_commonest_first(tmp_path, touch):
    touch("1.jpg", *(f"{n}.e{n}" for n in range(8)), "more.e7")
    said = scan(tmp_path, True)[1].left_out()
    assert said.startswith("9 other files (2 .e7, 1 ")
    assert said.endswith(", ...) left out")


def test_a_folder_that_cannot_be_read_is_told_and_ends_nothing(tmp_path, touch, monkeypatch):
    touch("good/1.jpg", "locked/2.jpg", "locked/deep/3.jpg")
    refuse(monkeypatch, tmp_path / "locked")
    paths, found = scan(tmp_path, True)
    assert paths == ["good/1.jpg"]
    assert found.folders == ["good", "locked"]
    assert found.left_out() == "1 folder that cannot be read (locked: Permission denied)"
    with pytest.raises(ValueError, match=r"locked cannot be read .*Permission denied"):
        scan(tmp_path / "locked", True)


def refuse(monkeypatch, folder):
    """As for a user without rights; the tests may run as root, who has all."""
    real = os.scandir

    def scandir(path):
        if os.path.realpath(path) == os.path.realpath(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
