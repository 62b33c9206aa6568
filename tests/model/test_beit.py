import pytest
import torch
from timm.optim import param_groups_layer_decay

from beit_fast.model import layers
from beit_fast.model.beit import Beit
from beit_fast.model.config import beit_config
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from tiny_models import PER_BLOCK, VANILLA

FAMILIES = {
    "shared": {},
    "per-block": PER_BLOCK,
    "shared-and-per-block": {"use_rel_pos_bias": True},
    "vanilla": VANILLA,
    "all-positions": {"use_abs_pos_emb": True, "use_rel_pos_bias": True},
}
family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
IMAGES = (3, 3, 32, 32)


def features_and_gradients(model, images, dout):
    out = model.forward_features(images)
    model.zero_grad()
    out.backward(dout)
    return out


@family
@pytest.mark.parametrize("img_size", [32, (32, 64), (16, 8)], ids=["4x4", "4x8", "2x1"])
def test_features_and_all_gradients_are_those_of_timm(
    tiny, randomize, timm_beit, gradients, assert_agree, family, img_size
):
    config = tiny(img_size=img_size, num_classes=0, **family)
    ours = randomize(Beit(config))
    theirs = timm_beit(config)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc_norm.weight", "fc_norm.bias"], [])
    images = torch.randn(2, 3, *config.image_pixels)
    dout = torch.randn(2, config.num_patches + 1, 32)
    assert_agree(
        features_and_gradients(ours, images, dout), features_and_gradients(theirs, images, dout)
    )
    assert_agree(gradients(ours), gradients(theirs))


@family
def test_features_and_all_gradients_are_those_of_transformers(
    tiny, randomize, transformers_config, to_transformers, gradients, assert_agree, family
):
    from transformers import BeitModel

    config = tiny(**family)
    ours = randomize(Beit(config))
    theirs = BeitModel(transformers_config(config), add_pooling_layer=False).eval()

    def renamed(tensors):
        names = to_transformers(tensors)
        return {name.removeprefix("beit."): tensor for name, tensor in names.items()}

    missing, unexpected = theirs.load_state_dict(renamed(ours.state_dict()), strict=False)
    assert (missing, unexpected) == (["embeddings.mask_token"], [])
    images, dout = torch.randn(IMAGES), torch.randn(3, 17, 32)
    out = theirs(images).last_hidden_state
    out.backward(dout)
    assert_agree(features_and_gradients(ours, images, dout), out)
    assert_agree(renamed(gradients(ours)), gradients(theirs))


def test_training_with_drop_path_draws_what_timm_draws(tiny, randomize, timm_beit, assert_agree):
    config = tiny(depth=3, drop_path_rate=0.5)
    ours = randomize(BeitForImageClassification(config)).train()
    theirs = timm_beit(config).train()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(16, *IMAGES[1:])
    outputs = []
    for model in (ours, theirs, ours):
        torch.manual_seed(5)
        outputs.append(model(images))
    assert_agree(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], ours.eval()(images))


def test_drop_path_grows_linearly_from_nothing_to_the_whole_rate(tiny):
    rates = [b.drop_path_rate for b in Beit(tiny(depth=12, drop_path_rate=0.1)).blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert rates[1] == pytest.approx(0.00909, abs=1e-5)
    assert Beit(tiny(depth=1, drop_path_rate=0.1)).blocks[0].drop_path_rate == 0


def test_a_hidden_patch_becomes_the_mask_token_in_its_place(tiny, randomize):
    config = tiny(use_abs_pos_emb=True)
    model = randomize(BeitForMaskedImageModeling(config))
    images, mask = torch.randn(IMAGES), torch.rand(3, 16) < 0.4
    x = model._embed(images, mask)
    plain = model._embed(images, None)
    hidden = model.mask_token[0, 0] + model.pos_embed[0, 1:]
    for b in range(3):
        for patch in range(16):
            expected = hidden[patch] if mask[b, patch] else plain[b, 1 + patch]
            assert torch.equal(x[b, 1 + patch], expected)
    assert torch.equal(x[:, 0], plain[:, 0])


def test_the_pixels_of_hidden_patches_change_nothing(tiny, randomize):
    model = randomize(BeitForMaskedImageModeling(tiny()))
    images, mask = torch.randn(IMAGES), torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 5] = True  # row 1, column 1
    changed = images.clone()
    changed[:, :, 8:16, 8:16] = 9.0
    before, after = (model.forward_features(i, mask) for i in (images, changed))
    assert torch.equal(before, after)
    assert not torch.equal(model.forward_features(images), model.forward_features(changed))


def test_the_shared_bias_is_built_once_per_forward(tiny, monkeypatch):
    built = []
    original = layers.rel_pos_bias
    monkeypatch.setattr(layers, "rel_pos_bias", lambda *a: built.append(a) or original(*a))
    Beit(tiny(depth=5))(torch.randn(IMAGES))
    assert len(built) == 1


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
@family
def test_checkpointing_changes_no_gradient(tiny, randomize, gradients, family, drop_path_rate):
    model = randomize(Beit(tiny(drop_path_rate=drop_path_rate, **family)))
    images = torch.randn(IMAGES)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        out = model(images)
        out.square().sum().backward()
        results.append({"out": out, **gradients(model)})
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_checkpointing_runs_each_block_twice(tiny, monkeypatch):
    model = Beit(tiny())
    calls = []
    original = layers.Mlp.forward
    monkeypatch.setattr(layers.Mlp, "forward", lambda *a: calls.append(1) or original(*a))
    model.set_grad_checkpointing()
    model(torch.randn(IMAGES)).sum().backward()
    assert len(calls) == 2 * 2


