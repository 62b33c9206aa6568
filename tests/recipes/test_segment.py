"""The segmentation recipes have the published numbers, fit together and survive the parser."""

import pytest
import torch

from beit_fast import BeitForSemanticSegmentation, recipes
from beit_fast.cli import parse
from beit_fast.recipes import SEGMENT
from beit_fast.train.optim import lr_at, warmup_steps
from beit_fast.weights.published import PUBLISHED as WEIGHTS

B_TAPS, L_TAPS = (3, 5, 7, 11), (7, 11, 15, 23)
# unilm's files of these names for beit and beit2, and the paper's Table 14: by hand.
PUBLISHED = {
    # crop, taps, ranks, micro-batches, lr, layer decay, drop path, LayerScale, stride, init
    "beit_plus_base_ade20k_512": (
        *(512, B_TAPS, 8, 1, 7e-4, 0.65, 0.1, 0.1, 341),
        "beit_base_patch16_224_pt22k",
    ),
    "beit_plus_base_in22k_ade20k_512": (
        *(512, B_TAPS, 8, 1, 3e-5, 0.9, 0.1, 0.1, 341),
        "beit_base_patch16_224_pt22k_ft22k",
    ),
    "beit_plus_base_in22k_ade20k_640": (
        *(640, B_TAPS, 8, 1, 3e-5, 0.9, 0.1, 0.1, 426),
        "beit_base_patch16_224_pt22k_ft22k",
    ),
    "beit_plus_large_in22k_ade20k_512": (
        *(512, L_TAPS, 8, 1, 2e-5, 0.95, 0.2, 1e-6, 341),
        "beit_large_patch16_224_pt22k_ft22k",
    ),
    "beit_plus_large_in22k_ade20k_640": (
        *(640, L_TAPS, 8, 2, 2e-5, 0.95, 0.2, 1e-6, 426),
        "beit_large_patch16_224_pt22k_ft22k",
    ),
    "beit_base_ade20k_512": (
        *(512, B_TAPS, 8, 1, 1e-3, 0.65, 0.1, None, 341),
        "beit_base_patch16_224_pt1k_800ep",
    ),
    "beit_v2_base_ade20k_512": (
        *(512, B_TAPS, 8, 1, 5e-5, 0.75, 0.15, 0.1, 341),
        "beitv2_base_patch16_224_pt1k.pth",
    ),
    "beit_v2_base_in21k_ade20k_512": (
        *(512, B_TAPS, 8, 1, 5e-5, 0.85, 0.15, 0.1, 341),
        "beitv2_base_patch16_224_pt1k_ft21k.pth",
    ),
    "beit_v2_large_ade20k_512": (
        *(512, L_TAPS, 8, 1, 4e-5, 0.9, 0.2, 1e-6, 341),
        "beitv2_large_patch16_224_pt1k.pth",
    ),
    "beit_v2_large_in21k_ade20k_512": (
        *(512, L_TAPS, 8, 1, 3e-5, 0.9, 0.2, 1e-6, 341),
        "beitv2_large_patch16_224_pt1k_ft21k.pth",
    ),
}
# Single scale, of unilm's READMEs of beit and beit2: what the first line of a docstring promises.
MIOU = {
    "beit_plus_base_in22k_ade20k_640": "53.61",
    "beit_plus_large_in22k_ade20k_640": "56.7",
    "beit_v2_base_ade20k_512": "53.1",
    "beit_v2_base_in21k_ade20k_512": "53.5",
    "beit_v2_large_ade20k_512": "56.7",
    "beit_v2_large_in21k_ade20k_512": "57.54",
}
# beit2's README has 163M and 441M of parameters for its segmenters; here they are 163.1 and 440.4.
MILLIONS = {"beit_v2_base_ade20k_512": 163, "beit_v2_large_in21k_ade20k_512": 441}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_its_numbers(name):
    crop, taps, ranks, micro_batches, lr, layer_decay, drop_path, scale, stride, init = PUBLISHED[
        name
    ]
    config = SEGMENT[name]()
    model, optim, augment = config.model, config.optim, config.augment
    assert (model.image_pixels, model.patch_size, model.tapped) == ((crop, crop), 16, taps)
    assert (model.num_classes, model.head, model.auxiliary_channels) == (150, "upernet", 256)
    assert (model.upernet_channels, model.drop_rate) == (model.embed_dim, 0.1)
    assert (model.drop_path_rate, model.init_values) == (drop_path, scale)
    vanilla = name == "beit_base_ade20k_512"
    assert (model.use_abs_pos_emb, model.use_rel_pos_bias) == (vanilla, not vanilla)
    assert not model.use_shared_rel_pos_bias
    assert config.data.batch_size * config.run.accumulate * ranks == 16
    assert (config.run.accumulate, config.run.steps) == (micro_batches, 160_000)
    assert (optim.lr, optim.min_lr, optim.betas) == (lr, 0, (0.9, 0.999))
    assert (optim.schedule, optim.poly_power) == ("poly", 1)
    assert warmup_steps(optim, 160_000, 1263) == 1500
    assert lr_at(0, optim, 160_000, 1500) == pytest.approx(lr * 1e-6)
    assert lr_at(80_000, optim, 160_000, 1500) == pytest.approx(lr / 2)
    assert (optim.weight_decay, optim.clip_grad, config.layer_decay) == (0.05, None, layer_decay)
    assert (config.auxiliary_weight, config.statistics) == (0.4, "imagenet")
    assert (augment.scale, augment.ratio) == ((4 * crop, crop), (0.5, 2))
    assert (augment.max_class_share, augment.hflip, augment.distort) == (0.75, 0.5, True)
    slide = config.evaluation
    assert slide.strides((crop, crop)) == (stride, stride)
    assert tuple(slide.sides((crop, crop))) == (4 * crop, crop)
    assert (slide.multi_scale, slide.flip) == ((1.0,), False)
    assert (config.init, config.freeze_encoder, config.run.ema_decay) == (init, False, None)
    assert init.endswith(".pth") or init in WEIGHTS
    # The original evaluates and saves every 16,000 of its steps of 16 of 20,210 images.
    assert config.run.evaluate_every * 20_210 / 16 == pytest.approx(16_000, rel=1e-3)


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_a_recipes_model_has_the_published_size(name, millions):
    with torch.device("meta"):
        model = BeitForSemanticSegmentation(SEGMENT[name]().model)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, abs=7e5)


