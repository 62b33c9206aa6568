"""The models that timm makes after `import beit_fast.timm` are timm's, but for their speed."""

import copy
import pickle
from collections import Counter

import pytest
import timm
import torch
from timm.models.beit import Beit as TimmBeit
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

import beit_fast.timm
from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.timm import CONFIGS, LEAVES, BeitForTimm
from beit_fast.weights.pretrained import load_pretrained
from beit_fast.weights.read import read_checkpoint

NARROW = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
TEST = "beit_fast_test_patch16_160"


def flags(config):
    """What timm's Beit takes for the same model."""
    names = (
        *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values"),
        *("num_classes", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"),
        "qkv_bias",
    )
    return {name: getattr(config, name) for name in names}


def pair(name, **options):
    """A registered model and timm's own with the same weights, none of them special."""
    ours = timm.create_model(name, **options)
    theirs = TimmBeit(**flags(ours.config), global_pool=ours.config.global_pool)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images_for(model, batch=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, *model.config.image_pixels, generator=generator)


def results(model, images):
    """Logits, and the gradients of all that is trained."""
    logits = model(images)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((logits * weights).sum(), list(trained.values()))
    return {"logits": logits.detach()} | dict(zip(trained, gradients, strict=True))


def assert_agree(ours, theirs, images):
    expected = results(theirs, images)
    found = results(ours, images)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_computes_and_learns_as_timms(name):
    ours, theirs = pair(name, **NARROW)
    assert_agree(ours, theirs, images_for(ours, batch=1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", ["nothing", "tables", "all-but-the-head"])
@pytest.mark.parametrize("suffix", ["", "_vanilla"])
def test_frozen_or_not_and_in_both_modes(suffix, frozen, training):
    models = pair(TEST + suffix, **NARROW)
    for model in models:
        model.train(training)
        for name, parameter in model.named_parameters():
            if frozen == "tables":
                parameter.requires_grad_("table" not in name and "pos_embed" not in name)
            elif frozen == "all-but-the-head":
                parameter.requires_grad_(name.startswith("head."))
    assert_agree(*models, images_for(models[0]))


def test_without_qkv_bias_it_is_timms_too():
    ours, theirs = pair(TEST, **NARROW, qkv_bias=False)
    assert_agree(ours, theirs, images_for(ours))


def test_the_base_size_agrees():
    ours, theirs = pair("beit_fast_base_patch16_224")
    assert_agree(ours, theirs, images_for(ours, batch=1))


@pytest.mark.parametrize("suffix", ["", "_vanilla"])
def test_in_bf16_the_error_is_at_most_twice_timms(suffix):
    ours, theirs = pair(TEST + suffix, **NARROW)
    images = images_for(ours).bfloat16()
    exact = results(copy.deepcopy(theirs).bfloat16().double(), images.double())
    found, eager = (results(model.bfloat16(), images) for model in (ours, theirs))
    for name, value in exact.items():
        allowed = 2 * (eager[name].double() - value).norm() + 2**-8 * value.norm()
        assert (found[name].double() - value).norm() <= allowed, name


INTERMEDIATES = [
    {},
    {"indices": 2},
    {"indices": [0, -1], "norm": True},
    {"indices": [2, 0], "output_fmt": "NLC"},
    {"indices": [1], "stop_early": True},
    {"indices": 3, "return_prefix_tokens": True},
    {"indices": [-2], "intermediates_only": True},
]


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("options", INTERMEDIATES, ids=str)
def test_intermediates_are_timms(options, pool):
    ours, theirs = pair(TEST, global_pool=pool, embed_dim=32, num_heads=2, depth=4)
    images = images_for(ours, batch=1)
    torch.testing.assert_close(
        ours.eval().forward_intermediates(images, **options),
        theirs.eval().forward_intermediates(images, **options),
    )
    ours.set_grad_checkpointing()
    ours.forward_intermediates(images)[0].sum().backward()


def test_intermediate_layers_have_dinos_interface():
    model = timm.create_model(TEST, **NARROW).eval()
    images = images_for(model, batch=1)
    (maps,) = model.get_intermediate_layers(images, [1], reshape=True)
    ((tokens, cls),) = model.get_intermediate_layers(images, 1, return_prefix_tokens=True)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), tokens)
    torch.testing.assert_close(torch.cat((cls, tokens), dim=1), model.forward_features(images))


def test_the_encoder_alone_has_intermediates_too():
    model = Beit(BeitConfig(img_size=(32, 48), embed_dim=32, depth=3, num_heads=2)).eval()
    images = torch.randn(2, 3, 32, 48)
    out, maps = model.forward_intermediates(images, [0, 2])
    assert [tuple(m.shape) for m in maps] == [(2, 32, 2, 3)] * 2
    torch.testing.assert_close(out, model(images))
    patches = model.patch_embed.patches(images)
    torch.testing.assert_close(model.forward_intermediates(patches, [0, 2])[1], maps)


@pytest.mark.parametrize("indices", [0, 7, [], [6], [-7]])
def test_blocks_that_are_not_there_are_refused(indices):
    with pytest.raises(ValueError, match="this model has 6 blocks"):
        timm.create_model(TEST).forward_intermediates(torch.randn(1, 3, 160, 160), indices)


def test_a_feature_extractor_of_timm_has_no_block_too_many():
    model = timm.create_model(TEST, features_only=True, out_indices=(1, 3))
    maps = model(torch.randn(1, 3, 160, 160))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 10, 10)] * 2
    assert model.feature_info.channels() == [64, 64]
    assert model.feature_info.reduction() == [16, 16]
    assert len(model.model.blocks) == 4
    assert isinstance(model.model.head, nn.Identity)


