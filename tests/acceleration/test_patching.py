"""What accelerate changes of a model, what it leaves and refuses, and how restore undoes it."""

import copy
import io
import pickle
import sys

import pytest
import timm
import torch
import transformers
from torch import nn

from accelerated import either, every_model, run
from beit_fast import BeitForImageClassification as OurClassifier
from beit_fast import accelerate, restore
from beit_fast.acceleration.patching import Accelerated


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


def test_models_nested_in_others_are_found_and_nothing_else_is_touched(tiny, timm_beit):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm_beit(tiny())
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


def test_what_is_left_is_reported_with_its_reason(tiny, timm_beit, transformers_config):
    class Mine(timm.models.beit.Attention):
        pass

    model = timm_beit(tiny(embed_dim=512, num_heads=2))
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
