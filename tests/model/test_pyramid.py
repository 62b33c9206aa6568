import pytest
import torch
from torch import nn

from beit_fast.model.config import default_taps
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.pyramid import BeitFeaturePyramid
from beit_fast.weights.load import from_pretrained, load_pretrained
from tiny_models import PER_BLOCK

UNILM = {
    "fpn1.0.weight", "fpn1.0.bias", "fpn1.1.weight", "fpn1.1.bias", "fpn1.1.running_mean",
    "fpn1.1.running_var", "fpn1.1.num_batches_tracked", "fpn1.3.weight", "fpn1.3.bias",
    "fpn2.0.weight", "fpn2.0.bias",
}  # fmt: skip


@pytest.fixture
def config(tiny):
    def make(**overrides):
        fields = {"img_size": 64, "patch_size": 16, "depth": 6, **PER_BLOCK}
        return tiny(**{**fields, **overrides})

    return make


def of_pyramid(model):
    return {name for name in model.state_dict() if name.startswith("fpn")}


def test_taps_are_those_of_unilm():
    assert default_taps(12) == (3, 5, 7, 11)
    assert default_taps(24) == (7, 11, 15, 23)
    assert default_taps(6) == (1, 2, 3, 5)
    assert default_taps(1) == (0, 0, 0, 0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_maps_and_gradients_are_those_of_transformers(
    config, randomize, transformers_config, to_transformers, gradients, assert_agree, training
):
    from transformers import BeitBackbone

    ours = randomize(BeitFeaturePyramid(config())).train(training)
    theirs_config = transformers_config(config())
    theirs_config.update({
        "add_fpn": True, "reshape_hidden_states": True, "use_mask_token": False,
        "out_features": [f"stage{tap + 1}" for tap in ours.taps],
    })  # fmt: skip
    theirs = BeitBackbone(theirs_config).train(training)
    rename = {
        "fpn1.0": "fpn.fpn1.conv_transpose1",
        "fpn1.1": "fpn.fpn1.normalization",
        "fpn1.3": "fpn.fpn1.conv_transpose2",
        "fpn2.0": "fpn.fpn2",
    }

    def named(tensors):
        return to_transformers({
            rename[n[:6]] + n[6:] if n.startswith("fpn") else n: t for n, t in tensors.items()
        })  # fmt: skip

    theirs.load_state_dict(named(ours.state_dict()), strict=True)
    images = torch.randn(2, 3, 64, 64)
    maps, expected = ours(images), theirs(images).feature_maps
    weights = [torch.randn_like(each) for each in maps]
    for one, other in zip(maps, expected, strict=True):
        assert_agree(one, other)
    sum((m * w).sum() for m, w in zip(maps, weights, strict=True)).backward()
    sum((m * w).sum() for m, w in zip(expected, weights, strict=True)).backward()
    found, wanted = named(gradients(ours)), gradients(theirs)
    if training:  # what batch norm takes away has no gradient but rounding
        for tensors in (found, wanted):
            assert tensors.pop("fpn.fpn1.conv_transpose1.bias").abs().max() < 1e-3
    assert_agree(found, wanted)


def test_taps_are_what_blocks_give_and_none_runs_after_the_last(config, randomize):
    model = randomize(BeitFeaturePyramid(config(), taps=(3, 0, 2, 1))).eval()
    seen = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *call, number=number: seen.update({number: call[2]}))
    third = model(torch.randn(1, 3, 64, 64))[2]
    assert sorted(seen) == [0, 1, 2, 3]
    assert torch.equal(third, seen[2][:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


@pytest.mark.parametrize(
    ("patch", "names"), [(16, UNILM), (8, {"fpn1.0.weight", "fpn1.0.bias"})], ids=["16", "8"]
)
def test_names_are_unilms_and_strides_those_asked_for(config, patch, names):
    model = BeitFeaturePyramid(config(patch_size=patch, dynamic_img_size=True)).eval()
    assert of_pyramid(model) == names
    for height, width in ((64, 64), (96, 32), (32, 128)):
        maps = model(torch.randn(2, 3, height, width))
        assert [tuple(m.shape) for m in maps] == [
            (2, model.out_channels, height // s, width // s) for s in (4, 8, 16, 32)
        ]
    assert model(torch.randn(1, 3, 48, 80))[3].shape == (1, 32, 1, 2)  # an odd row, left out


def test_names_make_a_dict_as_detection_code_takes_it(config):
    names = ["p2", "p3", "p4", "p5"]
    model = BeitFeaturePyramid(config(), names=names)
    maps, shapes = model(torch.randn(1, 3, 64, 64)), model.output_shape()
    assert list(maps) == list(shapes) == names
    assert model.size_divisibility == max(shape.stride for shape in shapes.values())
    for name in names:
        assert shapes[name].channels == maps[name].shape[1]
        assert shapes[name].stride == 64 // maps[name].shape[2]
    shapes = BeitFeaturePyramid(config()).output_shape()
    assert list(shapes) == ["stride4", "stride8", "stride16", "stride32"]


@pytest.mark.parametrize(
    ("patch", "strides", "divisibility"),
    [
        (14, (3.5, 7, 14, 28), 28),
        (32, (8, 16, 32, 64), 64),
        ((16, 8), ((4, 2), (8, 4), (16, 8), (32, 16)), 32),
    ],
)
def test_other_patches_have_strides_that_go_with_them(config, patch, strides, divisibility):
    height, width = (6 * side for side in config(img_size=448, patch_size=patch).patch_pixels)
    model = BeitFeaturePyramid(config(img_size=(height, width), patch_size=patch))
    assert of_pyramid(model) == UNILM
    assert (model.strides, model.size_divisibility) == (strides, divisibility)
    assert [shape.stride for shape in model.output_shape().values()] == list(strides)
    maps = model(torch.randn(1, 3, height, width))
    assert [tuple(m.shape[2:]) for m in maps] == [(24, 24), (12, 12), (6, 6), (3, 3)]


@pytest.mark.parametrize("mode", [True, "selective"])
def test_checkpointing_changes_no_gradient(config, randomize, gradients, mode):
    model = randomize(BeitFeaturePyramid(config()))
    images, found = torch.randn(2, 3, 64, 64), []
    for enabled in (False, mode):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        sum(m.square().sum() for m in model(images)).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_a_segmentation_checkpoint_of_unilm_gives_its_backbone(config, randomize, tmp_path):
    source = randomize(BeitFeaturePyramid(config()))
    state = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "upernet.pth")
    model = BeitFeaturePyramid(config())
    report = load_pretrained(model, tmp_path / "upernet.pth")
    assert not report.fresh
    assert not report.left_out
    images = torch.randn(1, 3, 64, 64)
    for one, other in zip(model.eval()(images), source.eval()(images), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [BeitForImageClassification, BeitForMaskedImageModeling])
def test_other_checkpoints_leave_the_pyramid_fresh(config, kind, caplog):
    source = kind(config())
    overrides = {"dynamic_img_size": True, **PER_BLOCK}
    model = from_pretrained(dict(source.state_dict()), BeitFeaturePyramid, **overrides)
    assert torch.equal(model.blocks[5].attn.qkv.weight, source.blocks[5].attn.qkv.weight)
    assert "fresh: fpn1.* (9 tensors)" in caplog.text
    assert model(torch.randn(1, 3, 96, 96))[2].shape == (1, 32, 6, 6)


def test_a_classifier_leaves_a_pyramid_out(config):
    report = load_pretrained(
        BeitForImageClassification(config()), dict(BeitFeaturePyramid(config()).state_dict())
    )
    assert set(report.left_out) == UNILM


def test_synchronised_batch_norm_keeps_the_names(config):
    model = BeitFeaturePyramid(config())
    names = list(model.state_dict())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.fpn1[1], nn.SyncBatchNorm)
    assert list(model.state_dict()) == names


def test_what_makes_no_pyramid_is_refused(config):
    with pytest.raises(ValueError, match="pass 4 blocks, from 0 to 5"):
        BeitFeaturePyramid(config(), taps=(3, 5, 7, 11))
    with pytest.raises(ValueError, match="pass 4 different ones"):
        BeitFeaturePyramid(config(), names=["p2", "p2", "p4", "p5"])
    with pytest.raises(ValueError, match="a pyramid needs its taps"):
        BeitFeaturePyramid(config()).prune_intermediate_layers(2)
