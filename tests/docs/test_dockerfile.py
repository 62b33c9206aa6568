"""The Dockerfile, which is not built here: its versions, its paths, and who runs what."""

import fnmatch
import getpass
import json
import pwd
import re
import shlex
from importlib.metadata import requires, version

import pytest

from pages import README, ROOT, text_of

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Name and arguments, lines joined, without remarks."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def arguments_of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def test_every_instruction_is_one_of_dockers():
    assert instructions()[0][0] == "FROM"
    assert {name for name, _ in instructions()} <= {
        "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD",
    }  # fmt: skip
    json.loads(arguments_of("CMD")[0])


def test_the_image_has_the_cuda_of_the_tested_torch():
    """Its version is that of the toolkit which the wheel of torch asks for."""
    (image,) = arguments_of("FROM")
    cuda, system = re.fullmatch(r"nvidia/cuda:([\d.]+)-base-(\w+[\d.]*)", image).groups()
    wanted = [r for r in requires("torch") or () if r.startswith("cuda-toolkit")]
    pinned = re.search(r"^torch==(.*)$", text_of(ROOT / "constraints.txt"), re.MULTILINE)[1]
    if not wanted or version("torch").partition("+")[0] != pinned:
        pytest.skip(f"torch {version('torch')} is installed, without its CUDA or not {pinned}")
    assert re.search(r"==([\d.]+)", wanted[0])[1] == cuda
    assert system == "ubuntu24.04"  # whose Python is 3.12: setup.py wants 3.11 or newer
    assert 'python_requires=">=3.11"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_it_installs_as_the_readme_says():
    (command,) = [run for run in arguments_of("RUN") if run.startswith("pip install")]
    (said,) = [
        line.partition(" && ")[0]
        for line in text_of(README).splitlines()
        if line.startswith("pip install -c constraints.txt -e .")
    ]
    assert command.replace("--no-cache-dir ", "") == said
    assert not re.search(r"(?:torch|triton|numpy)[=<>]", TEXT)  # versions stand in one place


def copied() -> list[str]:
    return [path.rstrip("/") for args in arguments_of("COPY") for path in shlex.split(args)[:-1]]


def test_what_is_copied_is_there_and_is_what_an_installation_reads():
    assert [path for path in copied() if not (ROOT / path).exists()] == []
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = {"setup.py", "pyproject.toml", "constraints.txt", "beit_fast", "kernels"}
    needed |= {f"{name}.py" for name in re.findall(r'py_modules=\["(\w+)"\]', setup)}
    needed |= set(re.findall(r'Path\("([\w.]+)"\)\.read_text', setup))
    assert needed <= set(copied())


def test_what_is_copied_is_not_ignored_and_nothing_else_is_sent():
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert kept == set(copied())
    left_out = [line for line in lines[1:] if not line.startswith("!")]
    tracked = ("beit_fast/cli.py", "bench/results/data.csv", "kernels/__init__.py")
    assert not [path for path in tracked for one in left_out if fnmatch.fnmatch(path, one)]


def test_what_runs_is_not_root():
    names = [name for name, _ in instructions()]
    assert arguments_of("USER") == ["beit"]
    assert "RUN" not in names[names.index("USER") :]
    assert any("useradd" in run and " beit " in f"{run} " for run in arguments_of("RUN"))


def test_a_user_without_a_name_can_compile(monkeypatch):
    """`--user` takes any number, and torch.compile calls `getpass.getuser`."""

    def unknown(uid):
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    for setting in " ".join(arguments_of("ENV")).split():
        name, _, value = setting.partition("=")
        if name != "PATH":
            monkeypatch.setenv(name, value)
    assert getpass.getuser() == "beit"
