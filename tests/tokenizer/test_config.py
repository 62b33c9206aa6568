import math

import pytest

from beit_fast.tokenizer.config import CosineSchedule, DvaeConfig, dvae_config


@pytest.mark.parametrize("vocab_size", [1024, 2048, 4096, 8192])
def test_named_sizes_differ_in_their_codes_alone(vocab_size):
    assert dvae_config(f"dvae_{vocab_size}") == DvaeConfig(vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DvaeConfig(encoder_width=30), "encoder_width is 30.*multiple of 4"),
        (lambda: DvaeConfig(decoder_width=2), "decoder_width is 2"),
        (lambda: DvaeConfig(blocks_per_group=0), "blocks_per_group is 0"),
        (lambda: dvae_config("dvae_512"), "dvae_1024"),
    ],
    ids=["width", "decoder-width", "blocks", "name"],
)
def test_impossible_configs_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_are_half_a_cosine_and_constant_after_it():
    beta = CosineSchedule(start=0.0, end=6.6, num_steps=5_000)
    temperature = CosineSchedule(start=1.0, end=1 / 16, num_steps=150_000)
    assert (beta(0), beta(5_000), beta(10**9)) == (0, 6.6, 6.6)
    assert beta(2_500) == pytest.approx(3.3)
    assert beta(1_250) == pytest.approx(6.6 * (1 - math.cos(math.pi / 4)) / 2)
    assert (temperature(0), temperature(150_000)) == (1, 1 / 16)
    assert temperature(75_000) == pytest.approx((1 + 1 / 16) / 2)
    values = [temperature(step) for step in range(0, 160_000, 1000)]
    assert values == sorted(values, reverse=True)


def test_a_schedule_of_no_steps_is_its_end():
    assert CosineSchedule(start=1.0, end=0.5, num_steps=0)(0) == 0.5
    with pytest.raises(ValueError, match="-1"):
        CosineSchedule(start=1.0, end=0.5, num_steps=-1)
