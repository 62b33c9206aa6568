import pytest
import torch

from beit_fast.tokenizer.codebook import CONTRAST, place_codes
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae, map_pixels
from beit_fast.tokenizer.metrics import codebook_use, count_codes

CONFIG = DvaeConfig(vocab_size=64, encoder_width=8, decoder_width=8, blocks_per_group=1)


@pytest.fixture
def images():
    """Coarse random colours, blurred: a few hundred different positions."""
    coarse = torch.rand(16, 3, 5, 5)
    return torch.nn.functional.interpolate(coarse, size=(40, 40), mode="bilinear")


def test_placed_codes_are_all_in_use_where_random_ones_are_not(images):
    dvae = Dvae(CONFIG)
    before = codebook_use(count_codes(dvae.encode(images), 64))
    place_codes(dvae, images)
    after = codebook_use(count_codes(dvae.encode(images), 64))
    assert before.perplexity < 16
    assert after.used > 0.95
    assert after.perplexity > 40


def test_a_position_gets_the_code_of_the_nearest_centre(images):
    dvae = Dvae(CONFIG)
    place_codes(dvae, images)
    features = dvae.encoder.features(map_pixels(images)).permute(0, 2, 3, 1).flatten(0, 2)
    mean = features.mean(dim=0)
    output = dvae.encoder.blocks["output"]["conv"]
    logits = dvae.encoder(map_pixels(images)).permute(0, 2, 3, 1).flatten(0, 2)
    # w = scale * centre; the scale is what makes the spread of the logits CONTRAST.
    assert logits.std(dim=1).mean().item() == pytest.approx(CONTRAST, rel=1e-3)
    directions = output.w[:, :, 0, 0]
    bias = output.b + directions @ mean  # -scale / 2 |centre|^2
    scale = -directions.square().sum(dim=1) / (2 * bias)
    torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-2, atol=0)
    nearest = torch.cdist(features - mean, directions / scale[:, None]).argmin(dim=1)
    assert (nearest == logits.argmax(dim=1)).float().mean() > 0.99


def test_the_same_images_give_the_same_codes(images):
    states = []
    for seed in (1, 2):
        torch.manual_seed(0)
        dvae = Dvae(CONFIG)
        torch.manual_seed(seed)
        place_codes(dvae, images)
        states.append(dvae.encoder.blocks["output"]["conv"].w)
    assert torch.equal(*states)


def test_images_of_one_colour_leave_finite_weights():
    dvae = Dvae(CONFIG)
    place_codes(dvae, torch.full((16, 3, 40, 40), 128, dtype=torch.uint8))
    assert all(parameter.isfinite().all() for parameter in dvae.parameters())


def test_too_few_positions_are_explained():
    with pytest.raises(ValueError, match=r"8 positions for 64 codes.*16 images"):
        place_codes(Dvae(CONFIG), torch.rand(2, 3, 16, 16))
