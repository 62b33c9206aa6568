"""Two runs never share a folder, and the lock writes over nothing that is not a lock."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from beit_fast.files import describe
from beit_fast.train import lock
from beit_fast.train.lock import sole_user

HOLDER = """
import sys, time
from pathlib import Path
from beit_fast.train.lock import sole_user
with sole_user(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
HOST = socket.gethostname()


@pytest.mark.promise("R23")
def test_a_second_run_is_refused_with_process_and_host_and_a_dead_one_holds_nothing(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        named = rf"{folder} is in use by process {holder.pid} on {HOST}: give another --run\.output"
        with pytest.raises(ValueError, match=named), sole_user(folder):
            pass
        holder.kill()
    assert holder.returncode == -signal.SIGKILL
    assert (folder / ".lock").read_text() == f"{holder.pid} on {HOST}"  # nobody tidied up
    with sole_user(folder):
        assert (folder / ".lock").read_text() == f"{os.getpid()} on {HOST}"
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), sole_user(folder):
            pass
    with sole_user(folder):
        pass


@pytest.mark.promise("R23")
@pytest.mark.parametrize("content", ["", "4711", "4711 on node7\n", "47 on a" + " " * 40])
def test_what_runs_and_earlier_versions_left_is_taken_over(content, tmp_path):
    (tmp_path / ".lock").write_text(content)
    with sole_user(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()} on {HOST}"


@pytest.mark.promise("R23")
def test_a_lock_that_is_written_over_is_one_at_every_moment(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("1234567890 on " + "a" * 100)
    truncated = []
    write = os.pwrite

    def killed(handle, content, offset):
        write(handle, content, offset)
        truncated.append((tmp_path / ".lock").read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", killed)
    with pytest.raises(KeyboardInterrupt), sole_user(tmp_path):
        pass
    monkeypatch.undo()
    assert truncated[0].startswith(f"{os.getpid()} on {HOST}".encode())
    assert len(truncated[0]) == 114
    with sole_user(tmp_path):
        pass


@pytest.mark.promise("R23")
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with sole_user(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()} on {HOST}"
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path} is on a file system without locks (No locks available): nothing keeps a "
        "second run out of it, so see to it that there is none"
    )


PRECIOUS = "ssh-ed25519 AAAA me@home\n"


def planted_link(path, victim):
    path.symlink_to(victim)


def planted_dangling_link(path, victim):
    path.symlink_to(victim.with_name("not_there"))


def planted_loop(path, victim):
    path.symlink_to(path)


def planted_hard_link(path, victim):
    path.hardlink_to(victim)


def planted_text(path, victim):
    path.write_text(PRECIOUS)


def planted_pipe(path, victim):
    os.mkfifo(path)


def planted_folder(path, victim):
    path.mkdir()


@pytest.mark.promise("S10", "R23")
@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (planted_link, "is a link, and what it points at would be written to: remove it"),
        (planted_dangling_link, "is a link, and what"),
        (planted_loop, "is a link, and what"),
        (planted_hard_link, "is not the lock that a run leaves there: look at it, and remove it"),
        (planted_text, "is not the lock that"),
        (planted_pipe, "is not the lock that"),
        (planted_folder, "Is a directory"),
    ],
)
def test_what_was_planted_in_its_place_is_refused_and_removing_it_helps(plant, said, tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text(PRECIOUS)
    folder.mkdir()
    plant(folder / ".lock", victim)
    with pytest.raises((ValueError, OSError)) as raised, sole_user(folder):
        pass
    line = describe(raised.value)
    assert line.startswith(str(folder / ".lock"))
    assert said in line
    assert "\n" not in line
    assert victim.read_text() == PRECIOUS
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ["victim"]
    (folder / ".lock").rmdir() if plant is planted_folder else (folder / ".lock").unlink()
    with sole_user(folder):
        pass


@pytest.mark.promise("S10")
def test_its_mode_is_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        with sole_user(tmp_path / "run"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run" / ".lock").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o750
