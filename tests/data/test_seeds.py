import random

from beit_fast.data.seeds import SampleSeed, below, counter_seed

PINNED_SEED = 1069006746458935451  # blake2b of b"view\0" and three little-endian int64


def test_seeds_are_the_same_in_every_version_and_on_every_machine():
    assert counter_seed("view", 0, 1, 2) == PINNED_SEED
    assert SampleSeed(0, 1, 2).rng("view").random() == random.Random(PINNED_SEED).random()


def test_every_counter_and_the_purpose_change_the_seed():
    seeds = {
        counter_seed(purpose, seed, epoch, index)
        for purpose in ("view", "mask")
        for seed in range(5)
        for epoch in range(5)
        for index in range(100)
    }
    assert len(seeds) == 2 * 5 * 5 * 100


def test_purpose_and_counters_do_not_run_into_one_another():
    eight_letters = int.from_bytes(b"bcdefghi", "little")  # the bytes of this counter
    assert counter_seed("a", eight_letters) != counter_seed("abcdefghi")


def test_negative_seeds_are_seeds_too():
    assert counter_seed("view", -1, 0) != counter_seed("view", 1, 0)


def test_below_gives_what_pythons_own_generator_gives():
    ours, pythons = random.Random(7), random.Random(7)
    for count in [*range(1, 260), 500, 2**31, 2**40 + 1]:
        assert below(ours, count) == pythons.randrange(count)
        assert below(ours, count) == pythons.randint(0, count - 1)