@pytest.mark.parametrize(
    "family", [FAMILIES["shared-and-per-block"], FAMILIES["vanilla"]], ids=["BEiT+", "vanilla"]
)
def test_training_compiles_in_one_graph(tiny, randomize, gradients, assert_agree, family):
    model = randomize(BeitForMaskedImageModeling(tiny(**family)))
    images, mask = torch.randn(IMAGES), torch.rand(3, 16) < 0.4
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model.forward_features, compiled):
        model.zero_grad()
        out = function(images, mask)
        out.square().mean().backward()
        results.append({"out": out, **gradients(model)})
    assert_agree(*results)


@family
def test_autocast_keeps_the_residual_stream_in_fp32(tiny, randomize, family):
    model = randomize(BeitForMaskedImageModeling(tiny(**family)))
    images, mask = torch.randn(IMAGES), torch.rand(3, 16) < 0.4
    with torch.autocast("cpu", torch.bfloat16):
        out, unmasked = model.forward_features(images, mask), model.forward_features(images)
        loss = out.square().mean()
    assert out.dtype == unmasked.dtype == torch.float32
    loss.backward()
    expected = model.forward_features(images, mask)
    assert (out - expected).norm() / expected.norm() < 0.03
    for name, parameter in model.named_parameters():
        assert not name.startswith("blocks") or parameter.grad.isfinite().all()


def test_a_state_dict_with_index_matrices_loads_strictly(tiny, randomize):
    config = tiny(use_rel_pos_bias=True)
    model = randomize(BeitForMaskedImageModeling(config))
    state = model.state_dict()
    assert not [name for name in state if "index" in name]
    stored = {**state, "rel_pos_bias.relative_position_index": torch.zeros(17, 17)}
    stored["blocks.1.attn.relative_position_index"] = torch.zeros(17, 17)
    other = BeitForMaskedImageModeling(config)
    other.load_state_dict(stored, strict=True)
    assert "rel_pos_bias.relative_position_index" in stored  # the caller's dict is the caller's
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "other": torch.zeros(1)}, strict=True)


def test_only_positions_and_cls_are_exempt_from_weight_decay_by_name(tiny):
    assert Beit(tiny()).no_weight_decay() == {"pos_embed", "cls_token"}


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beit_base_patch16_224_vanilla"])
def test_layers_are_grouped_as_timm_groups_them(timm_beit, name):
    from timm.models._manipulate import group_parameters

    with torch.device("meta"):
        ours = BeitForImageClassification(beit_config(name))
        theirs = timm_beit(beit_config(name))
    groups, expected = (
        group_parameters(m, m.group_matcher(coarse=False), reverse=True) for m in (ours, theirs)
    )
    assert groups == expected
    assert groups["patch_embed.proj.weight"] == groups["cls_token"] == 0
    assert groups["blocks.3.mlp.fc1.weight"] == 4


@pytest.mark.parametrize(
    ("name", "decay", "embeddings"),
    [
        ("beit_base_patch16_224", 0.65, 0.00370),
        ("beit_large_patch16_224", 0.75, 0.000753),
        ("beit_base_patch16_224", 0.85, 0.1209),
        ("beit_large_patch16_224", 0.9, 0.0718),
    ],
)
def test_layer_wise_decay_has_the_published_scales(name, decay, embeddings):
    with torch.device("meta"):
        model = BeitForImageClassification(beit_config(name))
    groups = param_groups_layer_decay(
        model, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay
    )
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    depth = model.config.depth
    assert scales[id(model.cls_token)] == pytest.approx(embeddings, rel=2e-3)
    assert scales[id(model.patch_embed.proj.weight)] == scales[id(model.cls_token)]
    assert scales[id(model.blocks[0].attn.qkv.weight)] == pytest.approx(decay**depth)
    assert scales[id(model.blocks[-1].mlp.fc2.weight)] == pytest.approx(decay)
    assert scales[id(model.head.weight)] == 1


def test_the_mask_token_is_grouped_with_the_stem(tiny):
    from timm.models._manipulate import group_parameters

    model = BeitForMaskedImageModeling(tiny())
    assert group_parameters(model, model.group_matcher(), reverse=True)["mask_token"] == 0


def test_masks_that_do_not_fit_are_refused_by_name(tiny):
    images = torch.zeros(IMAGES)
    model = BeitForMaskedImageModeling(tiny())
    for mask in (torch.zeros(3, 16), torch.zeros(3, 4, 4).bool(), torch.zeros(3, 17).bool()):
        with pytest.raises(ValueError, match=r"pass bool \(3, 16\), True where"):
            model.forward_features(images, mask)
    with pytest.raises(ValueError, match="no mask token: pass no mask, or use"):
        Beit(tiny()).forward_features(images, torch.zeros(3, 16).bool())


def test_no_images_give_no_tokens(tiny):
    assert Beit(tiny())(torch.zeros(0, 3, 32, 32)).shape == (0, 17, 32)
