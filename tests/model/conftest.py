"""Tiny models and their peers, as `tests/support/tiny_models.py` makes them."""

from tiny_models import (
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
