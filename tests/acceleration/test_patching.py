"""What is patched and what is left: names, copies, hooks, reports, and the way back."""

import copy
import io
import pickle
import sys

import pytest
import timm
import torch
import transformers
from torch import nn

from accelerated import either, every_model, results, run
from beit_fast import BeitForImageClassification as OurClassifier
from beit_fast import accelerate, restore
from beit_fast.acceleration.patching import Accelerated
from beit_fast.kernels import _triton
from tiny_models import build_timm


@every_model
def test_names_parameters_and_state_stay(pair, kind):
    model, accelerated = pair(kind)
    before = dict(accelerated.named_parameters())
    restore(accelerated)
    assert [type(m) for m in accelerated.modules()] == [type(m) for m in model.modules()]
    assert {k: vars(m).keys() for k, m in accelerated.named_modules()} == {
        k: vars(m).keys() for k, m in model.named_modules()
    }
    report = accelerate(accelerated)
    after = dict(accelerated.named_parameters())
    assert all(before[name] is after[name] for name in before)
    assert before.keys() == after.keys() == dict(model.named_parameters()).keys()
    assert accelerated.state_dict().keys() == model.state_dict().keys()
    assert not report.left
    assert accelerate(accelerated).replaced == report.replaced  # again changes nothing
    pairs = zip(model.modules(), accelerated.modules(), strict=True)
    assert all(isinstance(ours, type(theirs)) for theirs, ours in pairs)
    assert [type(m).__name__ for m in accelerated.modules()] == [
        type(m).__name__ for m in model.modules()
    ]


@either
def test_copies_and_pickles_are_accelerated_and_do_not_carry_the_bias(pair, kind):
    model, accelerated = pair(kind)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = run(accelerated, images)
        buffer = io.BytesIO()
        torch.save(accelerated, buffer)
        buffer.seek(0)
        copies = (
            copy.deepcopy(accelerated),
            pickle.loads(pickle.dumps(accelerated)),
            torch.load(buffer, weights_only=False),
        )
        for other in copies:
            caches = [m._bias_cache for m in other.modules() if isinstance(m, Accelerated)]
            assert caches
            assert all(cache._entry is None for cache in caches)
            assert torch.equal(run(other, images), out)
            restore(other)
            assert not any(isinstance(m, Accelerated) for m in other.modules())
            assert torch.equal(run(other, images), run(model, images))


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


def test_hooks_go_on_seeing_what_they_saw(pair, assert_agree):
    model, accelerated = pair("timm")
    images = torch.randn(2, 3, 32, 32)
    seen = ([], [])
    for m, values in zip((model, accelerated), seen, strict=True):
        block = m.blocks[1]
        for module in (block, block.attn, block.norm1, block.norm2, block.mlp, block.attn.proj):
            module.register_forward_hook(lambda mod, args, out, values=values: values.append(out))
        run(m, images)
    assert len(seen[0]) == 6
    for theirs, ours in zip(*seen, strict=True):
        assert_agree(ours, theirs)


@pytest.fixture
def forget_warnings(monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())


def test_attention_weights_are_transformers_own_and_said_once(pair, assert_agree, forget_warnings):
    model, accelerated = pair("transformers", attention="eager")
    images = torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="attention weights are asked for"):
        ours = accelerated(images, output_attentions=True, output_hidden_states=True)
    ours = accelerated(images, output_attentions=True, output_hidden_states=True)  # silent now
    theirs = model(images, output_attentions=True, output_hidden_states=True)
    assert len(ours.attentions) == 2
    for name in ("attentions", "hidden_states"):
        for one, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert_agree(one, other)
    assert accelerated.beit.layers[0].attention(torch.randn(1, 17, 32))[1] is None  # that call only


def test_a_hook_on_eager_attention_gets_its_weights(pair, forget_warnings):
    _, accelerated = pair("transformers", attention="eager")
    weights = []
    attention = accelerated.beit.layers[0].attention
    attention.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    with pytest.warns(UserWarning, match="attention weights"):
        run(accelerated, torch.randn(2, 3, 32, 32))
    assert weights[0].shape == (2, 4, 17, 17)


