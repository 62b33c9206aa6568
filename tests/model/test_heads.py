import functools
import math

import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels.head import linear_argmax
from beit_fast.kernels.head.linear_cross_entropy import masked_linear_cross_entropy
from beit_fast.kernels.input.patches import normalized_patches
from beit_fast.model import heads
from beit_fast.model.beit import Beit
from beit_fast.model.config import beit_config
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.patch_embed import patchify
from beit_fast.model.pyramid import BeitFeaturePyramid

B, L, V = 3, 16, 24


def masked_inputs(num_padding=5):
    """images, mask, masked_index (padded), visual_tokens."""
    mask = torch.rand(B, L) < 0.4
    index = mask.flatten().nonzero().flatten().int()
    index = F.pad(index, (0, num_padding), value=-1)
    return torch.randn(B, 3, 32, 32), mask, index, torch.randint(V, (B, L))


# --- parameter counts: the published models' ------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "name", "overrides", "base", "large"),
    [
        (BeitForMaskedImageModeling, "224_8k_vocab", {}, 91_965_776, 311_534_016),
        (BeitForMaskedImageModeling, "224_vanilla", {}, 92_089_856, 311_674_880),
        (BeitForImageClassification, "224", {"num_classes": 0}, 85_761_984, 303_405_568),
        (BeitForImageClassification, "224", {}, 86_530_984, 304_430_568),
        (BeitForImageClassification, "384", {}, 86_744_104, 304_998_888),
        (BeitForImageClassification, "512", {}, 86_997_544, 305_674_728),
        (BeitForImageClassification, "224", {"num_classes": 21841}, 102_557_713, 325_792_593),
    ],
    ids=["mim", "mim-vanilla", "features", "224", "384", "512", "21841"],
)
def test_parameters_are_as_many_as_published(head, name, overrides, base, large):
    for size, expected in (("base", base), ("large", large)):
        with torch.device("meta"):
            model = head(beit_config(f"beit_{size}_patch16_{name}", **overrides))
        assert sum(p.numel() for p in model.parameters()) == expected


# --- masked image modelling -----------------------------------------------------------------------

FAMILIES = {
    "BEiT+": {},
    "vanilla": {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "init_values": None},
}


@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)
def test_mim_loss_and_all_gradients_are_those_of_transformers(
    tiny, randomize, transformers_config, to_transformers, gradients, assert_agree, fields
):
    from transformers import BeitForMaskedImageModeling as TheirBeit

    config = tiny(**fields)
    ours = randomize(BeitForMaskedImageModeling(config))
    theirs = TheirBeit(transformers_config(config)).eval()
    theirs.load_state_dict(to_transformers(ours.state_dict()), strict=True)
    images, mask, index, tokens = masked_inputs()

    out = theirs(images, bool_masked_pos=mask, labels=tokens[mask])
    loss, num_correct = ours.loss(images, mask, index, tokens)
    out.loss.backward()
    loss.backward()
    assert_agree(loss, out.loss)
    assert_agree(to_transformers(gradients(ours)), gradients(theirs))
    assert_agree(ours(images, mask), out.logits)
    predicted = out.logits.argmax(dim=-1)
    assert num_correct == (predicted == tokens)[mask].sum()
    assert torch.equal(ours.predict(images, mask), predicted)


def test_mim_state_dict_has_the_names_of_unilm(tiny):
    names = set(BeitForMaskedImageModeling(tiny(depth=1)).state_dict())
    assert names == {
        "cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "rel_pos_bias.relative_position_bias_table",
        "blocks.0.norm1.weight", "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight",
        "blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias", "blocks.0.gamma_1", "blocks.0.gamma_2",
        "blocks.0.norm2.weight", "blocks.0.norm2.bias", "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias",
        "norm.weight", "norm.bias", "lm_head.weight", "lm_head.bias",
    }  # fmt: skip


def test_mim_loss_starts_at_ln_v(tiny):
    vocab = 8192
    model = BeitForMaskedImageModeling(tiny(vocab_size=vocab, embed_dim=128))
    images, mask, index, _ = masked_inputs()
    loss, _ = model.loss(images, mask, index, torch.randint(vocab, (B, L)))
    assert loss.item() == pytest.approx(math.log(vocab), abs=0.05)


def test_only_listed_patches_reach_the_norm_and_the_head(tiny, randomize):
    model = randomize(BeitForMaskedImageModeling(tiny()))
    images, mask, index, tokens = masked_inputs()
    x = model.forward_features(images, mask).detach().requires_grad_()
    model.forward_features = lambda *_, **__: x
    loss, _ = model.loss(images, mask, index, tokens)
    loss.backward()
    touched = x.grad.any(dim=-1)
    assert torch.equal(touched[:, 1:], mask)
    assert not touched[:, 0].any()


