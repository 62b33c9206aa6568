"""Models whose queries and values have no bias: everywhere that others are."""

import copy
import json
import logging

import pytest
import torch

from beit_fast.acceleration.patching import accelerate
from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig
from beit_fast.model.fp8 import use_fp8
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.weights.pretrained import convert, from_pretrained, load_pretrained, save_pretrained
from beit_fast.weights.read import read_checkpoint

PER_BLOCK = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}


@pytest.fixture
def unbiased(tiny, randomize):
    return randomize(BeitForImageClassification(tiny(**PER_BLOCK, qkv_bias=False))).eval()


def without_biases(model):
    """What a model with biases that are zero comes to without them."""
    config = model.config
    fields = {**vars(config), "qkv_bias": False}
    other = type(model)(BeitConfig(**fields)).train(model.training)
    state = {n: t for n, t in model.state_dict().items() if not n.endswith(("q_bias", "v_bias"))}
    other.load_state_dict(state)
    return other


def results(model, images):
    model.zero_grad()
    out = model(images)
    out.square().mean().backward()
    return {"out": out, **{n: p.grad.clone() for n, p in model.named_parameters()}}


def test_it_is_timms_without_qkv_bias(unbiased, gradients, assert_agree):
    from timm.models.beit import Beit as TimmBeit

    c = unbiased.config
    same = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "init_values")
    fields = {
        name: getattr(c, name)
        for name in (*same, *PER_BLOCK, "num_classes", "qkv_bias", "use_abs_pos_emb")
    }
    theirs = TimmBeit(**fields).eval()
    theirs.load_state_dict(unbiased.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert not any("q_bias" in name or "v_bias" in name for name in unbiased.state_dict())
    expected = results(theirs, images)
    assert_agree(results(unbiased, images), expected)
    accelerate(theirs)
    assert_agree(results(theirs, images), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"skip_unread_rows": True},
        {"dynamic_img_size": True},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_it_is_a_model_whose_biases_are_zero_in_every_mode(tiny, randomize, assert_agree, fields):
    model = randomize(BeitForMaskedImageModeling(tiny(**fields)))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_bias.zero_()
            block.attn.v_bias.zero_()
    other = without_biases(model)
    mask = torch.arange(16)[None].expand(2, -1) % 3 == 0
    index = mask.flatten().nonzero().flatten()
    batch = (torch.randn(2, 3, 32, 32), mask, index, torch.randint(24, (2, 16)))
    found = []
    for m in (other, model):
        loss, _ = m.loss(*batch)
        loss.backward()
        found.append({"loss": loss, **{n: p.grad for n, p in m.named_parameters()}})
    biases = {n for n in found[1] if n.endswith(("q_bias", "v_bias"))}
    assert found[1].keys() - found[0].keys() == biases
    assert_agree(found[0], {n: t for n, t in found[1].items() if n not in biases})


def test_it_compiles_in_one_graph_under_autocast_and_with_a_hook(unbiased, assert_agree):
    images = torch.randn(2, 3, 32, 32)
    expected = unbiased(images)
    compiled = torch.compile(unbiased, fullgraph=True, backend="aot_eager")
    assert_agree(compiled(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        error = (unbiased(images) - expected).norm() / expected.norm()
    assert error < 0.05
    unbiased.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)  # called as a layer
    assert_agree(unbiased(images), expected)


def test_fp8_takes_it(tiny):
    pytest.importorskip("torchao")
    model = Beit(tiny(qkv_bias=False))
    plain = copy.deepcopy(model)
    use_fp8(model, torch.device("cpu"))
    images = torch.randn(2, 3, 32, 32)
    assert (model(images) - plain(images)).norm() / plain(images).norm() < 0.1


def test_a_new_one_starts_as_others_do(tiny):
    torch.manual_seed(0)
    model = Beit(tiny(qkv_bias=False))
    with torch.device("meta"):
        other = Beit(tiny(qkv_bias=False))
    torch.manual_seed(0)
    other.to_empty(device="cpu").init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(other.state_dict()[name]).all(), name
        assert tensor.shape == other.state_dict()[name].shape


@pytest.mark.parametrize(
    ("to", "name"),
    [("unilm", "a.pth"), ("unilm", "a.safetensors"), ("timm", "a.pth"), ("hf", "folder")],
)
def test_every_layout_holds_it_and_gives_it_back(to, name, unbiased, tmp_path):
    convert(unbiased.state_dict(), tmp_path / name, to=to)
    weights = read_checkpoint(tmp_path / name)
    assert not weights.config.qkv_bias
    assert weights.state.keys() == unbiased.state_dict().keys()
    for key, tensor in unbiased.state_dict().items():
        assert weights.state[key].equal(tensor), key
    assert not from_pretrained(tmp_path / name).config.qkv_bias


def test_a_folders_file_alone_has_none_either(unbiased, tmp_path):
    file = save_pretrained(unbiased, tmp_path) / "model.safetensors"
    assert from_pretrained(file).config == unbiased.config
    convert(file, tmp_path / "again.pth", to="unilm")
    assert read_checkpoint(tmp_path / "again.pth").state.keys() == unbiased.state_dict().keys()


def test_transformers_reads_zeros_and_trained_ones_come_back(unbiased, tmp_path, assert_agree):
    from transformers import BeitForImageClassification as Theirs

    save_pretrained(unbiased, tmp_path / "ours")
    assert not from_pretrained(tmp_path / "ours").config.qkv_bias
    theirs, info = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(2, 3, 32, 32)
    assert_agree(unbiased(images), theirs.eval()(images).logits)
    theirs.save_pretrained(tmp_path / "untouched")
    assert not from_pretrained(tmp_path / "untouched").config.qkv_bias
    with torch.no_grad():
        theirs.beit.layers[0].attention.q_proj.bias.fill_(1)
    theirs.save_pretrained(tmp_path / "trained")
    again = from_pretrained(tmp_path / "trained")
    assert again.config.qkv_bias
    assert_agree(again(images), theirs(images).logits)
    accelerate(theirs)
    assert_agree(again(images), theirs(images).logits)


def test_a_checkpoint_of_the_other_kind_is_refused_by_name(unbiased, tiny):
    biased = BeitForImageClassification(tiny(**PER_BLOCK))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q_bias has no place"):
        load_pretrained(unbiased, biased.state_dict())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q_bias is missing"):
        load_pretrained(biased, unbiased.state_dict())
    partly = {n: t for n, t in biased.state_dict().items() if n != "blocks.1.attn.v_bias"}
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.v_bias is missing"):
        read_checkpoint(partly)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"img_size": (32, 48)}, "reads the table of relative positions transposed"),
        (
            {"img_size": (32, 48), "use_abs_pos_emb": True, "use_shared_rel_pos_bias": False},
            "takes positions for those of a square",
        ),
        ({"patch_size": (8, 4)}, "takes no patches of (8, 4) px"),
        ({}, None),
        ({"img_size": (32, 48), "use_shared_rel_pos_bias": False}, None),
    ],
    ids=["table", "pos-embed", "patch", "square", "no-positions"],
)
def test_what_transformers_makes_another_model_of_is_said(
    config, said, tiny, randomize, tmp_path, caplog
):
    from transformers import BeitModel

    ours = randomize(Beit(tiny(**config))).eval()
    with caplog.at_level(logging.WARNING, logger="beit_fast.model"):
        save_pretrained(ours, tmp_path)
    assert (said or "") in caplog.text
    assert bool(caplog.text) == (said is not None)
    images = torch.randn(1, 3, *ours.config.image_pixels)
    try:  # the warning is true of the transformers that is installed
        theirs = BeitModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
        same = torch.allclose(theirs(images).last_hidden_state, ours(images), rtol=1e-3, atol=1e-3)
    except (RuntimeError, TypeError):
        same = False
    assert same == (said is None)
    again = from_pretrained(tmp_path)
    torch.testing.assert_close(again(images), ours(images))
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 32
