"""Imports flow one way, and importing touches nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each part may import of the others; itself is understood.
BASE = {"checks", "flags", "files"}  # of the standard library alone, for all but the kernels
ALLOWED = {
    "kernels": set(),
    **{part: set() for part in sorted(BASE)},
    "model": {"kernels"} | BASE,
    "tokenizer": {"kernels"} | BASE,
    "data": BASE,
    "train": BASE,
    "viz": {"model", "tokenizer"} | BASE,
    "tasks": {"kernels", "model", "tokenizer", "data", "train", "viz"} | BASE,
    "timm": {"kernels", "model"},
    "recipes_digits": {"model", "tokenizer", "data", "train", "tasks"},
    "recipes": {"recipes_digits", "model", "tokenizer", "data", "train", "tasks"},
    "recipes_finetune": {"recipes_digits", "model", "data", "tasks", "train"},
    "parsing": BASE,
    "cli": {
        "parsing",
        "recipes",
        "recipes_finetune",
        "model",
        "tasks",
        "tokenizer",
        "train",
        "data",
    }
    | BASE,
}


def files_of(part: str) -> list[Path]:
    if part == "kernels":
        return sorted((ROOT / "kernels").glob("*.py"))
    folder = ROOT / "beit_fast" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


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
    for path in files_of(part):
        for name in imports_of(path):
            if name.startswith("beit_fast."):
                assert name.split(".")[1] in ALLOWED[part] | {part}, f"{path} imports {name}"


@pytest.mark.parametrize("part", ["kernels", "model"])
def test_kernels_and_model_need_little(part):
    # Imported by the calls that ask for them: xformers, torchao for fp8, the hub's client.
    on_request = {"xformers", "torchao", "huggingface_hub"}
    allowed = {"torch", "triton", "numpy", "scipy", "safetensors", "beit_fast"} | on_request
    for path in files_of(part):
        for name in imports_of(path):
            top = name.split(".")[0]
            if path.stem == f"accelerate_{top}":  # imported where that library is in use
                continue
            assert top in allowed or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_nothing_unpickles_or_evaluates():
    forbidden = ("weights_only=False", "pickle.load", "allow_pickle=True", "shell=True")
    for path in [*ROOT.glob("beit_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
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
