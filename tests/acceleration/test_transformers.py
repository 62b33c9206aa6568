"""What is transformers' alone: attention weights, interpolated positions, masks, its models."""

import copy

import pytest
import torch
import transformers

from accelerated import FAMILIES, results, run
from beit_fast import accelerate


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
