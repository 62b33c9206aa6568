"""Where fine-tuning starts: what a checkpoint gives, what starts anew, what does not fit."""

from dataclasses import replace

import pytest
import torch

from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.tasks.evaluate.checkpoints import statistics_of
from beit_fast.tasks.finetune.init import starting_point
from beit_fast.train.state import save_checkpoint
from beit_fast.weights.published import PUBLISHED

TINY = BeitConfig(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, vocab_size=16)
RECIPE = BeitConfig(
    img_size=32,
    patch_size=8,
    use_rel_pos_bias=True,
    use_shared_rel_pos_bias=False,
    num_classes=0,
)
CLASSES = ["bee", "cat", "moose"]
SHARED = "rel_pos_bias.relative_position_bias_table"
OWN = "blocks.{}.attn.relative_position_bias_table"


@pytest.fixture(scope="module")
def mim(tmp_path_factory):
    """A pre-trained model and the unilm file of it."""
    torch.manual_seed(1)
    model = BeitForMaskedImageModeling(TINY)
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    path = tmp_path_factory.mktemp("mim") / "mim.pth"
    torch.save({"model": model.state_dict()}, path)
    return model, str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fine-tuned model and the folder of its run."""
    config = replace(
        TINY, use_rel_pos_bias=True, use_shared_rel_pos_bias=False, num_classes=len(CLASSES)
    )
    torch.manual_seed(2)
    model = BeitForImageClassification(config)
    output = tmp_path_factory.mktemp("run")
    settings = {"model": vars(config), "classes": CLASSES, "statistics": "imagenet"}
    save_checkpoint(output, 1, {"model": model.state_dict()}, settings, keep=1)
    return model, str(output)


def start(init, wanted=RECIPE, classes=CLASSES):
    return starting_point(wanted, init, None, classes, 0)


def test_a_mim_checkpoint_gives_the_encoder_and_each_block_its_table(mim):
    theirs, path = mim
    begun = start(path)
    model = begun.model
    assert model.config.num_classes == 3
    for name, value in model.state_dict().items():
        if name.startswith(("fc_norm", "head")):
            assert name not in theirs.state_dict()
        elif "relative_position_bias_table" in name:
            assert torch.equal(value, theirs.state_dict()[SHARED])
        else:
            assert torch.equal(value, theirs.state_dict()[name]), name
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    assert tables[0] is not tables[1]
    assert 0 < model.head.weight.std() < 1e-4  # 0.02 x 0.001
    assert "fresh: fc_norm.bias" in begun.report
    assert "left out: lm_head.bias" in begun.report
    assert "embed_dim 32 (the recipe has 768)" in begun.report


def test_a_recipe_with_a_shared_table_keeps_it(mim):
    model = start(mim[1], replace(RECIPE, use_rel_pos_bias=False, use_shared_rel_pos_bias=True))
    assert SHARED in model.model.state_dict()
    assert OWN.format(0) not in model.model.state_dict()


def test_positions_are_resized_to_the_recipes_pixels(mim):
    theirs, path = mim
    begun = start(path, replace(RECIPE, img_size=(48, 40)))
    expected = resize_rel_pos_table(theirs.state_dict()[SHARED], (4, 4), (6, 5))
    assert torch.equal(begun.model.state_dict()[OWN.format(1)], expected)
    assert "resized: " in begun.report


def test_a_vanilla_checkpoint_stays_vanilla_whatever_the_recipe_is_for(tmp_path):
    config = replace(TINY, use_abs_pos_emb=True, use_shared_rel_pos_bias=False, init_values=None)
    theirs = BeitForMaskedImageModeling(config).state_dict()
    torch.save(theirs, tmp_path / "vanilla.pth")
    with pytest.raises(ValueError, match="heads"):  # no table says how many
        start(str(tmp_path / "vanilla.pth"))
    settings = {"model": vars(config)}
    save_checkpoint(tmp_path, 1, {"model": theirs}, settings, keep=1)
    model = start(str(tmp_path), replace(RECIPE, img_size=48)).model
    assert not any("relative_position" in name for name in model.state_dict())
    assert not any("gamma" in name for name in model.state_dict())
    expected = resize_pos_embed(theirs["pos_embed"], (4, 4), (6, 6))
    assert torch.equal(model.pos_embed, expected)


def test_what_is_fresh_follows_the_seed_and_the_digest_the_weights(mim, run):
    first, again = start(mim[1]), start(mim[1])
    assert torch.equal(first.model.head.weight, again.model.head.weight)
    other = starting_point(RECIPE, mim[1], None, CLASSES, 1)
    assert not torch.equal(first.model.head.weight, other.model.head.weight)
    assert first.digest == again.digest == other.digest != start(run[1]).digest
    assert start(None, replace(TINY, num_classes=3)).digest is None


def test_a_head_stays_for_its_own_classes_alone(run):
    theirs, path = run
    assert torch.equal(start(path).model.head.weight, theirs.head.weight)
    for classes in (["bee", "cat"], ["ant", "cat", "moose"]):  # fewer; as many, but others
        begun = start(path, classes=classes)
        assert begun.model.head.weight.shape == (len(classes), 32)
        assert begun.model.head.weight.std() < 1e-4
        assert torch.equal(begun.model.fc_norm.weight, theirs.fc_norm.weight)
        assert "fresh: head.bias, head.weight" in begun.report


def test_what_a_checkpoint_was_trained_with_is_known_of_runs_and_published_names(mim, run):
    assert statistics_of(run[1]) == "imagenet"
    assert statistics_of(mim[1]) is None
    entry = PUBLISHED["beit_base_patch16_224_pt1k_800ep"]
    assert statistics_of(entry.name) == (entry.mean, entry.std)


def test_what_does_not_fit_is_refused_with_the_remedy(mim, tmp_path):
    with pytest.raises(ValueError, match=r"3 class folders .* 5 classes: .*--model\.num_classes 3"):
        start(mim[1], replace(RECIPE, num_classes=5))
    with pytest.raises(ValueError, match="do not divide into patches of 8x8: pass img_size"):
        start(mim[1], replace(RECIPE, img_size=33, patch_size=1))
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        start(str(tmp_path / "none.pth"))
    other = tmp_path / "other.pth"
    torch.save({"model": {"conv1.weight": torch.zeros(4, 3, 3, 3)}}, other)
    with pytest.raises(ValueError, match=str(other)):
        start(str(other))
