"""Accelerated models against the same models as their libraries run them."""

import copy

import pytest
import timm
import torch
import transformers
from torch import nn

from accelerated import FAMILIES, TABLE, assert_within, either, every_model, results, run
from beit_fast import accelerate
from beit_fast.kernels.attention.backends import use_backend


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


@either
def test_checkpointing_changes_no_gradient(pair, assert_agree, kind):
    model, accelerated = pair(kind, drop_path_rate=0.5, use_shared_rel_pos_bias=True)
    images = torch.randn(16, 3, 32, 32)
    expected = results(accelerated.train(), images)
    for m in (model.train(), accelerated):
        if kind == "timm":
            m.set_grad_checkpointing()
        elif hasattr(m, "activation_checkpointing_enable"):  # its new name
            m.activation_checkpointing_enable()
        else:
            m.gradient_checkpointing_enable()
    calls = []
    first = accelerated.blocks[0] if kind == "timm" else accelerated.beit.layers[0]
    first.mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    ours = results(accelerated, images)
    assert len(calls) == 2
    assert_agree(ours, expected)
    assert_agree(ours, results(model, images))


@either
def test_an_accelerated_model_compiles_in_one_graph(pair, assert_agree, kind):
    _, accelerated = pair(kind)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    assert_agree(
        {n.removeprefix("_orig_mod."): t for n, t in results(compiled.train(), images).items()},
        results(accelerated, images),
    )


def test_ddp_trains_an_accelerated_model(pair, assert_agree, tmp_path):
    import torch.distributed as dist

    model, accelerated = pair("timm")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(accelerated)
        images = torch.randn(2, 3, 32, 32)
        ours = {n.removeprefix("module."): t for n, t in results(wrapped, images).items()}
        assert_agree(ours, results(model, images))
    finally:
        dist.destroy_process_group()


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
