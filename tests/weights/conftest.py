"""Tiny models and their peers, as `tests/support/tiny_models.py` makes them."""

import pytest

from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
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
def mim(tiny, randomize):
    return randomize(BeitForMaskedImageModeling(tiny(num_classes=0))).eval()


@pytest.fixture
def classifier(tiny, randomize):
    return randomize(BeitForImageClassification(tiny(**PER_BLOCK))).eval()
