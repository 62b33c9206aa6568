"""A pre-training small enough to test: random images, an untrained tokenizer, two blocks."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data.config import DataConfig, MaskingConfig
from beit_fast.data.views.config import ViewConfig
from beit_fast.model.config import BeitConfig
from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tokenizer.checkpoint import save_tokenizer
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.config import OptimConfig, RunConfig


@pytest.fixture
def compiled_sides(monkeypatch):
    """torch.compile makes nothing; here are all sides of its inputs' shapes, a list for each time
    it was called upon. A side that it takes for variable is a SymInt."""
    sides = []

    def note(graph, inputs):
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        sides.append([side for tensor in tensors for side in tensor.shape])
        sides[-1] += [value for value in inputs if isinstance(value, torch.SymInt)]
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note))
    return sides


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Twelve small images in two class folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(12):
        path = folder / f"class_{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    torch.manual_seed(0)
    config = DvaeConfig(
        vocab_size=32, encoder_width=8, decoder_width=8, decoder_input_width=8, blocks_per_group=1
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    save_tokenizer(Dvae(config), path)
    return path


@pytest.fixture
def pretrain_config(image_folder, tokenizer_file, tmp_path):
    """`pretrain_config(section={field: value}, field=value)` changes the tiny configuration."""
    base = PretrainConfig(
        model=BeitConfig(
            img_size=(32, 48),
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            vocab_size=32,
            drop_path_rate=0.3,
        ),
        data=DataConfig(path=str(image_folder), batch_size=4, num_threads=2),
        masking=MaskingConfig(num_masked=9, min_block=3),
        views=ViewConfig(size=(32, 48), token_size=(32, 48)),
        optim=OptimConfig(lr=2e-3, warmup_steps=2),
        run=RunConfig(
            output=str(tmp_path / "run"), steps=6, precision="fp32", device="cpu", log_every=2
        ),
        tokenizer=str(tokenizer_file),
    )

    def change(**changes):
        sections = {
            name: replace(getattr(base, name), **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return replace(base, **sections)

    return change