def test_padding_the_index_changes_nothing(tiny, randomize):
    model = randomize(BeitForMaskedImageModeling(tiny()))
    images, mask, index, tokens = masked_inputs(num_padding=0)
    padded = F.pad(index, (0, 30), value=-1)
    loss, num_correct = model.loss(images, mask, index, tokens)
    padded_loss, padded_correct = model.loss(images, mask, padded, tokens)
    torch.testing.assert_close(padded_loss, loss)
    assert padded_correct == num_correct


@pytest.mark.parametrize("listed", [0, 4], ids=["no-index", "all-padding"])
@pytest.mark.parametrize("predict", ["tokens", "pixels"])
def test_an_empty_mask_costs_nothing(tiny, listed, predict):
    model = BeitForMaskedImageModeling(tiny(predict=predict))
    images, mask = torch.randn(B, 3, 32, 32), torch.zeros(B, L, dtype=torch.bool)
    index = torch.full((listed,), -1, dtype=torch.int32)
    if predict == "tokens":
        loss, _ = model.loss(images, mask, index, torch.randint(V, (B, L)))
    else:
        loss = model.pixel_loss(images, mask, index)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert not parameter.grad.any(), name


def test_a_patch_listed_twice_counts_twice(tiny, randomize):
    model = randomize(BeitForMaskedImageModeling(tiny()))
    images, mask, _, tokens = masked_inputs()
    one, two = (model.loss(images, mask, torch.tensor([i]), tokens)[0] for i in (3, 20))
    both, _ = model.loss(images, mask, torch.tensor([3, 20, 20, -1]), tokens)
    torch.testing.assert_close(both, (one + 2 * two) / 3)


