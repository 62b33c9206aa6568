"""The fine-tuning recipes have the published numbers, fit together and survive the parser."""

import pytest
import torch

from beit_fast import recipes
from beit_fast.cli import parse
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.recipes import FINETUNE
from beit_fast.tasks.finetune.task import check_statistics

NONE, BOTH = (0.0, 0.0), (0.8, 1.0)
PUBLISHED = {
    # parameters, epochs, ranks, batch, lr, warm-up, layer decay, drop path, weight decay, mixing
    "beit_plus_base_in1k": (86_530_984, 100, 8, 1024, 4e-3, 20, 0.65, 0.1, 0.05, BOTH),
    "beit_plus_large_in1k": (304_430_568, 50, 8, 1024, 1e-3, 5, 0.75, 0.2, 0.05, BOTH),
    "beit_plus_base_in22k": (102_557_713, 90, 16, 4096, 3e-3, 5, 0.65, 0.1, 0.05, NONE),
    "beit_plus_large_in22k": (325_792_593, 90, 16, 2048, 2e-3, 5, 0.75, 0.2, 0.05, NONE),
    "beit_plus_base_in22k_in1k": (86_530_984, 30, 8, 512, 2e-5, 5, 0.85, 0.1, 1e-8, NONE),
    "beit_plus_large_in22k_in1k": (304_430_568, 30, 8, 512, 2e-5, 5, 0.9, 0.4, 1e-8, NONE),
    "beit_plus_base_in22k_in1k_384": (86_744_104, 30, 8, 512, 2e-5, 5, 0.85, 0.1, 1e-8, NONE),
    "beit_plus_large_in22k_in1k_384": (304_998_888, 30, 8, 512, 2e-5, 5, 0.9, 0.4, 1e-8, NONE),
    "beit_plus_large_in22k_in1k_512": (305_674_728, 30, 8, 512, 2e-5, 5, 0.9, 0.4, 1e-8, NONE),
    "beit_base_in1k": (None, 100, 8, 1024, 4e-3, 20, 0.65, 0.1, 0.05, BOTH),
    "beit_large_in1k": (None, 50, 8, 1024, 3e-3, 5, 0.75, 0.1, 0.05, BOTH),
    "beit_base_cifar100": (None, 150, 4, 512, 3e-3, 20, 0.65, 0.1, 0.3, BOTH),
}
# unilm's README, and the paper's Tables 1 and 7: what the first line of a docstring promises.
TOP1 = {
    "beit_plus_base_in1k": "83.7",
    "beit_plus_large_in1k": "86.0",
    "beit_plus_base_in22k_in1k": "85.2",
    "beit_plus_large_in22k_in1k": "87.4",
    "beit_plus_base_in22k_in1k_384": "86.8",
    "beit_plus_large_in22k_in1k_384": "88.4",
    "beit_plus_large_in22k_in1k_512": "88.6",
    "beit_base_in1k": "83.2",
    "beit_large_in1k": "85.2",
    "beit_base_cifar100": "90.1",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_its_numbers(name):
    published = PUBLISHED[name]
    parameters, epochs, ranks, batch, lr, warmup, layer_decay, drop_path, decay, mix = published
    config = FINETUNE[name]()
    if parameters is not None:
        with torch.device("meta"):
            model = BeitForImageClassification(config.model)
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.run.epochs == epochs
    assert config.data.batch_size * config.run.accumulate * ranks == batch
    optim, augment = config.optim, config.augment
    assert (optim.lr, optim.min_lr, optim.warmup_epochs) == (lr, 1e-6, warmup)
    assert (optim.weight_decay, optim.clip_grad, config.layer_decay) == (decay, None, layer_decay)
    assert config.model.drop_path_rate == drop_path
    assert (augment.mixup, augment.cutmix) == mix
    assert (augment.rand_augment, augment.label_smoothing) == (9.0, 0.1)
    assert augment.erase == (0.0 if name == "beit_base_cifar100" else 0.25)
    assert config.run.ema_decay is None


@pytest.mark.parametrize("name", FINETUNE)
def test_a_recipe_says_its_command_and_result_and_survives_the_parser(name):
    recipe = FINETUNE[name]
    config, first_line = recipe(), recipe.__doc__.splitlines()[0]
    assert parse("finetune", name, recipe, []) == config
    assert f"beit-fast finetune {name}" in recipe.__doc__
    assert (f"{TOP1[name]} % top-1" in first_line) if name in TOP1 else "top-1" not in first_line
    check_statistics(config)  # those of the weights it starts from
    if "ranks" in recipe.__doc__:
        assert f"ranks x {config.data.batch_size} images" in recipe.__doc__
    if config.init is not None and config.init.startswith("runs/"):
        assert config.init in {known().run.output for known in recipes.PRETRAIN.values()}


def test_no_recipe_shares_a_folder_with_another():
    known = [*recipes.PRETRAIN.values(), *recipes.TOKENIZER.values(), *FINETUNE.values()]
    outputs = [recipe().run.output for recipe in known]
    assert len(set(outputs)) == len(outputs)
