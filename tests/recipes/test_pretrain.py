"""The recipes have the published numbers."""

import pytest
import torch

from beit_fast import recipes
from beit_fast.data.masking import max_masked
from beit_fast.model.heads import BeitForMaskedImageModeling

PUBLISHED = {
    # name: parameters, epochs, batches of 128 x accumulate x ranks, clip, LayerScale, statistics
    "beit_base_in1k": (92_089_856, 800, 3.0, None, "imagenet"),
    "beit_plus_base_in1k": (91_965_776, 800, 3.0, 0.1, "imagenet"),
    "beit_plus_base_in22k": (91_965_776, 150, 3.0, 0.1, "half"),
    "beit_large_in1k": (311_674_880, 800, 1.0, None, "imagenet"),
    "beit_plus_large_in22k": (311_534_016, 150, 1.0, 1e-5, "half"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_its_numbers(name):
    parameters, epochs, clip, init_values, statistics = PUBLISHED[name]
    config = recipes.PRETRAIN[name]()
    with torch.device("meta"):
        model = BeitForMaskedImageModeling(config.model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.run.epochs == epochs
    assert config.data.batch_size * config.run.accumulate * 16 == 2048
    assert (config.optim.lr, config.optim.min_lr, config.optim.weight_decay) == (1.5e-3, 1e-5, 0.05)
    assert config.optim.clip_grad == clip
    assert config.model.init_values == init_values
    assert config.model.drop_path_rate == 0.1
    assert config.statistics == statistics
    assert config.tokenizer_precision == "fp16"  # as dall_e's convolutions
    assert max_masked(config.model.grid, config.masking) == 75


@pytest.mark.parametrize("name", recipes.PRETRAIN)
def test_a_recipe_fits_together_and_says_its_command(name):
    recipe = recipes.PRETRAIN[name]
    config = recipe()
    assert f"beit-fast pretrain {name}" in recipe.__doc__
    assert config.views.token_size == tuple(8 * side for side in config.model.grid)
    if config.tokenizer_training is not None:
        assert config.tokenizer_training.dvae.vocab_size == config.model.vocab_size
    else:
        assert config.model.vocab_size == 8192


@pytest.mark.parametrize("name", recipes.TOKENIZER)
def test_a_tokenizer_recipe_makes_its_configuration(name):
    config = recipes.TOKENIZER[name]()
    assert config.temperature.end == 1 / 16
    assert config.view.size % 8 == 0