def test_listing_every_patch_predicts_all_tokens(tiny, randomize):
    model = randomize(BeitForMaskedImageModeling(tiny()))
    images, mask, _, tokens = masked_inputs()
    loss, _ = model.loss(images, mask, torch.arange(B * L), tokens)
    expected = F.cross_entropy(model(images, mask).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(loss, expected)


def test_losses_need_no_value_on_the_host(tiny):
    # The meta device has shapes and no values: nonzero, boolean indexing and .item() raise there.
    inputs = [t.to("meta") for t in masked_inputs()]
    with torch.device("meta"):
        loss, _ = BeitForMaskedImageModeling(tiny()).loss(*inputs)
        pixel_loss = BeitForMaskedImageModeling(tiny(predict="pixels")).pixel_loss(*inputs[:3])
    (loss + pixel_loss).backward()


def test_losses_compile_in_one_graph(tiny, randomize):
    inputs = masked_inputs()
    tokens = randomize(BeitForMaskedImageModeling(tiny()))
    pixels = randomize(BeitForMaskedImageModeling(tiny(predict="pixels")))
    for function, arguments in ((tokens.loss, inputs), (pixels.pixel_loss, inputs[:3])):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


def test_predictions_do_not_depend_on_the_portions_they_are_made_in(tiny, randomize, monkeypatch):
    model = randomize(BeitForMaskedImageModeling(tiny()))
    images, mask, _, _ = masked_inputs()
    expected = model(images, mask).argmax(dim=-1)
    monkeypatch.setattr(linear_argmax, "SCORES_AT_A_TIME", 2 * L * V)
    assert torch.equal(model.predict(images, mask), expected)


def test_tokens_of_the_listed_patches_alone_will_do(tiny, randomize):
    model = randomize(BeitForMaskedImageModeling(tiny()))
    images, mask, index, tokens = masked_inputs()
    listed = torch.where(index >= 0, tokens.flatten()[index.clamp(min=0)], -1)
    everywhere = model.loss(images, mask, index, tokens)
    for one, other in zip(model.loss(images, mask, index, listed), everywhere, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("predict", ["tokens", "pixels"])
def test_a_loss_takes_patches_for_images(tiny, randomize, gradients, predict):
    config = tiny(predict=predict, use_abs_pos_emb=True)
    model = randomize(BeitForMaskedImageModeling(config))
    images, *inputs = masked_inputs()
    results = []
    for pixels in (images, patchify(images, config.patch_pixels)):
        pixels.requires_grad_()
        if predict == "tokens":
            loss, _ = model.loss(pixels, *inputs)
        else:
            loss = model.pixel_loss(pixels, *inputs[:2])
        model.zero_grad()
        loss.backward()
        in_patches = pixels.grad if pixels.ndim == 3 else patchify(pixels.grad, (8, 8))
        results.append({"loss": loss, "pixels": in_patches, **gradients(model)})
    assert results[0].keys() == results[1].keys()
    assert results[0]["pixels"].abs().sum() > 0
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_tiny_beit_trains_by_the_kernels_as_by_the_reference(tiny, monkeypatch, device):
    def train(backend):
        head = functools.partial(masked_linear_cross_entropy, backend=backend)
        monkeypatch.setattr(heads, "masked_linear_cross_entropy", head)
        torch.manual_seed(0)
        model = BeitForMaskedImageModeling(tiny(depth=1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        inputs = masked_inputs()
        losses = []
        for _ in range(20):
            loss, _ = model.loss(*inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    with device:
        ours, theirs = train("triton"), train("reference")
    assert ours[-1] < 0.9 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("patch_size", [8, (8, 4)], ids=["8x8", "8x4"])
def test_pixel_loss_is_the_mean_square_over_hidden_pixels(tiny, randomize, patch_size):
    config = tiny(predict="pixels", patch_size=patch_size)
    model = randomize(BeitForMaskedImageModeling(config))
    images, mask = torch.randn(B, 3, 32, 32), torch.rand(B, config.num_patches) < 0.4
    index = F.pad(mask.flatten().nonzero().flatten().int(), (0, 3), value=-1)
    assert model.lm_head.out_features == config.patch_dim
    expected = F.mse_loss(model(images, mask)[mask], patchify(images, config.patch_pixels)[mask])
    torch.testing.assert_close(model.pixel_loss(images, mask, index), expected)


def test_a_model_asked_for_what_it_does_not_predict_refuses(tiny):
    images, mask, index, tokens = masked_inputs()
    pixels = BeitForMaskedImageModeling(tiny(predict="pixels"))
    with pytest.raises(ValueError, match="predicts pixels: build it with predict='tokens'"):
        pixels.loss(images, mask, index, tokens)
    with pytest.raises(ValueError, match="predicts pixels: build it with predict='tokens'"):
        pixels.predict(images, mask)
    with pytest.raises(ValueError, match="predicts tokens: build it with predict='pixels'"):
        BeitForMaskedImageModeling(tiny()).pixel_loss(images, mask, index)


def test_tokens_of_another_grid_are_refused_with_a_remedy(tiny):
    images, mask, index, tokens = masked_inputs()
    with pytest.raises(ValueError, match="one token per patch"):
        BeitForMaskedImageModeling(tiny()).loss(images, mask, index, tokens[:, 1:])


# --- arguments that no model can take -------------------------------------------------------------

MODELS = {
    "encoder": Beit,
    "mim": BeitForMaskedImageModeling,
    "classifier": BeitForImageClassification,
    "pyramid": BeitFeaturePyramid,
}


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)
def test_images_of_another_dtype_are_refused_and_each_remedy_works(kind, tiny):
    model = kind(tiny()).eval()
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    fields = {"patch_pixels": (8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    normalised = (images.float() / 255 - 0.5) / 0.5

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    wanted = first(model(normalised))
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(ValueError, match=rf"images are {dtype}, .*\.float\(\) / 255 - mean"):
            model(images.to(dtype))
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match=rf"images are {dtype}"),
        ):
            model(images.to(dtype))
    patches = normalized_patches(images.permute(0, 2, 3, 1).contiguous(), **fields)
    torch.testing.assert_close(first(model(patches)), wanted)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=rf"{dtype}, .*pass images\.to\(torch\.float32\)"):
            model(normalised.to(dtype))
        torch.testing.assert_close(
            first(model(normalised.to(dtype).to(torch.float32))), wanted, rtol=0.1, atol=0.1
        )
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            out = first(model(normalised.to(dtype)))
            assert (out.float() - wanted).norm() / wanted.norm() < 0.05
        with pytest.raises(ValueError, match=r"images are torch\.float64"):
            model(normalised.double())
    assert first(model.double()(normalised.double())).dtype == torch.float64
    for other in (normalised.numpy(), list(normalised)):
        with pytest.raises(TypeError, match=f"images are a {type(other).__name__}: pass a tensor"):
            model(other)


@pytest.mark.parametrize("predict", ["tokens", "pixels"])
@pytest.mark.parametrize("skip_unread_rows", [False, True])
def test_indices_masks_and_tokens_of_another_kind_are_refused(predict, skip_unread_rows, tiny):
    model = BeitForMaskedImageModeling(tiny(predict=predict, skip_unread_rows=skip_unread_rows))
    images, mask, index, tokens = masked_inputs(num_padding=0)

    def loss(images=images, mask=mask, index=index, tokens=tokens):
        arguments = (images, mask, index)
        if predict == "tokens":
            return model.loss(*arguments, tokens)
        return model.pixel_loss(*arguments)

    loss()
    for wrong in (index[None], index.float(), index.bool(), torch.tensor(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"the index is .*pass int32 or int64 \(I,\)"):
            loss(index=wrong)
    for wrong in (mask.flatten(), mask[0], mask.int(), mask[None], mask[:, :3], torch.tensor(True)):
        with pytest.raises(ValueError, match="mask"):
            loss(mask=wrong)
    with pytest.raises(ValueError, match=r"images are torch\.uint8"):
        loss(images=torch.zeros(B, 3, 32, 32, dtype=torch.uint8))
    if predict == "tokens":
        for wrong in (tokens.float(), tokens.to(torch.uint8), tokens[0], tokens[..., None]):
            with pytest.raises(ValueError, match=r"tokens|targets"):
                loss(tokens=wrong)
        assert model.predict(images, mask).shape == (B, L)
        with pytest.raises(ValueError, match="mask"):
            model.predict(images, mask.int())
