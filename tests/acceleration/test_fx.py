"""Accelerated models under torch.fx, after a new classifier, and differentiated twice."""

import copy

import pytest
import timm
import torch
from torch import fx
from torchvision.models.feature_extraction import create_feature_extractor

from beit_fast import BeitConfig, BeitForImageClassification, accelerate, restore
from beit_fast.kernels.attention.backends import use_backend

FAMILIES = {
    "table-per-block": {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1},
    "shared-table": {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False},
    "vanilla": {"use_abs_pos_emb": True},
}
SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def pair(request, randomize):
    """timm's model and its accelerated copy."""
    model = randomize(timm.models.beit.Beit(**SMALL, **request.param)).eval()
    accelerated = copy.deepcopy(model)
    accelerate(accelerated)
    return model, accelerated


@pytest.mark.parametrize(
    "extract", [create_feature_extractor, timm.models.create_feature_extractor]
)
def test_torchvisions_and_timms_feature_extraction_take_it(pair, extract):
    images = torch.randn(2, 3, 32, 32)
    nodes = {"blocks.0": "first", "blocks.1": "second", "head": "logits"}
    wanted, found = (extract(model, nodes)(images) for model in pair)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_its_graph_has_blocks_as_leaves_and_learns(pair):
    _, model = pair
    graph = fx.symbolic_trace(model)
    leaves = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert {"blocks.0", "blocks.1", "head"} <= leaves
    images = torch.randn(2, 3, 32, 32)
    graph(images).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_parts_are_leaves_too_where_their_block_is_none(pair):
    model, accelerated = pair
    block = accelerated.blocks[1]
    block.__class__ = type(model.blocks[1])  # timm's, around attention and linears of ours
    names = {node.target for node in fx.symbolic_trace(accelerated).graph.nodes}
    assert {"blocks.0", "blocks.1.attn", "blocks.1.mlp.fc1"} <= names
    images = torch.randn(2, 3, 32, 32)
    found = fx.symbolic_trace(accelerated)(images)
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)


def test_a_classifier_made_anew_is_taken_up_by_a_second_call(pair):
    model, accelerated = pair
    for each in pair:
        each.reset_classifier(7)
    accelerated.head.load_state_dict(model.head.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(accelerated(images), model(images), rtol=1e-4, atol=1e-5)
    assert type(accelerated.head) is torch.nn.Linear
    assert "head" in accelerate(accelerated).replaced
    assert isinstance(accelerated.head, torch.nn.Linear)
    assert type(accelerated.head) is not torch.nn.Linear
    torch.testing.assert_close(accelerated(images), model(images), rtol=1e-4, atol=1e-5)


def penalty(model, images) -> dict[str, torch.Tensor]:
    """Gradients of the squared gradient by the images: a gradient penalty's."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    model.zero_grad()
    gradient.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_penalty(model, images, wanted):
    found = penalty(model, images)
    for name, value in wanted.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error <= 1e-4, f"{name}: {error:.1e}"


def test_a_gradient_penalty_is_refused_and_both_ways_out_work(pair):
    model, accelerated = pair
    images = torch.randn(2, 3, 32, 32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = penalty(model, images)
    ours = r'attention has first .* use_backend\("reference"\)'
    sdpas = "_scaled_dot_product_flash_attention_for_cpu_backward is not implemented"
    has_bias = any("table" in name for name, _ in model.named_parameters())
    with pytest.raises(RuntimeError, match=ours if has_bias else sdpas):
        penalty(accelerated, images)
    with use_backend("reference"):
        assert_penalty(accelerated, images, wanted)
    restore(accelerated)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_penalty(accelerated, images, wanted)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_gradient_penalty_through_our_own_model_is_timms(family, randomize):
    fields = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": False, "init_values": None}
    ours = BeitForImageClassification(BeitConfig(**SMALL, **{**fields, **family})).eval()
    theirs = timm.models.beit.Beit(**SMALL, **{"use_abs_pos_emb": False, **family}).eval()
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = penalty(theirs, images)
    with use_backend("reference"):
        assert_penalty(ours, images, wanted)
