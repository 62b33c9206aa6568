"""Outputs, gradients and draws of accelerated models are those of their libraries' own."""

import copy

import pytest
import timm
import torch
import transformers

from accelerated import TABLE, assert_within, either, every_model, results, run
from beit_fast import accelerate
from beit_fast.kernels.attention.backends import use_backend
from tiny_models import PER_BLOCK, VANILLA

FAMILIES = {
    "shared": {},
    "per-block": PER_BLOCK,
    "shared-and-per-block": {"use_rel_pos_bias": True},
    "vanilla": VANILLA,
    "token-pooling": {"use_rel_pos_bias": True, "global_pool": "token"},
    "no-bias": {"use_shared_rel_pos_bias": False},
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@every_model
def test_outputs_and_all_gradients_are_the_librarys(pair, assert_agree, kind, family):
    model, accelerated = pair(kind, **family)
    images = torch.randn(3, 3, 32, 32)
    options = {}
    if kind == "transformers-mim":
        options["bool_masked_pos"] = torch.rand(3, 16) < 0.4
    for training in (False, True):
        theirs, ours = (results(m.train(training), images, **options) for m in (model, accelerated))
        assert_agree(ours, theirs)
        with torch.no_grad():
            outputs = [run(m, images, **options) for m in (accelerated, model)]
        assert_agree(*outputs)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@either
def test_bf16_is_as_exact_as_the_library(pair, kind, family):
    model, accelerated = pair(kind, **family)
    images = torch.randn(3, 3, 32, 32).bfloat16()
    model.bfloat16()
    exact = results(copy.deepcopy(model).double(), images.double())
    assert_within(results(accelerated.bfloat16(), images), results(model, images), exact)


@either
def test_autocast_is_as_exact_as_the_library(pair, kind):
    model, accelerated = pair(kind)
    images = torch.randn(3, 3, 32, 32)
    exact = results(copy.deepcopy(model).double(), images.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = results(model, images), results(accelerated, images)
    assert [t.dtype for t in ours.values()] == [t.dtype for t in theirs.values()]
    assert_within(ours, theirs, exact)


@either
def test_the_triton_kernels_take_an_accelerated_model(pair, kind, device):
    model, accelerated = (m.to(device) for m in pair(kind, num_heads=2, img_size=16, depth=1))
    images = torch.randn(2, 3, 16, 16, device=device)
    exact = results(copy.deepcopy(model).double(), images.double())
    with use_backend("triton"):
        ours = results(accelerated, images)
    for name, want in exact.items():
        assert (ours[name] - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@either
def test_a_gpu_is_as_exact_as_the_library_there(pair, kind, dtype):
    model, accelerated = (
        m.to("cuda", dtype) for m in pair(kind, embed_dim=128, num_heads=2, drop_path_rate=0.1)
    )
    images = torch.randn(3, 3, 32, 32, device="cuda", dtype=dtype)
    exact = results(copy.deepcopy(model).double(), images.double())
    assert_within(results(accelerated, images), results(model, images), exact)
    model.train(), accelerated.train()
    results(accelerated, images)  # draws on the device
    with torch.no_grad():
        assert run(accelerated.eval(), images).isfinite().all()


@either
def test_frozen_and_partly_frozen_models_get_the_same_gradients(pair, assert_agree, kind):
    for trained in (("head", "classifier"), ("head", "classifier", "1."), (TABLE,)):
        model, accelerated = pair(kind)
        for m in (model, accelerated):
            for name, parameter in m.named_parameters():
                parameter.requires_grad_(any(part in name for part in trained))
        images = torch.randn(2, 3, 32, 32)
        theirs, ours = (results(m.train(), images) for m in (model, accelerated))
        assert 1 < len(ours) < 40
        assert_agree(ours, theirs)


@either
def test_training_draws_what_the_library_draws(pair, assert_agree, kind):
    model, accelerated = pair(kind, drop_path_rate=0.5, hidden_dropout=0.1)
    if kind == "timm":
        for m in (model, accelerated):
            for block in m.blocks:
                block.attn.proj_drop.p = 0.1
    images = torch.randn(8, 3, 32, 32)
    theirs, ours = (results(m.train(), images) for m in (model, accelerated))
    assert_agree(ours, theirs)
    assert not torch.allclose(ours["out"], results(accelerated, images, seed=4)["out"])
    assert_agree(results(accelerated.eval(), images), results(model.eval(), images))


@either
def test_attention_dropout_drops_at_its_rate_and_not_in_eval(pair, assert_agree, kind):
    model, accelerated = pair(kind, init_values=None)
    for module in accelerated.modules():
        if isinstance(module, timm.models.beit.Attention):
            module.attn_drop.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = [run(accelerated.train(), images) for _ in range(2)]
        assert not torch.allclose(*outputs)
        assert_agree(run(accelerated.eval(), images), run(model, images))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's interpolation
def test_set_input_size_keeps_working(pair, assert_agree):
    model, accelerated = pair("timm", use_shared_rel_pos_bias=True)
    with torch.no_grad():
        run(accelerated, torch.randn(2, 3, 32, 32))
    for size in ((48, 48), (32, 64)):
        for m in (model, accelerated):
            m.set_input_size(size)
        images = torch.randn(2, 3, *size)
        assert_agree(results(accelerated, images), results(model, images))
        with torch.no_grad():
            assert_agree(run(accelerated, images), run(model, images))


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (32, 64), (48, 40)])
def test_transformers_interpolates_positions_as_before(pair, assert_agree, size):
    model, accelerated = pair("transformers", use_shared_rel_pos_bias=True, use_abs_pos_emb=True)
    images = torch.randn(2, 3, *size)
    options = {"interpolate_pos_encoding": True}
    assert_agree(results(accelerated, images, **options), results(model, images, **options))
    for _ in range(2):
        with torch.no_grad():
            assert_agree(run(accelerated, images, **options), run(model, images, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["per-block", "no-bias"])
def test_a_mask_does_what_it_did(pair, assert_agree, attention, family):
    fields = FAMILIES[family]
    model, accelerated = (m.beit for m in pair("transformers", attention, **fields))
    images, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 17, dtype=torch.long)
    mask[1, 9:] = 0
    ours, theirs = (m(images, attention_mask=mask) for m in (accelerated, model))
    assert_agree(ours.last_hidden_state, theirs.last_hidden_state)
    assert not torch.allclose(ours.last_hidden_state, accelerated(images).last_hidden_state)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_base_size_agrees(name, assert_agree):
    torch.manual_seed(0)
    if name == "timm":
        model = timm.create_model("beit_base_patch16_224").eval()
    else:
        config = transformers.BeitConfig(use_relative_position_bias=True, drop_path_rate=0.0)
        model = transformers.BeitForImageClassification(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(TABLE) or "classifier" in parameter_name:
                parameter.normal_(std=0.3)
            if parameter_name.startswith("head"):
                parameter.normal_(std=0.02)
    images = torch.randn(1, 3, 224, 224)
    theirs = results(model, images)
    accelerate(model)
    ours = results(model, images)
    assert_agree(ours, theirs)


REGISTERED = [
    n for n in timm.list_models("beit*") if not n.startswith("beit3_")
]  # 3 is a plain ViT


@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_variant_of_timm_agrees(randomize, assert_agree, name):
    """At its own size of images, with few narrow blocks, also with MLPs that none is built with."""
    images = torch.randn(1, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    others = {"swiglu": {"swiglu_mlp": True}, "normed": {"scale_mlp": True}}
    others |= {"no qkv bias": {"qkv_bias": False}}
    for fields in ({}, *(others.values() if name == REGISTERED[0] else ())):
        narrow = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, **fields}
        model = randomize(timm.create_model(name, **narrow)).eval()
        accelerated = copy.deepcopy(model)
        assert accelerate(accelerated).replaced
        for training in (False, True):
            theirs, ours = (results(m.train(training), images) for m in (model, accelerated))
            assert_agree(ours, theirs)


def test_every_registered_variant_is_among_these():
    assert len(REGISTERED) >= 7
    assert any(name.startswith("beitv2_") for name in REGISTERED)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@either
def test_frozen_and_partly_frozen_in_bf16_are_as_exact_as_the_library(pair, kind, training):
    images = torch.randn(2, 3, 32, 32).bfloat16()
    for trained in (("head", "classifier"), ("head", "classifier", "1."), (TABLE,)):
        model, accelerated = (m.bfloat16().train(training) for m in pair(kind))
        for m in (model, accelerated):
            for name, parameter in m.named_parameters():
                parameter.requires_grad_(any(part in name for part in trained))
        exact = results(copy.deepcopy(model).double(), images.double())
        assert 1 < len(exact) < 40
        assert_within(results(accelerated, images), results(model, images), exact)
