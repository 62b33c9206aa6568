"""Imports flow one way, and importing touches nothing."""

import ast
import json
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import beit_fast

ROOT = Path(__file__).resolve().parents[1]
# What each room may import of the others; itself is understood. From the ground up.
BASE = {
    "checks",
    "errors",
    "flags",
    "files",
    "labels",
    "manifest",
    "seal",
}  # of the standard library alone
KERNELS = {f"kernels.{room}" for room in ("attention", "residual", "head", "input", "conv")}
DATA = {"data", "data.seeds", "data.sources", "data.views"}
BELOW_TASKS = {"kernels", "model", "weights", "tokenizer", "train", "viz", "tasks"} | KERNELS | DATA
TASKS = {
    f"tasks.{room}"
    for room in (
        *("pretrain", "evaluate", "finetune", "probe", "segment", "replay"),
        *("pack", "check"),
    )
}
ALLOWED = {
    **{part: set() for part in sorted(BASE)},
    **{part: {"files"} for part in ("manifest", "seal")},
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
    "data": DATA | BASE | {"kernels.input"},
    "train": BASE,
    "viz": BASE,
    "tasks": {"data", "data.seeds", "data.sources", "train", "model", "weights"} | BASE,
    "tasks.pretrain": BELOW_TASKS | BASE,
    "tasks.evaluate": BELOW_TASKS | BASE,
    "tasks.finetune": BELOW_TASKS | {"tasks.evaluate"} | BASE,
    "tasks.probe": BELOW_TASKS | {"tasks.evaluate"} | BASE,
    "tasks.segment": BELOW_TASKS | {"tasks.evaluate"} | BASE,
    "tasks.replay": BELOW_TASKS | {"tasks.pretrain", "tasks.finetune", "tasks.segment"} | BASE,
    "tasks.pack": {"data", "data.sources", "train", "tasks"} | BASE,
    "tasks.check": {"data", "data.sources", "train", "tasks"} | BASE,
    "recipes": {"model", "tokenizer", "train", "data", "data.views"} | TASKS,
    "parsing": BASE,
    "replay_arguments": {"parsing", "train", "tasks.replay"} | BASE,
    "cli": {"parsing", "replay_arguments", "recipes", "weights", "tokenizer", "train"}
    | TASKS
    | BASE,
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


def run(code: str) -> str:
    """What a process prints; it is to write nothing on stderr. `loaded()` there is the packages
    imported so far, but for the standard library and what Python starts with."""
    before = """
        import json, sys
        at_start = set(sys.modules)
        def loaded():
            names = {name.partition(".")[0] for name in set(sys.modules) - at_start}
            names -= set(sys.stdlib_module_names)
            return sorted(name for name in names if not name.startswith("_cython_"))  # its version
    """
    code = textwrap.dedent(before) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.promise("S9")
def test_importing_prints_nothing_and_opens_no_device():
    said = run("""
        import socket, torch
        def refuse(*_): raise AssertionError("a connection was tried")
        socket.socket.connect = refuse
        from beit_fast import *
        from beit_fast.cli import VERBS, WITHOUT_RECIPE
        for _, load in (VERBS | WITHOUT_RECIPE).values():
            load()
        assert not torch.cuda.is_initialized()
    """)
    assert said == ""


def test_importing_the_package_loads_the_package_alone():
    said = run("""
        import beit_fast
        first = loaded()
        beit_fast.beit_config("beit_base_patch16_224"), beit_fast.PUBLISHED
        print(json.dumps([first, loaded()]))
    """)
    assert json.loads(said) == [["beit_fast"], ["beit_fast"]]


def test_the_names_of_the_package_load_what_they_need_and_no_more():
    said = run("""
        import numpy, safetensors.torch, torch, triton
        before = set(loaded())
        from beit_fast import *
        print(set(loaded()) - before)
    """)
    assert said == "{'beit_fast'}\n"


def test_the_kernels_load_nothing_of_the_model():
    said = run("""
        import beit_fast.kernels.attention, beit_fast.kernels.patches
        print([name for name in sys.modules if name.startswith("beit_fast.model")])
    """)
    assert said == "[]\n"


# What reads flags and writes help; no part of what a verb runs.
OF_THE_COMMAND_LINE = {
    *{"beit_fast", "jsonargparse", "typeshed_client", "typing_extensions", "docstring_parser"},
    *{"yaml", "cython_runtime"},
}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["nonsense"],
        ["pretrain", "--help"],
        ["pretrain", "nonsense"],
        ["pretrain", "small", "--help"],
        ["pretrain", "small", "--print_config"],
        ["pretrain", "small", "--model.dept", "3"],
        ["pretrain", "small", "--model.img_size", "65"],
        ["pretokenize", "small", "--help"],
        ["finetune", "small_data", "--help"],
        ["segment", "small_data", "--help"],
        ["probe", "small", "--help"],
        ["tokenizer", "small", "--help"],
        ["evaluate", "--help"],
        ["predict", "--help"],
        ["evaluate-segmentation", "--help"],
        ["predict-segmentation", "--help"],
        ["predict-segmentation", "c.pth", "a.png", "--output", "out", "--stride", "0"],
        ["replay", "--help"],
        ["check", "--help"],
        ["pack", "--help"],
        ["convert", "--help"],
        ["convert-dalle", "--help"],
    ],
    ids=" ".join,
)
def test_help_and_wrong_flags_are_answered_without_torch(arguments):
    said = run(f"""
        import io
        from beit_fast.cli import main
        sys.stdout = sys.stderr = io.StringIO()
        try:
            main({arguments})
        except SystemExit:
            pass
        said = sys.stdout.getvalue()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        print(json.dumps([loaded(), said]))
    """)
    found, answer = json.loads(said)
    assert "usage: beit-fast" in answer or answer.startswith(("beit-fast: ", "model:"))
    assert set(found) - OF_THE_COMMAND_LINE == set()


