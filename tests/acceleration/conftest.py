"""Tiny models and their peers, as `tests/support/` makes them."""

from accelerated import forget_warnings, pair
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
    "forget_warnings",
    "gradients",
    "pair",
    "randomize",
    "timm_beit",
    "tiny",
    "to_transformers",
    "transformers_config",
]