def test_create_model_takes_what_timms_takes():
    options = {"img_size": (96, 64), "in_chans": 1, "num_classes": 7, "global_pool": "token"}
    model = timm.create_model(TEST, **options, drop_rate=0.1, drop_path_rate=0.2)
    assert model(torch.randn(2, 1, 96, 64)).shape == (2, 7)
    assert (model.in_chans, model.num_classes, model.global_pool) == (1, 7, "token")
    assert (model.head_drop.p, model.config.drop_path_rate) == (0.1, 0.2)
    assert model.num_features == model.head_hidden_size == model.embed_dim == 64
    assert model.default_cfg["input_size"] == (3, 160, 160)
    assert timm.create_model(TEST, global_pool="", num_classes=0)(
        torch.randn(1, 3, 160, 160)
    ).shape == (1, 101, 64)
    assert timm.create_model(TEST, dtype=torch.bfloat16, device="meta").cls_token.is_meta


def test_what_a_model_cannot_do_is_refused_and_not_swallowed():
    with pytest.raises(ValueError, match=r"attn_drop_rate is 0\.1.*beit_fast\.accelerate"):
        timm.create_model(TEST, attn_drop_rate=0.1)
    with pytest.raises(TypeError, match="takes no patch_drop_rate"):
        timm.create_model(TEST, patch_drop_rate=0.1)
    with pytest.raises(ValueError, match="no fold_layer_scale any more: leave it out"):
        timm.create_model(TEST, fold_layer_scale=True)
    timm.create_model(TEST, attn_drop_rate=0.0, fold_layer_scale=False)
    with pytest.raises(ValueError, match="patch_size 8: these weights"):
        timm.create_model(TEST).set_input_size(patch_size=8)


def test_a_classifier_can_be_replaced():
    model = timm.create_model(TEST, dtype=torch.bfloat16).eval()
    images = torch.randn(1, 3, 160, 160, dtype=torch.bfloat16)
    before = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert not model.get_classifier().training
    assert (model(images).shape, model.num_classes) == ((1, 3), 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), before)
    model.reset_classifier(0, "")
    assert model(images).shape == (1, 101, 64)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        model.reset_classifier(0, "max")


@pytest.mark.parametrize("suffix", ["", "_vanilla"])
def test_another_input_size_is_that_of_a_checkpoint_loaded_for_it(suffix):
    model, _ = pair(TEST + suffix, **NARROW)
    model.requires_grad_(False)
    other = timm.create_model(TEST + suffix, **NARROW, img_size=(96, 192)).eval()
    load_pretrained(other, read_checkpoint(model.state_dict(), num_heads=2))
    model.eval().set_input_size((96, 192))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = torch.randn(1, 3, 96, 192)
    assert torch.equal(model(images), other(images))
    assert model.state_dict().keys() == other.state_dict().keys()


def test_pretrained_weights_are_fitted_to_the_model(tmp_path):
    source, _ = pair(TEST, **NARROW)
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    overlay = {"file": str(path), "num_classes": 5}
    options = {**NARROW, "pretrained": True, "pretrained_cfg_overlay": overlay}
    same = timm.create_model(TEST, **options)
    for name, value in source.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name
    other = timm.create_model(TEST, **options | {"img_size": 224, "in_chans": 1, "num_classes": 2})
    wanted = BeitForImageClassification(other.config)
    fitted = {n: t for n, t in source.state_dict().items() if not n.startswith("patch_embed")}
    fitted["patch_embed.proj.weight"] = other.patch_embed.proj.weight
    fitted["patch_embed.proj.bias"] = other.patch_embed.proj.bias
    load_pretrained(wanted, fitted)
    name = "blocks.1.attn.relative_position_bias_table"
    assert torch.equal(other.get_parameter(name), wanted.get_parameter(name))
    assert other.head.out_features == 2


