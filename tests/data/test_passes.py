"""Which image is which sample, against a plain enumeration of passes one after another."""

import functools
import itertools
import random

import numpy as np
import pytest

from beit_fast.data.grain import import_grain
from beit_fast.data.passes import Part, Passes, with_list
from beit_fast.data.seeds import counter_seed

SEED = 3
pytestmark = pytest.mark.promise("R1")


@functools.cache
def order_of(epoch: int, count: int) -> list[int]:
    """That of a run which never had another list: the order as it always was."""
    dataset = import_grain().MapDataset.range(count)
    shuffled = dataset.shuffle(seed=counter_seed("order", SEED) % 2**32).repeat(epoch + 1)
    return [shuffled[epoch * count + position] for position in range(count)]


def enumerated(changes: list[tuple[int, str]], counts: dict[str, int], until: int):
    """(pass, place, list) of every sample, pass after pass: each is over the last list that came
    before it begins."""
    samples, epoch = [], 0
    while len(samples) < until:
        name = [images for at, images in changes if at <= len(samples)][-1]
        samples += [(epoch, place, name) for place in order_of(epoch, counts[name])]
        epoch += 1
    return samples[:until]


def parts_of(changes: list[tuple[int, str]], counts: dict[str, int]) -> list[Part]:
    """By one resume after another."""
    (_, first), *later = changes
    parts = [Part(0, 0, counts[first], first)]
    for at, images in later:
        parts = with_list(parts, images, counts[images], at)
    return parts


def test_parts_are_the_passes_one_after_another():
    rng = random.Random(0)
    counts = {"a": 150, "b": 240, "c": 64, "d": 401}  # a shuffle of few places takes Grain long
    later_lists = set()
    for number in range(20):
        multiples = number % 2 * 150  # half of them at ends of passes
        times = sorted(rng.choices(range(0, 900, multiples or 1), k=rng.randint(1, 4)))
        changes = [(0, "a"), *((at, rng.choice("abcd")) for at in times)]
        parts = parts_of(changes, counts)
        names = [part.images for part in parts]
        passes = Passes(SEED, parts, names)
        expected = enumerated(changes, counts, 1300)
        for sample in {*range(0, 1300, 7), *(part.first for part in parts)}:
            assert passes[sample] == expected[sample]
        assert all(a != b for a, b in itertools.pairwise(names))
        later_lists.update(names[1:])
    assert later_lists == set("abcd")


def test_a_list_that_never_changes_has_the_order_it_always_had():
    passes = Passes(SEED, [Part(0, 0, 7, "a")], [range(7)])
    assert [passes[p][:2] for p in range(21)] == [(e, i) for e in range(3) for i in order_of(e, 7)]
    assert passes[10**9 * 7][0] == 10**9


def test_a_list_may_begin_at_once_with_a_pass_of_its_own():
    parts = with_list([Part(0, 0, 10, "a")], "b", 4, 13, at_once=True)
    assert parts == [Part(0, 0, 10, "a"), Part(13, 2, 4, "b")]
    parts = with_list(parts, "c", 6, 13, at_once=True)  # nothing of b was read
    assert parts == [Part(0, 0, 10, "a"), Part(13, 2, 6, "c")]
    assert with_list([Part(0, 0, 10, "a")], "b", 4, 10, at_once=True)[1] == Part(10, 1, 4, "b")


def test_passes_are_counted_over_all_parts():
    parts = parts_of([(0, "a"), (7, "b")], {"a": 5, "b": 8})
    assert parts == [Part(0, 0, 5, "a"), Part(10, 2, 8, "b")]
    assert parts[0].epochs(5) == 1.0
    assert parts[1].epochs(14) == 2.5
    assert parts[1].epochs(14, every=0.5) == 5.0
    # As it always was, to the last bit: 9 / 30 / 0.1 is less than 3.
    assert Part(0, 0, 30, "a").epochs(9, every=0.1) == 9 / (0.1 * 30)


def test_an_old_list_is_numbers_of_the_source():
    numbers = np.array([4, -1, 2])
    passes = Passes(SEED, [Part(0, 0, 3, "old"), Part(3, 1, 5, "new")], [numbers, range(5)])
    assert all(passes[p][2] is numbers for p in range(3))
    assert sorted(passes[p][1] for p in range(3, 8)) == [0, 1, 2, 3, 4]
