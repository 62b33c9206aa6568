"""Imports flow one way, and importing touches nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each room may import of the others; itself is understood. From the ground up.
BASE = {"checks", "flags", "files"}  # of the standard library alone, for all but the kernels
KERNELS = {f"kernels.{room}" for room in ("attention", "residual", "head", "input", "conv")}
DATA = {"data", "data.seeds", "data.sources", "data.views"}
BELOW_TASKS = {"kernels", "model", "weights", "tokenizer", "train", "viz", "tasks"} | KERNELS | DATA
TASKS = {f"tasks.{room}" for room in ("pretrain", "evaluate", "finetune", "probe")}
ALLOWED = {
    **{part: set() for part in sorted(BASE)},
    **{room: {"kernels"} for room in sorted(KERNELS)},
    "kernels": KERNELS,  # the names under which the rooms' operators are called
    "model": {"kernels"} | KERNELS | BASE,
    "weights": {"model", "kernels.attention"} | BASE,
    "acceleration": {"model", "kernels"} | KERNELS,
    "timm": {"model", "weights", "kernels.attention"},
    "tokenizer": {"kernels.conv", "kernels.head"} | BASE,
    "data.seeds": set(),
    "data.sources": BASE,
    "data.views": {"data.seeds", "data.sources"} | BASE,
    "data": DATA | BASE,
    "train": BASE,
    "viz": BASE,
    "tasks": {"data", "data.sources", "train"} | BASE,
    "tasks.pretrain": BELOW_TASKS | BASE,
    "tasks.evaluate": BELOW_TASKS | BASE,
    "tasks.finetune": BELOW_TASKS | {"tasks.evaluate"} | BASE,
    "tasks.probe": BELOW_TASKS | {"tasks.evaluate"} | BASE,
    "recipes": {"model", "tokenizer", "train", "tasks"} | DATA | TASKS,
    "parsing": BASE,
    "cli": {"parsing", "recipes", "weights", "tokenizer", "train"} | DATA | TASKS | BASE,
}


def room_of(name: str) -> str:
    """The innermost room that a module, or what is imported of it, lies in."""
    parts = name.removeprefix("beit_fast.").split(".")
    inner = ".".join(parts[:2])
    return inner if inner in ALLOWED else parts[0]


def files() -> list[tuple[str, Path]]:
    """Every module of the package with its name."""
    package = (ROOT / "beit_fast").rglob("*.py")
    named = [(path.relative_to(ROOT), path) for path in package]
    kernels = (ROOT / "kernels").rglob("*.py")
    named += [(Path("beit_fast", path.relative_to(ROOT)), path) for path in kernels]
    return sorted((".".join(short.with_suffix("").parts), path) for short, path in named)


def files_of(part: str) -> list[Path]:
    return [path for name, path in files() if room_of(name) == part]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_flow_one_way(part):
    assert files_of(part), "no such room"
    for path in files_of(part):
        for name in imports_of(path):
            if name.startswith("beit_fast."):
                assert room_of(name) in ALLOWED[part] | {part}, f"{path} imports {name}"


def test_every_module_lies_in_a_room():
    unknown = {room_of(name) for name, _ in files()} - ALLOWED.keys()
    assert unknown == {"__init__"}  # the table of contents itself


@pytest.mark.parametrize("part", ["kernels", *sorted(KERNELS), "model", "weights", "acceleration"])
def test_kernels_and_model_need_little(part):
    # Imported by the calls that ask for them: xformers, torchao for fp8, the hub's client.
    on_request = {"xformers", "torchao", "huggingface_hub"}
    allowed = {"torch", "triton", "numpy", "scipy", "safetensors", "beit_fast"} | on_request
    for path in files_of(part):
        for name in imports_of(path):
            top = name.split(".")[0]
            if part == "acceleration" and path.stem == top:  # imported where it is in use
                continue
            assert top in allowed or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_nothing_unpickles_or_evaluates():
    forbidden = ("weights_only=False", "pickle.load", "allow_pickle=True", "shell=True")
    for _, path in files():
        text = path.read_text(encoding="utf-8")
        for word in forbidden:
            assert word not in text, f"{path}: {word}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}: {node.func.id}"


def test_importing_prints_nothing_and_opens_no_device():
    code = (
        "import socket, torch\n"
        "def refuse(*_): raise AssertionError('a connection was tried')\n"
        "socket.socket.connect = refuse\n"
        "import beit_fast, beit_fast.cli, beit_fast.data.loader\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
