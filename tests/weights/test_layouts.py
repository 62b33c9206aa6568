"""The table of names: every tensor of timm's and transformers' models, there and back."""

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.weights.layouts import from_house, to_house
from tiny_models import PER_BLOCK, VANILLA, assert_identical

CASES = [
    pytest.param(BeitForMaskedImageModeling, {}, id="mim-plus"),
    pytest.param(BeitForMaskedImageModeling, VANILLA, id="mim-vanilla"),
    pytest.param(BeitForImageClassification, PER_BLOCK, id="classifier-plus"),
    pytest.param(BeitForImageClassification, VANILLA, id="classifier-vanilla"),
    pytest.param(
        BeitForImageClassification, {"global_pool": "token", "use_rel_pos_bias": True}, id="token"
    ),
    pytest.param(Beit, {}, id="encoder"),
]


@pytest.mark.parametrize("layout", ["house", "hf4", "hf5"])
@pytest.mark.parametrize(("kind", "overrides"), CASES)
def test_there_and_back_is_the_identity(layout, kind, overrides, tiny, randomize):
    state = randomize(kind(tiny(**overrides))).to(torch.bfloat16).state_dict()
    back, dropped = to_house(from_house(state, layout))
    assert_identical(back, state)
    assert dropped == ()


@pytest.mark.parametrize(("kind", "overrides"), CASES[:4])
def test_names_are_those_of_version_5_modules(
    kind, overrides, tiny, randomize, transformers_config
):
    import transformers

    config = tiny(**overrides)
    theirs = getattr(transformers, kind.__name__)(transformers_config(config))
    theirs.load_state_dict(from_house(randomize(kind(config)).state_dict(), "hf5"), strict=False)
    ours = from_house(to_house(theirs.state_dict())[0], "hf5")
    assert_identical(ours, theirs.state_dict())


def test_segmentation_names_are_those_of_version_5_modules(tiny, transformers_config):
    from transformers import BeitForSemanticSegmentation

    config = transformers_config(tiny(depth=4, use_rel_pos_bias=True))
    config.out_indices = [0, 1, 2, 3]
    theirs = BeitForSemanticSegmentation(config).state_dict()
    house, _ = to_house(theirs)
    assert {"fpn1.0.weight", "decode_head.psp_modules.3.1.bn.running_var"} < house.keys()
    assert {"decode_head.conv_seg.bias", "auxiliary_head.convs.0.conv.weight"} < house.keys()
    assert_identical(from_house(house, "hf5"), theirs)
    assert_identical(to_house(from_house(house, "hf4"))[0], house)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "backbone."])
def test_prefixes_of_wrappers_go(prefix, tiny):
    state = Beit(tiny()).state_dict()
    assert_identical(to_house({prefix + name: t for name, t in state.items()})[0], state)


def test_index_buffers_are_dropped_by_name(tiny):
    state = Beit(tiny()).state_dict()
    index = {"blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    house, dropped = to_house(state | index)
    assert_identical(house, state)
    assert dropped == ("blocks.0.attn.relative_position_index",)


def hf4(tiny):
    return from_house(Beit(tiny()).state_dict(), "hf4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"blocks.0.attn.__class__": torch.ones(1)}, "blocks.0.attn.__class__"),
        (lambda s: s | {"beit.encoder.layer.0.rogue": torch.ones(1)}, "names that no BEiT has"),
        (
            lambda s: {n: t for n, t in s.items() if "0.attention.attention.key" not in n},
            "weight of k is missing",
        ),
        (
            lambda s: s | {"beit.encoder.layer.1.attention.attention.key.weight": torch.ones(3, 3)},
            "matrices of one shape",
        ),
        (lambda s: {"fc.weight": torch.ones(1)}, "are no BEiT's"),
        (lambda s: {}, "these 0 tensors"),
    ],
)  # fmt: skip
def test_a_foreign_name_is_an_error_that_has_it(change, message, tiny):
    with pytest.raises(ValueError, match=message):
        to_house(change(hf4(tiny)))


def test_two_tensors_for_one_place_are_refused(tiny):
    state = Beit(tiny()).state_dict()
    with pytest.raises(ValueError, match="two tensors for one place"):
        to_house(state | {"backbone.cls_token": state["cls_token"]})


def test_a_name_that_a_layout_lacks_is_an_error(tiny):
    with pytest.raises(ValueError, match="hf4 has no name for cls_pt_layers"):
        from_house(Beit(tiny()).state_dict() | {"cls_pt_layers.0.x": torch.ones(1)}, "hf4")
