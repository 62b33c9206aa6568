"""What the README says is true: commands parse, code runs, files exist."""

import csv
import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit_fast import (
    PUBLISHED,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    beit_config,
    recipes,
)
from beit_fast.cli import VERBS, parse, parse_evaluate, parse_predict

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
]


def test_the_two_commands_are_the_ones_ci_runs():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (demo,) = [c for c in COMMANDS if c.startswith("pip install -c constraints.txt -e . &&")]
    (test,) = [c for c in COMMANDS if c.startswith('pip install -c constraints.txt -e ".[test]"')]
    assert demo.endswith("&& beit-fast pretrain demo")
    assert "&& pytest -n 2" in test
    assert "README.md" in script


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("beit-fast |torchrun ", c)])
def test_a_command_parses(command):
    verb, *arguments = shlex.split(command[command.index("beit-fast ") + len("beit-fast ") :])
    if verb == "convert-dalle":
        assert arguments[::2] == ["--encoder", "--decoder", "--output"]
        return
    if verb == "convert":
        assert [arguments[2], *arguments[4:]] == ["--to"]
        assert arguments[3] in ("unilm", "timm", "hf")
        return
    if verb in ("evaluate", "predict"):
        {"evaluate": parse_evaluate, "predict": parse_predict}[verb](arguments)
        return
    known, _ = VERBS[verb]
    parse(verb, arguments[0], known[arguments[0]], arguments[1:])


@functools.cache
def usage_of(script: str) -> str:
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python bench/")])
def test_a_bench_knows_its_flags(command):
    _, script, *flags = shlex.split(command)
    assert all(flag in usage_of(script) for flag in flags if flag.startswith("--"))


def test_the_first_python_block_runs_and_its_shapes_are_true():
    names = run_python_block("BeitForImageClassification")
    assert names["logits"].shape == (2, 1000)
    assert names["tokens"].shape == (2, 197, 768)
    assert 8.9 < float(names["loss"].detach()) < 9.3


def test_the_kernels_are_called_as_the_page_calls_them():
    names = run_python_block("attention_qkvpacked")
    assert names["out"].shape == (8, 197, 12, 64)
    assert names["qkv"].grad.shape == (8, 197, 3, 12, 64)
    assert names["bias"].grad.shape == (12, 197, 197)


def test_checkpoints_are_moved_as_the_page_moves_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    model = BeitForImageClassification(beit_config("beit_base_patch16_224", **small))
    mim = BeitForMaskedImageModeling(beit_config("beit_base_patch16_224_8k_vocab", **small))
    names = run_python_block("save_pretrained", model=model, mim=mim)
    assert names["tuned"].config.grid == (24, 24)
    assert names["tuned"].head.out_features == 10
    assert len(names["report"].expanded) == 2
    assert f"the {len(PUBLISHED)} published checkpoints" in README


def test_accelerating_runs_as_the_page_has_it():
    names = run_python_block("beit_fast.accelerate(model)")
    assert len(names["report"].replaced) == 73
    assert not names["report"].left
    assert not any(hasattr(m, "_bias_cache") for m in names["model"].modules())


def test_timm_makes_the_models_of_the_page():
    names = run_python_block("import beit_fast.timm")
    assert (names["model"].num_classes, names["model"].config.grid) == (10, (12, 12))
    assert names["features"].feature_info.channels() == [768, 768]


def test_the_pyramid_has_the_sizes_on_the_page():
    names = run_python_block("BeitFeaturePyramid")
    sizes = ", ".join(f"{height} x {width}" for height, width in names["sizes"])
    assert f"for m in maps]  # {sizes}\n" in README
    assert names["shapes"]["p4"].stride == 16


def tiny_classifier(**fields):
    small = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    return BeitForImageClassification(beit_config("beit_base_patch16_224", **small, **fields))


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")  # torch's own
def test_a_model_is_exported_as_the_page_has_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="ONNX needs onnxscript: pip install onnxscript")
    from onnx.reference import ReferenceEvaluator

    monkeypatch.chdir(tmp_path)
    names = run_python_block("torch.onnx.export", model=tiny_classifier())
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(names["program"].module()(images), names["model"](images))
    evaluator = ReferenceEvaluator(str(tmp_path / "beit.onnx"))
    (logits,) = evaluator.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), names["model"](images).detach())


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
# torch's own, at the first import of its compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
def test_a_program_is_compiled_ahead_of_time_as_the_page_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_classifier().eval()
    program = torch.export.export(
        model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    names = run_python_block("aoti_load_package", torch=torch, program=program)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(names["compiled"](images), model(images))


def test_swin_attention_on_the_page_is_timms():
    from timm.models.swin_transformer import WindowAttention

    swin_attention = run_python_block("def swin_attention")["swin_attention"]
    module, x, mask = (
        WindowAttention(32, num_heads=4, window_size=4),
        torch.randn(6, 16, 32),
        torch.randn(3, 16, 16),
    )
    torch.testing.assert_close(swin_attention(module, x, mask), module(x, mask=mask))


def test_the_ratios_of_acceleration_are_the_measured_ones():
    path = ROOT / "bench" / "results" / "accelerate-base-cpu.csv"
    with path.open(newline="") as file:
        measured = {(r["pass"], r["model"]): r for r in csv.DictReader(file)}
    text = " ".join(README.split())
    for kind, phrase in (
        ("train_step", "{} times as long before as after, of transformers' {};"),
        ("forward", "a forward pass {} and {};"),
    ):
        ratios = [f"{float(measured[kind, m]['ratio']):.2f}" for m in ("timm", "transformers")]
        assert phrase.format(*ratios) in text


def run_python_block(about: str, **names) -> dict:
    """The names that the first block with this word leaves behind, and those it starts from."""
    code = next(b for language, b in BLOCKS if language == "python" and about in b)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), names)  # the page's own code
    return names


def test_every_recipe_is_in_the_table():
    for name in recipes.PRETRAIN:
        assert f"| `{name}` |" in README


def test_every_file_of_the_tree_exists():
    tree = next(block for language, block in BLOCKS if block.startswith("kernels/"))
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.exists(), name
        else:
            assert (folder / name).exists(), name


def test_the_table_of_speed_is_the_measured_one():
    with (ROOT / "bench" / "results" / "model-base-cpu.csv").open(newline="") as file:
        measured = {(r["task"], r["pass"], r["model"]): r for r in csv.DictReader(file)}
    tasks = {"classifier": "classifier", "features": "features", "masked image modelling": "mim"}
    passes = {"training step": "train_step", "forward": "forward"}
    rows = re.findall(r"^\| ([a-z ]+), ([a-z ]+) \| (\d+) \| (.*?) \| (.*?) \|", README, re.M)
    assert len(rows) == 6
    for task, kind, ours, timm, transformers in rows:
        key = (tasks[task], passes[kind])
        assert ours == f"{float(measured[*key, 'ours']['ms']):.0f}"
        for name, ratio in (("timm", timm), ("transformers", transformers)):
            if ratio != "has none":
                assert ratio == f"{float(measured[*key, name]['ratio']):.2f}", (key, name)
                assert float(ratio) >= 1


def test_the_tables_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "bench" / "report.py"), "--readme", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_placeholder_is_left():
    assert not re.findall(r"\b[A-Z]+_(?:OUTPUT|NEWEST|NUMBERS|TABLE|MINUTES)\b", README)