# 14 x 18: no square grid has as many rows. 5 x 13 and 4 x 9: one has (of the table, of pos_embed).
OBLONG = [(224, 288), (80, 208), (64, 144), (144, 64)]


@pytest.mark.parametrize("size", OBLONG, ids=str)
@pytest.mark.parametrize("suffix", ["", "_vanilla"])
def test_a_model_of_any_grid_comes_back_from_the_folder_it_was_saved_in(suffix, size, tmp_path):
    model, _ = pair(TEST + suffix, **NARROW, img_size=size)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    options = {**NARROW, "img_size": size, "pretrained": True, "pretrained_cfg_overlay": overlay}
    again = timm.create_model(TEST + suffix, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("suffix", ["", "_vanilla"])
def test_a_saved_model_of_any_grid_is_resized_to_another(suffix, tmp_path):
    model, _ = pair(TEST + suffix, **NARROW, img_size=(80, 208))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(96, 96))
    model.set_input_size((96, 96))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_positions_of_a_grid_that_nothing_tells_are_refused(tmp_path):
    model, _ = pair(TEST, **NARROW, img_size=(224, 288))
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 5}
    options = {**NARROW, "pretrained": True, "img_size": 96}
    with pytest.raises(ValueError, match=r"grid, 6x6.*pretrained_cfg_overlay"):
        timm.create_model(TEST, **options, pretrained_cfg_overlay=overlay)
    overlay["input_size"] = (3, 224, 288)  # what the error says
    other = timm.create_model(TEST, **options, pretrained_cfg_overlay=overlay)
    model.set_input_size(96)
    name = "blocks.1.attn.relative_position_bias_table"
    assert torch.equal(other.get_parameter(name), model.get_parameter(name))


def test_another_pooling_is_refused_as_timm_refuses_it_and_as_we_do():
    model = timm.create_model(TEST)
    for kind in (AssertionError, ValueError):
        with pytest.raises(kind, match="global_pool is 'catavgmax'"):
            timm.create_model(TEST, global_pool="catavgmax")
        with pytest.raises(kind, match="global_pool is 'catavgmax'"):
            model.reset_classifier(7, "catavgmax")
    assert model.num_classes == 1000


def test_timms_tests_by_module_take_the_models():
    assert set(CONFIGS) <= set(timm.list_models(module="beit"))


def test_published_weights_are_those_of_timm():
    for name in timm.list_pretrained("beit_fast_*"):
        ours, theirs = (timm.get_pretrained_cfg(n) for n in (name, name.replace("_fast", "", 1)))
        for field in ("hf_hub_id", "num_classes", "input_size", "crop_pct", "mean", "std"):
            if field == "hf_hub_id":
                assert ours.hf_hub_id == f"timm/{name.replace('_fast', '', 1)}"
            else:
                assert getattr(ours, field) == getattr(theirs, field), (name, field)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(TEST, pretrained=True)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and still asked for
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_script_and_a_graph_compute_the_same(qkv_bias):
    model = timm.create_model(TEST, **NARROW, qkv_bias=qkv_bias).eval()
    images = images_for(model)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), model(images))
    scripted(images).sum().backward()  # the parameters are the model's own
    assert all(parameter.grad is not None for parameter in model.parameters())
    names = {"blocks.1": "taps", "head": "logits"}
    options = {"tracer_kwargs": {"leaf_modules": LEAVES}}
    for nodes in (
        timm.models.create_feature_extractor(model, names),
        torchvision_extractor(model, names, **options),
    ):
        found = nodes(images)
        torch.testing.assert_close(found["logits"], model(images))
        torch.testing.assert_close(found["taps"], model.forward_features(images))


def test_models_copy_pickle_and_start_on_the_meta_device():
    model = timm.create_model(TEST, **NARROW).eval()
    images = images_for(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, BeitForTimm)
        assert torch.equal(other(images), model(images))
    with torch.device("meta"):
        empty = timm.create_model(TEST, **NARROW)
    empty.to_empty(device="cpu").init_weights()
    assert torch.isfinite(empty(images)).all()


def test_timms_optimiser_gives_each_layer_the_rate_of_timms():
    rates = []
    for model in pair(TEST, **NARROW):
        sizes = Counter()
        for group in param_groups_layer_decay(model, layer_decay=0.65):
            sizes[group["lr_scale"]] += sum(p.numel() for p in group["params"])
        rates.append(sizes)
    assert rates[0] == rates[1]
    assert len(rates[0]) == 4  # stem, two blocks, head


def test_the_names_are_those_of_the_module():
    assert set(timm.list_models("beit_fast_*")) == set(CONFIGS)
    assert all(callable(getattr(beit_fast.timm.beit, name)) for name in CONFIGS)
