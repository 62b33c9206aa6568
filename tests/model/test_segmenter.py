"""The segmenter against transformers' in double precision, its loss by hand, what is refused."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias
from beit_fast.labels import IGNORE
from beit_fast.model.beit import Beit
from beit_fast.model.config import SegmenterConfig
from beit_fast.model.fp8 import use_fp8
from beit_fast.model.pyramid import pyramid_maps
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.weights.layouts import from_house

TAPS = (0, 1, 2, 4)  # of 6 blocks; transformers takes two before the ones it is given


@pytest.fixture
def config():
    def make(**overrides) -> SegmenterConfig:
        fields = {
            "img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 6, "num_heads": 4,
            "num_classes": 5, "drop_rate": 0.0, "auxiliary_channels": 12,
        }  # fmt: skip
        return SegmenterConfig(**{**fields, **overrides})

    return make


def labelled(config, num_images=2, ignored=0.3):
    """Normalised images, and labels of which a share does not count."""
    size = (num_images, *config.image_pixels)
    labels = torch.randint(config.num_classes, size)
    labels[torch.rand(size) < ignored] = IGNORE
    return torch.randn(num_images, 3, *config.image_pixels), labels


def as_transformers(state):
    return from_house(state, "hf5")


def without_rounding(gradients):
    """What batch norm takes away again has no gradient but rounding."""
    assert gradients.pop("fpn.fpn1.conv_transpose1.bias").abs().max() < 1e-12
    return gradients


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_scores_loss_and_gradients_are_those_of_transformers(
    config, randomize, transformers_config, gradients, training
):
    from transformers import BeitForSemanticSegmentation as Theirs

    ours = randomize(BeitForSemanticSegmentation(config(taps=TAPS))).double().train(training)
    theirs_config = transformers_config(ours.config)
    theirs_config.update({
        "out_indices": [tap + 2 for tap in TAPS], "use_mask_token": False,
        "auxiliary_channels": 12,
    })  # fmt: skip
    theirs = Theirs(theirs_config).double().train(training)
    theirs.load_state_dict(as_transformers(ours.state_dict()), strict=True)
    images, labels = labelled(ours.config, ignored=0)
    images = images.double()
    expected = theirs(images, labels=labels)
    torch.testing.assert_close(ours(images), expected.logits, rtol=0, atol=1e-10)
    ours.load_state_dict(ours.state_dict())
    loss, _ = ours.loss(images, labels)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-10, atol=0)
    loss.backward()
    expected.loss.backward()
    found, wanted = as_transformers(gradients(ours)), gradients(theirs)
    if training:
        found, wanted = without_rounding(found), without_rounding(wanted)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-9)
        assert error < 1e-8, name


@pytest.mark.parametrize(
    "sizes",
    [
        [(24, 16), (12, 8), (6, 4), (3, 2)],
        [(14, 22), (7, 11), (4, 6), (2, 3)],  # halves that leave something over
        [(9, 9), (8, 8), (3, 3), (1, 1)],
    ],
)
def test_upernet_of_maps_of_any_size_is_that_of_transformers(
    config, transformers_config, randomize, gradients, sizes
):
    from transformers.models.beit.modeling_beit import BeitUperHead

    ours = randomize(BeitForSemanticSegmentation(config())).decode_head.double().train()
    theirs = BeitUperHead(transformers_config(config())).double().train()
    state = {f"decode_head.{name}": tensor for name, tensor in ours.state_dict().items()}
    named = {n.removeprefix("decode_head."): t for n, t in as_transformers(state).items()}
    theirs.load_state_dict(named, strict=True)
    maps = [torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    others = [each.detach().clone().requires_grad_() for each in maps]
    scores, expected = ours(maps), theirs(others)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(scores)
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(maps, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-9)
    found = as_transformers({f"decode_head.{n}": g for n, g in gradients(ours).items()})
    for name, wanted in gradients(theirs).items():
        error = (found[f"decode_head.{name}"] - wanted).norm() / wanted.norm().clamp(min=1e-9)
        assert error < 1e-8, name


def test_other_channels_are_those_of_the_heads(config):
    model = BeitForSemanticSegmentation(config(head_channels=24))
    assert model.decode_head.fpn_bottleneck.conv.weight.shape == (24, 96, 3, 3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5, 16, 16)
    assert BeitForSemanticSegmentation(config(auxiliary_channels=0)).auxiliary_head is None


@torch.no_grad()
def test_the_linear_head_is_a_product_with_what_the_last_block_gives_normalised(config, randomize):
    model = randomize(BeitForSemanticSegmentation(config(head="linear"))).double()
    encoder = {name.split(".")[0] for name in Beit(config()).state_dict()}
    assert {name for name in model.state_dict() if name.split(".")[0] not in encoder} == {
        *(f"decode_head.bn.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
        "decode_head.bn.num_batches_tracked", "decode_head.conv_seg.weight",
        "decode_head.conv_seg.bias",
    }  # fmt: skip
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    tokens = model.train()(images).flatten(2).transpose(1, 2)
    features = Beit.forward_features(model, images)[:, 1:]
    mean, var = features.mean(dim=(0, 1)), features.var(dim=(0, 1), unbiased=False)
    bn, conv = model.decode_head.bn, model.decode_head.conv_seg
    normed = (features - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias
    torch.testing.assert_close(tokens, normed @ conv.weight.flatten(1).t() + conv.bias)


def independent_loss(model, images, labels, weight):
    """Each pixel by itself, as mmsegmentation counts."""
    maps = pyramid_maps(model, images, model.config.tapped)
    losses = []
    for scores in (model.decode_head(maps), model.auxiliary_head(maps[2])):
        scores = nn.Upsample(size=labels.shape[1:], mode="bilinear", align_corners=False)(scores)
        chances = scores.softmax(dim=1).permute(0, 2, 3, 1)
        kept = labels != IGNORE
        chosen = chances[kept].gather(1, labels[kept][:, None])
        losses.append(-chosen.log().sum() / labels.numel())
        if len(losses) == 1:
            right = (chances[kept].argmax(1) == labels[kept]).double().mean()
    return losses[0] + weight * losses[1], right


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_the_mean_is_over_all_pixels_and_the_share_over_those_that_count(config, randomize, dtype):
    model = randomize(BeitForSemanticSegmentation(config())).double().eval()
    images, labels = labelled(model.config)
    images = images.double()
    wanted, right = independent_loss(model, images, labels, 0.3)
    loss, share = model.loss(images, labels.to(dtype), auxiliary_weight=0.3)
    torch.testing.assert_close(loss, wanted)
    assert share.item() == pytest.approx(right.item())
    loss, share = model.loss(images, torch.full_like(labels, IGNORE))
    assert (loss.item(), share.item()) == (0, 0)
    without, _ = model.loss(images, labels, auxiliary_weight=0)
    torch.testing.assert_close(without, independent_loss(model, images, labels, 0)[0])


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({"img_size": (64, 96)}, (16, 24)),
        ({"img_size": (32, 64), "patch_size": 8}, (8, 16)),
        ({"img_size": (56, 84), "patch_size": 14}, (16, 24)),
        ({"img_size": (64, 64), "patch_size": (16, 8)}, (16, 32)),
        ({"img_size": (64, 96), "head": "linear"}, (4, 6)),
    ],
)
def test_any_patch_and_any_crop_learns(config, gradients, fields, scores):
    model = BeitForSemanticSegmentation(config(drop_rate=0.1, drop_path_rate=0.1, **fields))
    images, labels = labelled(model.config)
    assert model(images).shape[2:] == scores
    model.loss(images, labels)[0].backward()
    found = gradients(model)
    read = max(model.config.tapped) + 1
    unread = {n for n, _ in model.named_parameters()} - found.keys()
    assert all(name.startswith("blocks.") and int(name.split(".")[1]) >= read for name in unread)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("side", [512, 640])
def test_attention_of_the_published_crops_is_that_of_a_dense_bias(config, side):
    fields = {"img_size": side, "embed_dim": 16, "num_heads": 1, "head": "linear", "depth": 1}
    attention = BeitForSemanticSegmentation(config(**fields)).blocks[0].attn
    table, grid = attention.relative_position_bias_table, attention.grid
    assert "relative_position_bias_table" in attention.state_dict()
    assert all(tensor.numel() < 2 * len(table) for tensor in attention.state_dict().values())
    with torch.no_grad():
        table.normal_()
    x = torch.randn(1, 1 + grid[0] * grid[1], 16)
    weights = torch.randn_like(x)
    (attention.mix(x) * weights).sum().backward()
    found, table.grad = table.grad, None
    q, k, v = attention._project(x).unflatten(2, (3, -1)).unbind(2)
    scores = q @ k.transpose(1, 2) / 4 + rel_pos_bias(table, grid)
    (scores.softmax(dim=2) @ v * weights).sum().backward()
    assert (found - table.grad).norm() < 1e-4 * table.grad.norm()


def test_dropout_takes_whole_channels_in_training_alone(config):
    model = BeitForSemanticSegmentation(config(drop_rate=0.5))
    seen = []
    model.decode_head.dropout.register_forward_hook(lambda *call: seen.append(call[2]))
    model.auxiliary_head.dropout.register_forward_hook(lambda *call: seen.append(call[2]))
    model.loss(*labelled(model.config))
    for out in seen:
        share = (out.flatten(2) == 0).all(dim=2).float().mean()
        assert 0.2 < share < 0.9
    model.eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)


def test_heads_start_as_mmsegmentations(config):
    wide = {"embed_dim": 128, "num_classes": 60, "auxiliary_channels": 64}
    with torch.device("meta"):
        model = BeitForSemanticSegmentation(config(**wide))
    for built in (BeitForSemanticSegmentation(config(**wide)), model.to_empty(device="cpu")):
        built.init_weights()
        head = built.decode_head
        for weight, fan_out in (
            (head.psp_modules[3][1].conv.weight, 128),
            (head.bottleneck.conv.weight, 9 * 128),
            (head.lateral_convs[0].conv.weight, 128),
            (head.fpn_convs[2].conv.weight, 9 * 128),
            (head.fpn_bottleneck.conv.weight, 9 * 128),
            (built.auxiliary_head.convs[0].conv.weight, 9 * 64),
        ):
            assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        for last in (head.conv_seg, built.auxiliary_head.conv_seg):
            assert last.weight.std().item() == pytest.approx(0.01, rel=0.05)
            assert not last.bias.any()
        assert built.blocks[1].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
        for name, buffer in built.named_buffers():
            if name.endswith("running_var"):
                assert (buffer == 1).all(), name
            elif "running_mean" in name or "num_batches" in name:
                assert not buffer.any(), name
        assert built.fpn1[0].weight.abs().max() <= (1 / (4 * 128)) ** 0.5


def test_names_are_mmsegmentations_and_both_prefixes_load(config, randomize):
    source = randomize(BeitForSemanticSegmentation(config()))
    state = source.state_dict()
    assert not [name for name in state if "relative_position_index" in name]
    assert len([name for name in state if name.endswith("relative_position_bias_table")]) == 6
    heads = ("decode_head.", "auxiliary_head.")
    prefixed = {n if n.startswith(heads) else f"backbone.{n}": t for n, t in state.items()}
    model = BeitForSemanticSegmentation(config())
    assert not any(model.load_state_dict(prefixed, strict=True))
    outer = nn.ModuleDict({"net": BeitForSemanticSegmentation(config())})
    outer.load_state_dict({f"net.{name}": tensor for name, tensor in prefixed.items()})
    images = torch.randn(1, 3, 64, 64)
    for each in (model, outer["net"]):
        assert torch.equal(each.eval()(images), source.eval()(images))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(prefixed | {"backbone.extra": torch.ones(1)})
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(synchronised.state_dict()) == list(state)
    assert isinstance(synchronised.decode_head.bottleneck.bn, nn.SyncBatchNorm)


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_maps_stay_channels_last(config, head):
    model = BeitForSemanticSegmentation(config(head=head))
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout2d | nn.ConvTranspose2d):
            module.register_forward_hook(
                lambda _, given, out, name=name: seen.update({name: (given[0], out)})
            )
    model.loss(*labelled(model.config, num_images=3))
    assert len(seen) == {"upernet": 19, "linear": 2}[head]
    for name, tensors in seen.items():
        for tensor in tensors:
            assert tensor.stride(1) == 1 or tensor.shape[2:] == (1, 1), name


def test_a_hooked_convolution_gives_the_same_by_itself(config, randomize):
    model = randomize(BeitForSemanticSegmentation(config())).double().eval()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected, seen = model(images), []
    for part in (model.decode_head.fpn_bottleneck.conv, model.decode_head.bottleneck):
        part.register_forward_hook(lambda *call: seen.append(call[1][0].shape[1]))
    torch.testing.assert_close(model(images), expected)
    assert seen == [160, 128]


@pytest.mark.parametrize(
    ("head", "dtype"),
    [("upernet", torch.bfloat16), ("linear", torch.float32)],
    ids=["upernet-bf16", "linear-fp32"],
)
def test_a_crop_is_compiled_once_and_whole(config, randomize, gradients, head, dtype):
    model = randomize(BeitForSemanticSegmentation(config(head=head, depth=2, img_size=(64, 32))))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    for _ in range(3):
        images, labels = labelled(model.config)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = compiled(images, labels)
            expected, _ = model.loss(images, labels)
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(loss, expected, rtol=bound, atol=0)
        loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert counter.frame_count == 1


def test_half_the_bits_round_and_keep_the_loss(config):
    model = BeitForSemanticSegmentation(config())
    images, labels = labelled(model.config)
    exact, _ = model.loss(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(images)
        loss, _ = model.loss(images, labels)
    assert scores.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    loss.backward()


def test_the_same_step_twice_is_the_same(config, gradients):
    model = BeitForSemanticSegmentation(config(drop_rate=0.1, drop_path_rate=0.2))
    images, labels = labelled(model.config)
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(5)
        model.loss(images, labels)[0].backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("mode", [True, "selective"])
def test_checkpointing_changes_no_gradient(config, randomize, gradients, mode):
    model = randomize(BeitForSemanticSegmentation(config()))
    images, labels = labelled(model.config)
    found = []
    for enabled in (False, mode):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model.loss(images, labels)[0].backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


@torch.no_grad()
def test_fp8_rounds_the_blocks_alone(config, randomize):
    model = randomize(BeitForSemanticSegmentation(config())).eval()
    images, _ = labelled(model.config)
    exact = model(images)
    kinds = {name: type(module) for name, module in model.named_modules()}
    use_fp8(model, torch.device("cpu"))
    changed = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert {name.split(".")[0] for name in changed} == {"blocks"}
    error = (model(images) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.3


def test_one_image_in_training_is_refused_and_each_remedy_works(config):
    model = BeitForSemanticSegmentation(config())
    images, labels = labelled(model.config)
    with pytest.raises(ValueError, match=r"a batch of 1 image .*pass 2 images or more.*eval\(\)"):
        model.loss(images[:1], labels[:1])
    model.loss(images, labels)
    model.decode_head.eval()
    model.loss(images[:1], labels[:1])
    model.eval()(images[:1])
    linear = BeitForSemanticSegmentation(config(head="linear"))
    linear.loss(images[:1], labels[:1])


def test_what_makes_no_segmenter_is_refused(config):
    for fields, message in (
        ({"num_classes": 1}, "num_classes is 1: give 2 or more"),
        ({"taps": (0, 1, 2)}, r"taps are \[0, 1, 2\]: the upernet head reads 4"),
        ({"taps": (0, 1, 2, 6)}, "give 4 of the blocks 0 to 5"),
        ({"head": "linear", "taps": (0, 1, 2, 3)}, "the linear head reads 1"),
        ({"head": "linear", "head_channels": 8}, "head_channels is 8, and the linear head has"),
        ({"img_size": (16, 64)}, "pools 2x2: give 2 or more patches"),
        ({"img_size": 16, "patch_size": 8}, "pools 4x4: give 4 or more patches"),
        ({"img_size": 70}, r"pass img_size=\(64, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**fields)
    for fields in (
        {"img_size": (32, 64)},
        {"img_size": 32, "patch_size": 8},
        {"taps": (5, 5, 0, 0)},
    ):
        BeitForSemanticSegmentation(config(**fields)).eval()
    assert config().tapped == (1, 2, 3, 5)
    assert config(head="linear").tapped == (5,)
    assert config(head="linear", taps=(2,)).tapped == (2,)


def test_labels_of_another_shape_or_kind_are_refused(config):
    model = BeitForSemanticSegmentation(config())
    images, labels = labelled(model.config)
    for wrong in (labels[:1], labels[:, None], labels.float()):
        with pytest.raises(ValueError, match=r"pass whole numbers \(2, height, width\), -1 where"):
            model.loss(images, wrong)
    with pytest.raises(ValueError, match="a segmenter needs its taps"):
        model.prune_intermediate_layers(2)


def test_another_size_of_images_moves_the_tables(config, randomize):
    model = randomize(BeitForSemanticSegmentation(config())).eval()
    model.set_input_size((96, 64))
    assert isinstance(model.config, SegmenterConfig)
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 5, 24, 16)
    anywhere = BeitForSemanticSegmentation(
        dataclasses.replace(config(), dynamic_img_size=True)
    ).eval()
    assert anywhere(torch.randn(1, 3, 48, 80)).shape == (1, 5, 12, 20)


def test_no_weight_is_spared_decay_by_name(config):
    assert BeitForSemanticSegmentation(config()).no_weight_decay() == set()