def test_timm_weights_hooked_after_the_softmax_are_seen(pair, forget_warnings):
    weights = []
    _, accelerated = pair("timm")
    attn = accelerated.blocks[0].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    with pytest.warns(UserWarning, match="attn_drop"):
        run(accelerated, torch.randn(2, 3, 32, 32))
    assert weights[0].shape == (2, 4, 17, 17)


@pytest.mark.parametrize("name", ["BeitModel", "BeitForSemanticSegmentation", "BeitBackbone"])
def test_every_model_of_transformers_is_taken(
    tiny, randomize, transformers_config, assert_agree, name
):
    config = transformers_config(tiny(depth=4, use_rel_pos_bias=True))
    config.out_indices = [1, 2, 3, 4]
    model = randomize(getattr(transformers, name)(config)).eval()
    accelerated = copy.deepcopy(model)
    assert not accelerate(accelerated).left
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for one, other in zip(accelerated(images)[:1], model(images)[:1], strict=True):
            one, other = (
                t if isinstance(t, torch.Tensor) else torch.stack(t) for t in (one, other)
            )
            assert_agree(one, other)


def test_models_nested_in_others_are_found_and_nothing_else_is_touched(tiny):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build_timm(tiny())
            self.own = OurClassifier(tiny())
            self.neck = nn.Linear(32, 32)

    model = Both()
    own = [type(m) for m in model.own.modules()]
    report = accelerate(model)
    assert all(path.startswith("backbone.") for path in report.replaced)
    assert report.replaced["backbone.blocks.1.attn"] == "attention with its bias"
    assert report.replaced["backbone.blocks.1.mlp.fc2"] == "linear"
    assert type(model.neck) is nn.Linear
    restore(model)
    assert [type(m) for m in model.own.modules()] == own


def test_no_class_is_edited_and_other_instances_stay(pair):
    attention, mask = timm.models.beit.Attention.forward, timm.models.beit.Block.forward
    model, _ = pair("timm")
    assert timm.models.beit.Attention.forward is attention
    assert timm.models.beit.Block.forward is mask
    assert not any(isinstance(m, Accelerated) for m in model.modules())


def test_what_is_left_is_reported_with_its_reason(tiny, transformers_config):
    class Mine(timm.models.beit.Attention):
        pass

    model = build_timm(tiny(embed_dim=512, num_heads=2))
    model.blocks[0].attn = Mine(512, num_heads=2)
    model.blocks[1].mlp.fc1.forward = lambda x: x
    model.blocks[1].mlp.fc2.double()
    left = accelerate(model).left
    assert "Mine" in left["blocks.0.attn"]
    assert "256 channels" in left["blocks.1.attn"]
    assert "replaced on the instance" in left["blocks.1.mlp.fc1"]
    assert "float64" in left["blocks.1.mlp.fc2"]
    model = transformers.BeitModel(transformers_config(tiny()))
    model.config._attn_implementation = "flex_attention"
    report = accelerate(model)
    assert "flex_attention" in report.left["layers.0.attention"]
    assert "layers.0.attention" in str(report)
    assert "linear: " in str(report)


def test_a_model_without_a_beit_is_refused(tiny):
    with pytest.raises(ValueError, match="no timm Beit and no transformers BEiT"):
        accelerate(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="already"):
        accelerate(OurClassifier(tiny()))


def test_an_older_transformers_is_refused_by_version(tiny, transformers_config, monkeypatch):
    model = transformers.BeitModel(transformers_config(tiny()))
    monkeypatch.delattr(transformers.models.beit.modeling_beit, "BeitMLP")
    monkeypatch.delitem(sys.modules, "beit_fast.acceleration.transformers", raising=False)
    with pytest.raises(ImportError, match=r"transformers>=5\.17"):
        accelerate(model)


def test_restoring_under_a_parametrization_is_refused_and_changes_nothing(pair):
    _, accelerated = pair("timm")
    linear = accelerated.blocks[0].mlp.fc1
    nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1"):
        restore(accelerated)
    assert isinstance(accelerated.blocks[1], Accelerated)
    nn.utils.parametrize.remove_parametrizations(linear, "weight")
    restore(accelerated)
    assert not any(isinstance(m, Accelerated) for m in accelerated.modules())