def test_configurations_and_recipes_are_made_without_torch():
    modules = [name for name, path in files() if path.stem.split("_")[0] == "config"]
    assert {f"beit_fast.{room}.config" for room in {"data", "model", "train"} | TASKS} <= {*modules}
    said = run(f"""
        import importlib
        for name in {modules}:
            importlib.import_module(name)
        from beit_fast import recipes
        for verb in ("PRETRAIN", "PRETOKENIZE", "FINETUNE", "SEGMENT", "PROBE", "TOKENIZER"):
            for recipe in getattr(recipes, verb).values():
                recipe()
        print(loaded())
    """)
    assert said == "['beit_fast']\n"


def test_the_table_of_contents_is_the_same_for_programs_and_for_type_checkers():
    tree = ast.parse((ROOT / "beit_fast" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {
        node.module.removeprefix("beit_fast."): tuple(alias.name for alias in node.names)
        for node in block.body
    }
    assert shown == beit_fast._NAMES
    assert sorted(beit_fast.__all__) == sorted(name for names in shown.values() for name in names)


def test_every_name_of_the_package_is_there_however_it_is_asked_for():
    here: dict = {}
    exec("from beit_fast import *", here)
    for name in beit_fast.__all__:
        value = getattr(beit_fast, name)
        assert name in dir(beit_fast)
        assert here[name] is value
        if callable(value):
            assert pickle.loads(pickle.dumps(value)) is value
    with pytest.raises(AttributeError, match="module 'beit_fast' has no attribute 'nonsense'"):
        beit_fast.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from beit_fast import nonsense")


def test_modules_come_with_the_package():
    said = run("""
        import beit_fast
        print(beit_fast.model.pyramid.BeitFeaturePyramid is beit_fast.BeitFeaturePyramid)
        print(beit_fast.kernels.attention.attention_qkvpacked.__name__)
    """)
    assert said == "True\nattention_qkvpacked\n"


def test_modules_and_operators_come_with_the_first_name():
    said = run("""
        import torch
        from beit_fast import Beit
        # Programs that torch.export made with strict=True, and loads again, name them.
        print(torch.ops.beit_fast.masked_linear_cross_entropy.default)
        print(torch.ops.beit_fast.scale_residual.default)
        import beit_fast
        print(beit_fast.model.pyramid.BeitFeaturePyramid is beit_fast.BeitFeaturePyramid)
    """)
    operators = ["masked_linear_cross_entropy", "scale_residual"]
    assert said == "".join(f"beit_fast.{name}.default\n" for name in operators) + "True\n"


def test_what_a_user_puts_in_a_names_place_stays_there():
    said = run("""
        import beit_fast
        beit_fast.from_pretrained = "mine"
        beit_fast.Beit
        print(beit_fast.from_pretrained)
    """)
    assert said == "mine\n"


def test_a_module_brings_the_operators_that_it_calls():
    # conftest.py imports every module of the kernels, users import one.
    called = {
        name.removesuffix(".__init__"): re.findall(r"torch\.ops\.beit_fast\.(\w+)", text)
        for name, path in files()
        if "torch.ops.beit_fast." in (text := path.read_text(encoding="utf-8"))
    }
    assert len(called) > 5
    said = run(f"""
        import importlib, os, torch, triton
        for module, operators in {called}.items():
            if os.fork() == 0:
                importlib.import_module(module)
                missing = [o for o in operators if not hasattr(torch.ops.beit_fast, o)]
                print(*(f"{{module}}:{{operator}}" for operator in missing))
                sys.stdout.flush()
                os._exit(0)
            os.wait()
    """)
    assert said.split() == []
