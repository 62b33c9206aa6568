import errno
import os
import resource
import threading

import pytest

from beit_fast.data.sources.storage import FilePart, FileState, LocalStorage


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 100)
    (tmp_path / "folder").mkdir()
    return tmp_path


def num_open():
    return len(os.listdir("/proc/self/fd"))


def test_files_have_names_states_and_parts(folder):
    storage = LocalStorage(folder)
    assert storage.names() == [f"{number}.tar" for number in range(6)]
    os.utime(folder / "1.tar", ns=(5, 7))
    assert storage.state("1.tar") == FileState(100, "7")
    assert storage.read(FilePart("2.tar", 10, 3)) == b"\2\2\2"
    assert storage.read(FilePart("2.tar", 100, 0)) == b""
    storage.close()


def test_what_is_no_file_or_ends_too_soon_is_an_error_with_its_path(folder):
    storage = LocalStorage(folder)
    with pytest.raises(OSError, match=r"40 of 50 bytes from 60 on came.*2.tar") as raised:
        storage.read(FilePart("2.tar", 60, 50))
    assert raised.value.errno == errno.EIO  # it may pass
    with pytest.raises(OSError, match="it is no file"):
        storage.state("folder")
    with pytest.raises(FileNotFoundError):
        storage.read(FilePart("9.tar", 0, 1))
    storage.close()


def test_links_that_lead_to_nothing_have_names_so_that_they_are_missed(tmp_path):
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_folder").symlink_to("folder")
    assert LocalStorage(tmp_path).names() == ["circle", "lost"]


def test_no_more_files_are_open_than_are_allowed(folder):
    before = num_open()
    storage = LocalStorage(folder, most_open=3)
    for number in (0, 1, 2, 3, 4, 5, 0, 5):
        assert storage.read(FilePart(f"{number}.tar", 0, 1)) == bytes([number])
        assert num_open() - before <= 3
    storage.windowed(1)
    storage.read(FilePart("3.tar", 0, 1))
    assert num_open() - before == 1
    storage.close()
    assert num_open() == before


def test_a_quarter_of_the_files_that_the_process_may_have_is_open_at_most(folder):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = num_open()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, limits[1]))
        storage = LocalStorage(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for number in range(6):
        storage.read(FilePart(f"{number}.tar", 0, 1))
    assert num_open() - before == 4
    storage.close()


def test_threads_share_files_that_are_closed_behind_them(folder):
    before, wrong = num_open(), []
    storage = LocalStorage(folder, most_open=2)

    def read(first):
        for index in range(300):
            number = (first + index) % 6
            if storage.read(FilePart(f"{number}.tar", index % 50, 5)) != bytes([number]) * 5:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert num_open() - before <= 2
    storage.close()
    assert num_open() == before