@pytest.mark.parametrize("name", SEGMENT)
def test_a_recipe_says_its_command_and_result_and_survives_the_parser(name):
    recipe = SEGMENT[name]
    config, (first_line, *_) = recipe(), recipe.__doc__.splitlines()
    assert parse("segment", name, recipe, []) == config
    assert f"beit-fast segment {name}" in recipe.__doc__
    assert (f": {MIOU[name]} mIoU" in first_line) if name in MIOU else "mIoU" not in first_line
    if "ranks" in recipe.__doc__:
        assert f"ranks x {config.data.batch_size} images" in recipe.__doc__
    if config.init is not None and config.init.endswith(".pth"):
        assert config.init in " ".join(recipe.__doc__.split())


def test_the_recipe_for_data_of_ones_own_leaves_the_classes_to_it():
    config = SEGMENT["small_data"]()
    assert config.model.num_classes == 0
    assert config.data.batch_size * config.run.accumulate == 16
    assert config.run.ema_decay is not None
    with pytest.raises(ValueError, match="num_classes is 0: a segmenter needs to know how many"):
        BeitForSemanticSegmentation(config.model)


def test_no_recipe_shares_a_folder_with_another():
    tables = (recipes.PRETRAIN, recipes.TOKENIZER, recipes.FINETUNE, SEGMENT)
    outputs = [recipe().run.output for table in tables for recipe in table.values()]
    assert len(set(outputs)) == len(outputs)
