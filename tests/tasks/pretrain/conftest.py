"""Token caches of the tiny pre-training."""

import pytest

from beit_fast.tasks.pretrain.config import PretokenizeConfig


@pytest.fixture
def cache_of(tmp_path):
    """`cache_of(config, **fields)`: what writes the token cache of that configuration's runs."""
    defaults = {"output": str(tmp_path / "tokens"), "num_views": 2, "images_per_shard": 5}
    return lambda config, **changes: PretokenizeConfig(**vars(config) | defaults | changes)
