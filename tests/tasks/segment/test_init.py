"""Where training a segmenter starts: what a checkpoint gives, starts anew, or does not fit."""

from dataclasses import asdict, replace

import pytest
import torch

from beit_fast import BeitForMaskedImageModeling, BeitForSemanticSegmentation
from beit_fast.model.config import BeitConfig, SegmenterConfig
from beit_fast.model.resize import resize_rel_pos_table
from beit_fast.tasks.segment.init import starting_point
from beit_fast.train.state import save_checkpoint

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
RECIPE = SegmenterConfig(img_size=32, patch_size=8, num_classes=0, auxiliary_channels=8)
CLASSES = ("ground", "red", "blue")
OWN = "blocks.{}.attn.relative_position_bias_table"
NEW = ("fpn", "decode_head", "auxiliary_head")


@pytest.fixture(scope="module")
def mim(tmp_path_factory):
    """A pre-trained model and the unilm file of it."""
    torch.manual_seed(1)
    model = BeitForMaskedImageModeling(BeitConfig(**TINY, vocab_size=16))
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    path = tmp_path_factory.mktemp("mim") / "mim.pth"
    torch.save({"model": model.state_dict()}, path)
    return model, str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A segmenter and the folder of its run."""
    config = SegmenterConfig(
        **TINY, num_classes=3, head_channels=12, auxiliary_channels=8, taps=(0, 1, 1, 1)
    )
    torch.manual_seed(2)
    model = BeitForSemanticSegmentation(config)
    output = tmp_path_factory.mktemp("run")
    settings = {"model": asdict(config), "classes": CLASSES, "statistics": "imagenet"}
    save_checkpoint(output, 1, {"model": model.state_dict()}, settings, keep=1)
    return model, str(output)


def start(init, wanted=RECIPE, classes=CLASSES, seed=0):
    return starting_point(wanted, init, None, classes, seed)


def test_a_mim_checkpoint_gives_the_encoder_at_the_crops_grid(mim):
    theirs, path = mim
    begun = start(path, replace(RECIPE, img_size=(40, 48)))
    assert begun.model.config.num_classes == 3
    table = theirs.state_dict()["rel_pos_bias.relative_position_bias_table"]
    for name, value in begun.model.state_dict().items():
        if name.endswith("relative_position_bias_table"):
            assert torch.equal(value, resize_rel_pos_table(table, (4, 4), (5, 6)))
        elif not name.startswith(NEW):
            assert torch.equal(value, theirs.state_dict()[name]), name
    for words in (
        "a mim checkpoint",
        "no pyramid and no head for pixels: these start anew",
        "fresh: auxiliary_head, decode_head, fpn1",
        "left out: lm_head.bias",
        "embed_dim 32 (the recipe has 768)",
    ):
        assert words in begun.report


def test_a_segmenter_gives_pyramid_heads_and_taps_and_for_its_classes_all(run):
    theirs, path = run
    begun = start(path)
    assert begun.model.config.tapped == (0, 1, 1, 1)
    for name, value in begun.model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert "anew" not in begun.report


@pytest.mark.parametrize("classes", [("ground", "red", "green"), ("ground", "red")])
def test_for_other_classes_what_scores_them_starts_anew(run, classes):
    theirs, path = run
    begun = start(path, classes=classes)
    assert "what scores classes starts anew" in begun.report
    for name, value in begun.model.state_dict().items():
        if ".conv_seg." in name:
            assert len(value) == len(classes)
            assert value.abs().max() < 0.06  # a normal of 0.01
            if name.endswith("weight"):  # biases start at 0, and here were never trained
                assert not torch.equal(value[:2], theirs.state_dict()[name][:2])
        else:
            assert torch.equal(value, theirs.state_dict()[name]), name


def test_a_head_of_another_kind_starts_anew_and_the_encoder_stays(run):
    theirs, path = run
    begun = start(path, replace(RECIPE, head="linear", auxiliary_channels=0))
    assert begun.model.config.tapped == (1,)
    assert "fresh: decode_head" in begun.report
    for name, value in begun.model.state_dict().items():
        if not name.startswith("decode_head"):
            assert torch.equal(value, theirs.state_dict()[name]), name
    other = start(path, replace(RECIPE, head_channels=20))
    assert "fresh: decode_head" in other.report
    assert torch.equal(other.model.fpn1[0].weight, theirs.fpn1[0].weight)


def test_what_is_fresh_follows_the_seed_and_the_digest_the_weights(mim, run):
    first, again, other = start(mim[1]), start(mim[1]), start(mim[1], seed=1)
    name = "decode_head.conv_seg.weight"
    assert torch.equal(first.model.state_dict()[name], again.model.state_dict()[name])
    assert not torch.equal(first.model.state_dict()[name], other.model.state_dict()[name])
    assert first.digest == other.digest != start(run[1]).digest
    assert start(None, replace(RECIPE, embed_dim=32, depth=2, num_heads=2)).digest is None


def test_what_does_not_fit_is_refused_with_the_remedy(mim):
    with pytest.raises(ValueError, match=r"3 classes and the model 5: .*--model\.num_classes 3"):
        start(mim[1], replace(RECIPE, num_classes=5))
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        start("no/such")
