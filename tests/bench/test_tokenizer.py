"""The bench of the tokenizer: fp32 is fp32, each candidate is a row as soon as it is timed."""

import math

import pytest
import torch
import torch.nn.functional as F

from beit_fast.data.views.config import SingleViewConfig
from beit_fast.data.views.single_view import single_view
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.tokenizer.frozen import PRECISIONS

CONV, MATMUL = torch.backends.cudnn.conv, torch.backends.cuda.matmul


@pytest.fixture
def tokenizer(bench):
    return bench("tokenizer")


@pytest.fixture
def dvae():
    config = DvaeConfig(vocab_size=64, encoder_width=8, decoder_width=4, decoder_input_width=1)
    return Dvae(config).eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)


def test_the_yardstick_of_the_agreement_is_fp32(tokenizer, dvae, images, monkeypatch):
    """cuDNN's default is TF32, and what the user allowed counts no more."""
    seen = []

    def watch(function):
        def run(*args, **kwargs):
            seen.append((CONV.fp32_precision, MATMUL.fp32_precision))
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(F, "conv2d", watch(F.conv2d))
    monkeypatch.setattr(F, "linear", watch(F.linear))
    torch.set_float32_matmul_precision("high")
    try:
        rows = list(tokenizer.agreement(dvae, images))
        assert CONV.fp32_precision == MATMUL.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        MATMUL.fp32_precision = "none"
    assert seen
    assert not any("tf32" in precisions for precisions in seen)
    by_name = {(row["convolutions"], row["scores"]): row for row in rows}
    assert by_name["ours fp32", "fp32"]["changed"] == 0
    assert {name for name, _ in by_name} == {"reference's fp16", *(f"ours {p}" for p in PRECISIONS)}


def test_a_candidate_that_fails_costs_its_row_alone(tokenizer, dvae, images, bench, monkeypatch):
    makers = tokenizer._candidates

    def with_a_broken_one(*arguments):
        made = makers(*arguments)
        return {**made, "compile, channels last, all": lambda: 1 / 0}

    monkeypatch.setattr(tokenizer, "_candidates", with_a_broken_one)
    roof = bench("timing").Roof(1e9, 1e9)
    rows = tokenizer.speed(dvae, images, roof, 2, ["compile", "Dvae"])
    first = next(rows)  # before the others are built
    assert first["candidate"] == "eager, all"
    assert first["speedup"] == 1
    failed, last = rows
    assert failed["error"] == "ZeroDivisionError: division by zero"
    assert math.isnan(failed["ms"])
    assert failed["floor_ms"] == first["floor_ms"]
    assert last["candidate"] == "Dvae.encode"
    assert last["ms"] > 0
    assert not last["error"]


def test_the_images_are_those_of_the_tokenizers_loader(tokenizer):
    """Decoded by Pillow, which gives the same pixels, so that torchcodec is not needed."""
    made = tokenizer.load_images(2, size=64)
    source = tokenizer.open_source(tokenizer.PHOTOGRAPHS)
    config = SingleViewConfig(size=64)
    for i in range(2):
        wanted = single_view(source.read(i), config, tokenizer.random.Random(i))
        assert torch.equal(made[i].permute(1, 2, 0), torch.from_numpy(wanted))


def test_only_is_refused_where_it_names_nothing(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tokenizer.py", "agreement", "--only", "eager"])
    with pytest.raises(SystemExit):
        tokenizer.main()
    assert "--only names candidates of speed" in capsys.readouterr().err
