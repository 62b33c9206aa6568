"""What is timm's alone: hooks on its modules, sizes of images, its registered variants."""

import copy

import pytest
import timm
import torch

from accelerated import results, run
from beit_fast import accelerate


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


def test_timm_weights_hooked_after_the_softmax_are_seen(pair, forget_warnings):
    weights = []
    _, accelerated = pair("timm")
    attn = accelerated.blocks[0].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    with pytest.warns(UserWarning, match="attn_drop"):
        run(accelerated, torch.randn(2, 3, 32, 32))
    assert weights[0].shape == (2, 4, 17, 17)


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
