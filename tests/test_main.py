"""The command itself: signals while it imports, and readers that go away. Imports are played."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from beit_fast.cli import VERBS, WITHOUT_RECIPE, main

ROOT = Path(__file__).resolve().parents[1]
RUN = f"import runpy; runpy.run_path({str(ROOT / 'beit_fast_main.py')!r}, run_name='__main__')"


@pytest.fixture
def start(tmp_path):
    """`start(code, **options)`: the command in a process, `code` being its beit_fast.cli."""

    def start(code, **options):
        (tmp_path / "beit_fast").mkdir()
        (tmp_path / "beit_fast" / "__init__.py").touch()
        (tmp_path / "beit_fast" / "cli.py").write_text(code)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        pipes |= {"cwd": tmp_path, "text": True}
        return subprocess.Popen([sys.executable, "-c", RUN], env=environment, **pipes)

    return start


def test_it_is_what_the_package_installs():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'entry_points={"console_scripts": ["beit-fast=beit_fast_main:main"]}' in setup
    assert 'py_modules=["beit_fast_main"]' in setup


def test_ctrl_c_while_it_imports_is_one_line_whatever_an_import_swallows(start):
    process = start(
        "import time\n"
        "print('importing', flush=True)\n"
        "try:\n"
        "    time.sleep(30)\n"
        "except BaseException:\n"
        "    pass\n"
        "main = lambda preparing: print('went on')\n"
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "")
    assert error == "beit-fast: interrupted before it began\n"


def test_ctrl_c_while_a_verb_is_imported_is_so_too(start):
    process = start(
        "import time\n"
        "def main(preparing):\n"
        "    with preparing():\n"
        "        print('importing', flush=True)\n"
        "        try:\n"
        "            time.sleep(30)\n"
        "        except BaseException:\n"
        "            pass\n"
        "    print('went on')\n"
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "")
    assert error == "beit-fast: interrupted before it began\n"


@pytest.mark.parametrize("verb", [*VERBS, *WITHOUT_RECIPE])
def test_arguments_are_read_and_a_verb_is_imported_before_the_work(verb, monkeypatch):
    told = []

    @contextlib.contextmanager
    def preparing():
        told.append("preparing")
        yield
        told.append("prepared")

    def parse(*_):
        told.append("parse")
        return "config"

    def load():
        told.append("load")
        return told.append  # for the work

    if verb in VERBS:
        monkeypatch.setitem(VERBS, verb, ({"mine": str}, load))
        monkeypatch.setattr("beit_fast.cli.parse", parse)
    else:
        monkeypatch.setitem(WITHOUT_RECIPE, verb, (parse, load))
    assert main([verb, "mine"], preparing) == 0
    assert told == ["preparing", "parse", "load", "prepared", "config"]


def test_ctrl_c_later_is_the_commands_own(start):
    process = start(
        "import time\n"
        "def main(preparing):\n"
        "    with preparing():\n"
        "        pass\n"
        "    try:\n"
        "        print('running', flush=True)\n"
        "        time.sleep(30)\n"
        "    except KeyboardInterrupt:\n"
        "        return 7\n"
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 7


@pytest.mark.parametrize(
    "code",
    [
        "main = lambda preparing: print('x' * 100_000)\n",
        "main = lambda preparing: print('x')\n",  # leaves when the process ends
        "def main(preparing):\n    print('x')\n    raise SystemExit(0)\n",
    ],
    ids=["much", "little", "and-exits"],
)
def test_a_reader_that_goes_away_is_no_traceback(code, start):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(code, stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 141


def test_exit_codes_are_passed_on(start):
    process = start("main = lambda preparing: 3\n")
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 3


def test_the_command_line_leaves_a_broken_pipe_to_it(monkeypatch):
    def print_to_nobody(_config):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(WITHOUT_RECIPE, "convert", (list, lambda: print_to_nobody))
    with pytest.raises(BrokenPipeError):
        main(["convert"])


# What takes long to take down, says when it is, and a thread that nobody waits for.
SLOW_END = """
import atexit, sys, threading, time
class Slow:
    def __del__(self, sleep=time.sleep, write=sys.__stderr__.write):
        write('taken down')
        sleep({seconds})
sys.slow = Slow()
atexit.register(print, 'registered')
def main(preparing):
    print('said', end=' ')
    return 3
"""


@pytest.mark.promise("R10")
def test_it_ends_without_taking_the_interpreter_down_and_loses_nothing(start):
    thread = "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    process = start(SLOW_END.format(seconds=60) + thread)
    assert process.communicate(timeout=20) == ("said registered\n", "")
    assert process.returncode == 3


@pytest.mark.parametrize(
    "watched",
    ["sys.setprofile(lambda *_: None)", "sys.settrace(lambda *_: None)", "INJECTED"],
)
def test_whoever_looks_on_sees_the_end(start, watched, monkeypatch):
    if watched == "INJECTED":
        monkeypatch.setenv("CUDA_INJECTION64_PATH", "/opt/profiler.so")
        watched = "pass"
    process = start(SLOW_END.format(seconds=0) + watched + "\n")
    said, error = process.communicate(timeout=20)
    assert (said, process.returncode) == ("said registered\n", 3)
    assert "taken down" in error
