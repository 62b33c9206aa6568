import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from beit_fast.kernels.head import linear_argmax
from beit_fast.tokenizer.config import DvaeConfig, dvae_config
from beit_fast.tokenizer.dvae import Dvae, map_pixels, most_likely_images, unmap_pixels


def conv(state, name, x):
    w = state[f"{name}.w"]
    return F.conv2d(x, w, state[f"{name}.b"], padding=(w.shape[-1] - 1) // 2)


def block(state, name, x, gain):
    branch = x
    for i in range(1, 5):
        branch = conv(state, f"{name}.res_path.conv_{i}", branch.relu())
    identity = conv(state, f"{name}.id_path", x) if f"{name}.id_path.w" in state else x
    return identity + gain * branch


def half_by_the_paper(state, x, num_blocks, between):
    """Encoder or decoder as spec 5.1 puts it, from a state dict."""
    x = conv(state, "blocks.input", x)
    for g in range(1, 5):
        for i in range(1, num_blocks + 1):
            x = block(state, f"blocks.group_{g}.block_{i}", x, 1 / (4 * num_blocks) ** 2)
        x = between(x) if g < 4 else x
    return conv(state, "blocks.output.conv", x.relu())


def upsample(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.fixture
def images():
    """Patches of very different colours, so that they have different tokens."""
    coarse = torch.randint(0, 256, (3, 3, 8, 10), dtype=torch.uint8)
    return upsample(upsample(coarse))


@pytest.mark.parametrize(
    ("half", "num_tensors", "num_parameters"),
    [("encoder", 74, 53_786_240), ("decoder", 76, 43_829_766)],
)
def test_dalle_has_the_published_number_of_tensors_and_parameters(
    half, num_tensors, num_parameters
):
    with torch.device("meta"):
        parameters = list(getattr(Dvae(dvae_config("dvae_8192")), half).parameters())
    assert len(parameters) == num_tensors
    assert sum(p.numel() for p in parameters) == num_parameters


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        dvae = Dvae(DvaeConfig())
    encoder = {name: tuple(t.shape) for name, t in dvae.encoder.state_dict().items()}
    decoder = {name: tuple(t.shape) for name, t in dvae.decoder.state_dict().items()}
    assert encoder["blocks.input.w"] == (256, 3, 7, 7)
    assert encoder["blocks.group_1.block_2.res_path.conv_1.w"] == (64, 256, 3, 3)
    assert encoder["blocks.group_4.block_1.res_path.conv_4.w"] == (2048, 512, 1, 1)
    assert encoder["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert decoder["blocks.input.w"] == (128, 8192, 1, 1)
    assert decoder["blocks.group_1.block_1.res_path.conv_1.w"] == (512, 128, 1, 1)
    assert decoder["blocks.group_4.block_2.res_path.conv_4.w"] == (256, 64, 3, 3)
    assert decoder["blocks.output.conv.b"] == (6,)
    assert [g for g in range(1, 5) if f"blocks.group_{g}.block_1.id_path.w" in encoder] == [2, 3, 4]
    assert [g for g in range(1, 5) if f"blocks.group_{g}.block_1.id_path.w" in decoder] == [
        1, 2, 3, 4,
    ]  # fmt: skip


def test_dalle_gives_112_px_a_14_x_14_grid_of_8192_scores():
    with FakeTensorMode():  # shapes alone
        dvae, images = Dvae(DvaeConfig()), torch.empty(2, 3, 112, 112)
        assert dvae.encoder(images).shape == (2, 8192, 14, 14)
        ids = dvae.encode(images)
        assert ids.shape == (2, 14, 14)
        assert dvae.decode(ids).shape == (2, 3, 112, 112)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_both_halves_compute_what_the_paper_describes(num_blocks):
    config = DvaeConfig(
        vocab_size=20,
        encoder_width=8,
        decoder_width=12,
        decoder_input_width=6,
        blocks_per_group=num_blocks,
    )
    dvae = Dvae(config).double()
    x, codes = torch.rand(2, 3, 24, 16).double(), torch.rand(2, 20, 3, 2).double()
    encoder, decoder = dvae.encoder.state_dict(), dvae.decoder.state_dict()
    expected = half_by_the_paper(encoder, x, num_blocks, lambda x: F.max_pool2d(x, 2))
    torch.testing.assert_close(dvae.encoder(x), expected)
    expected = half_by_the_paper(decoder, codes, num_blocks, upsample)
    torch.testing.assert_close(dvae.decoder(codes), expected)


def test_weights_start_with_variance_one_over_fan_in_and_biases_at_zero():
    dvae = Dvae(dvae_config("dvae_1024", encoder_width=64, decoder_width=64))
    for name, parameter in dvae.named_parameters():
        if name.endswith(".b"):
            assert not parameter.any(), name
        elif parameter.numel() > 2000:
            fan_in = parameter[0].numel()
            # standard error of a measured std: 1 / sqrt(2 n)
            tolerance = 4 / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() * math.sqrt(fan_in) - 1) < tolerance, name


def test_encode_is_the_argmax_of_the_logits_whatever_the_size_of_its_portions(
    tiny, images, monkeypatch
):
    expected = tiny.encoder(map_pixels(images)).argmax(dim=1)
    assert len(expected.unique()) > 3
    for in_flight in (1, 24 * 7, 2**24):
        monkeypatch.setattr(linear_argmax, "SCORES_AT_A_TIME", in_flight)
        ids = tiny.encode(images)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_listed_positions_have_the_tokens_they_have_among_all(tiny, images, layout):
    tiny.to(memory_format=layout)
    everywhere = tiny.encode(images).flatten()
    index = torch.tensor([5, -1, 0, len(everywhere) - 1, 5], dtype=torch.int32)
    ids = tiny.encode(images, index)
    assert torch.equal(ids[index >= 0], everywhere[index[index >= 0]])
    assert ids[1] == -1


def test_the_precision_of_the_scores_can_be_chosen(tiny, images):
    output = tiny.encoder.blocks["output"]["conv"]
    with torch.no_grad():  # all weights are 1 in bf16, and all scores equal
        output.w.normal_(1, 1e-4)
        output.b.zero_()
    expected = tiny.encode(images, precision="fp32")
    assert expected.any()
    assert torch.equal(tiny.encode(images), expected)
    assert not tiny.encode(images, precision="bf16").any()


def test_equal_scores_go_to_the_lowest_code(tiny, images):
    output = tiny.encoder.blocks["output"]["conv"]
    with torch.no_grad():
        output.w[9], output.b[9] = output.w[5], 100.0
        output.b[5] = 100.0
    assert (tiny.encode(images) == 5).all()
    with torch.no_grad():
        output.w.zero_()
        output.b.zero_()
    assert not tiny.encode(images).any()


def test_uint8_float_and_channels_last_images_have_the_same_tokens(tiny, images):
    expected = tiny.encode(images)
    assert torch.equal(tiny.encode(images.float() / 255), expected)
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(tiny.encode(channels_last), expected)
    assert torch.equal(tiny.to(memory_format=torch.channels_last).encode(images), expected)


def test_under_autocast_only_the_convolutions_lose_precision(tiny, images):
    with torch.autocast("cpu", torch.bfloat16):
        ids = tiny.encode(images)
        features = tiny.encoder.features(map_pixels(images))
    assert features.dtype == torch.bfloat16
    output = tiny.encoder.blocks["output"]["conv"]
    logits = F.conv2d(features.float(), output.w, output.b)
    assert torch.equal(ids, logits.argmax(dim=1))


def test_half_precision_scores_would_change_the_tokens():
    scores = torch.randn(1000, 8192)
    changed = scores.bfloat16().argmax(dim=1) != scores.argmax(dim=1)
    assert 0.01 < changed.double().mean() < 0.04  # the figure in the docstring of encode


def test_parameters_in_half_precision_encode_and_decode(tiny, images):
    expected = tiny.encode(images)
    ids = tiny.bfloat16().encode(images)
    assert (ids == expected).float().mean() > 0.7
    decoded = tiny.decode(ids)
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()


def test_ids_carry_no_gradient_and_may_be_targets_of_a_loss(tiny, images):
    ids = tiny.encode(images)
    scores = torch.zeros(ids.numel(), 24, requires_grad=True)
    F.cross_entropy(scores, ids.flatten()).backward()
    assert scores.grad.any()


def test_an_empty_batch_has_no_tokens(tiny):
    assert tiny.encode(torch.empty(0, 3, 16, 24)).shape == (0, 2, 3)
    assert tiny.decode(torch.empty(0, 2, 3, dtype=torch.int64)).shape == (0, 3, 16, 24)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.zeros(1, 16, 16, 3), "permute"),
        (torch.zeros(1, 3, 12, 16), "multiples of 8.*16 x 16"),
        (torch.zeros(1, 3, 0, 16), "0 x 16"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int32), "int32"),
    ],
    ids=["no-batch", "channels-last", "12px", "0px", "int32"],
)
def test_images_that_cannot_be_encoded_are_explained(tiny, images, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(images)
    with pytest.raises(ValueError, match=message):
        tiny(images, 1.0)


def test_decoding_codes_is_the_decoder_on_one_hot_codes(tiny):
    ids = torch.randint(0, 24, (2, 3, 4))
    one_hot = F.one_hot(ids, 24).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(
        tiny.decoder.embed(ids), tiny.decoder.blocks["input"](one_hot), rtol=1e-6, atol=1e-6
    )
    expected = unmap_pixels(torch.sigmoid(tiny.decoder(one_hot)[:, :3]))
    decoded = tiny.decode(ids)
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    assert decoded.shape == (2, 3, 24, 32)
    assert 0 <= decoded.min() < decoded.max() <= 1
    assert not decoded.requires_grad


@pytest.mark.parametrize("ids", [torch.zeros(4, 4).long(), torch.zeros(1, 4, 4)], ids=["2d", "fp"])
def test_ids_that_cannot_be_decoded_are_explained(tiny, ids):
    with pytest.raises(ValueError, match="integers"):
        tiny.decode(ids)


def test_pixels_map_into_the_margins_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    mapped = map_pixels(pixels)
    torch.testing.assert_close(mapped, 0.1 + 0.8 * pixels.float() / 255)
    torch.testing.assert_close(unmap_pixels(mapped), pixels.float() / 255)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    extreme = torch.tensor([-50.0, 0.0, 50.0])
    assert most_likely_images(extreme).tolist() == [0, 0.5, 1]


def test_training_forward_reaches_every_parameter(tiny, images):
    output = tiny(images, 0.7)
    assert output.logits.shape == (3, 24, 4, 5)
    assert output.mu.shape == output.log_scale.shape == output.mapped.shape == images.shape
    (output.mu.sum() + output.log_scale.sum()).backward()
    unreached = [n for n, p in tiny.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unreached


def test_at_low_temperature_training_decodes_what_a_one_hot_draw_decodes_to(tiny, images):
    torch.manual_seed(3)
    output = tiny(images, 1e-4)
    torch.manual_seed(3)
    codes = F.gumbel_softmax(output.logits, tau=1e-4, hard=True, dim=1)
    expected = tiny.decode(codes.argmax(dim=1))
    torch.testing.assert_close(most_likely_images(output.mu), expected, rtol=1e-3, atol=1e-3)


def test_training_keeps_logits_and_statistics_in_fp32_under_autocast(tiny, images):
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny(images, 1.0)
    assert {t.dtype for t in output} == {torch.float32}
    rounded = output.logits.bfloat16().float()
    assert not torch.equal(output.logits, rounded)
