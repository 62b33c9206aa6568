"""Benches run where only torch, triton, timm and transformers are: what they need, they say."""

import csv
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from beit_fast.tokenizer.checkpoint import save_tokenizer
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae

BENCH = Path(__file__).resolve().parents[2] / "bench"
MISSING = (
    "grain", "jsonargparse", "torchcodec", "simplejpeg", "torchao", "xformers", "flash_attn",
    "liger_kernel", "apex", "cut_cross_entropy", "quack", "cudnn",
)  # fmt: skip

# Runs each command in a process without those libraries; the last line of each says how it ended.
SCRIPT = """
import concurrent.futures, runpy, sys, traceback
from dataclasses import replace
from pathlib import Path

for name in {missing!r}:
    sys.modules[name] = None  # as if it were not installed
sys.path.insert(0, {bench!r})
import torch
import timing
torch.set_num_threads(1)
timing.RESULTS = Path({results!r})
timing.measure_roof = lambda *_: timing.Roof(1e9, 1e9)

class Here:  # memory in this process: another one would have the libraries
    def __init__(self, *_): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def submit(self, function, *arguments):
        done = concurrent.futures.Future()
        done.set_result(function(*arguments))
        return done

concurrent.futures.ProcessPoolExecutor = Here
import beit_fast.model.config
whole = beit_fast.model.config.beit_config

def small(name, **overrides):
    sizes = dict(embed_dim=32, depth=1, num_heads=2, num_classes=8)
    return replace(whole(name, **overrides), **sizes)

beit_fast.model.config.beit_config = small
for command in {commands!r}:
    print("COMMAND", command, flush=True)
    sys.argv = command.split()
    try:
        runpy.run_path(str(Path({bench!r}, sys.argv[0])), run_name="__main__")
        print("ENDED well", flush=True)
    except SystemExit as error:
        print("ENDED", "well" if not error.code else error.code, flush=True)
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        print("ENDED", type(error).__name__, *str(error).splitlines()[:1], flush=True)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What every command printed, and the folder of results."""
    folder = tmp_path_factory.mktemp("blocked")
    torch.manual_seed(0)
    tiny = DvaeConfig(vocab_size=64, encoder_width=8, decoder_width=4, decoder_input_width=1)
    save_tokenizer(Dvae(tiny), folder / "dvae.safetensors")
    weights = f"--tokenizer {folder}/dvae.safetensors --images 2 --device cpu"
    commands = [
        *(f"{name}.py --help" for name in NAMES),
        "kernels.py pieces --device cpu --rounds 2 --only rel_pos_bias-B4-D768-forward",
        f"tokenizer.py speed {weights} --rounds 2 --only Dvae",
        f"tokenizer.py agreement {weights}",
        "pretrain.py --device cpu --rounds 2 --batch 2 --tokenizer none --peers timm official",
        "model.py --rounds 2 --batch 2 --tasks features",
        "data.py --rounds 1 --only masks jitter",
        "data.py --rounds 1 --only transforms",
        "roofline.py --machines H100",
    ]
    script = SCRIPT.format(
        missing=set(MISSING), bench=str(BENCH), results=str(folder / "results"), commands=commands
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    parts = done.stdout.split("COMMAND ")[1:]
    assert len(parts) == len(commands), done.stdout + done.stderr
    return dict(zip(commands, parts, strict=True)), folder / "results"


NAMES = (
    "kernels", "tune", "pretrain", "model", "tokenizer", "data", "roofline", "report",
    "machine_code", "launches", "science",
)  # fmt: skip


def test_help_of_every_bench_needs_none_of_them(outputs):
    for command, text in outputs[0].items():
        if "--help" in command:
            assert text.rstrip().endswith("ENDED well"), text


@pytest.mark.parametrize(
    "start", ["kernels.py pieces", "tokenizer.py speed", "tokenizer.py agreement",
              "pretrain.py --device", "model.py --rounds", "data.py --rounds 1 --only masks",
              "roofline.py --machines"],
)  # fmt: skip
def test_a_case_of_every_bench_needs_none_of_them(outputs, start):
    (text,) = [text for command, text in outputs[0].items() if command.startswith(start)]
    assert text.rstrip().endswith("ENDED well"), text


def test_results_are_there(outputs):
    written = {path.name for path in outputs[1].glob("*.csv")}
    assert written == {
        "kernels-pieces-cpu.csv", "tokenizer-speed-trained-cpu.csv", "data.csv",
        "tokenizer-agreement-trained-cpu.csv", "pretrain-base-cpu.csv", "model-base-cpu.csv",
    }  # fmt: skip
    for path in outputs[1].glob("*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows
        assert not any(row.get("error") for row in rows), path


def test_what_decodes_jpegs_says_what_to_install(outputs):
    (text,) = [text for command, text in outputs[0].items() if "--only transforms" in command]
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("ENDED ImportError JPEGs are decoded by torchcodec")
    assert "pip install 'torchcodec>=0.17'" in last
