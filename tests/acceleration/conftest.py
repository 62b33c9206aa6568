"""Tiny models and their peers, as `tests/support/tiny_models.py` makes them."""

import copy

import pytest

from accelerated import build_model
from beit_fast import accelerate
from tiny_models import (
    PER_BLOCK,
    assert_agree,
    gradients,
    randomize,
    timm_beit,
    tiny,
    to_transformers,
    transformers_config,
)

__all__ = [
    "assert_agree",
    "gradients",
    "randomize",
    "timm_beit",
    "tiny",
    "to_transformers",
    "transformers_config",
]


@pytest.fixture
def pair(tiny, randomize, transformers_config):
    """A model and its accelerated copy, random weights, in eval."""

    def make(kind, attention="sdpa", hidden_dropout=0.0, **fields):
        config = tiny(**(PER_BLOCK | fields))
        theirs = transformers_config(config)
        theirs._attn_implementation = attention
        theirs.drop_path_rate = config.drop_path_rate
        theirs.hidden_dropout_prob = hidden_dropout
        model = randomize(build_model(kind, config, theirs)).eval()
        accelerated = copy.deepcopy(model)
        accelerate(accelerated)
        return model, accelerated

    return make
