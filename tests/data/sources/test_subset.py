"""A part of a source, and which parts are held out of training."""

import pytest
import torch

from beit_fast.data.sources.subset import split


def test_every_class_is_held_out_in_part_and_no_image_is_used_twice():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2])
    rows, held_out = split(labels, 0.3)
    assert labels[held_out].tolist() == [0, 0, 0, 1]
    assert sorted([*rows, *held_out]) == list(range(13))
    assert (split(labels, 0.3, seed=1)[1] != held_out).any()
    with pytest.raises(ValueError, match="one image"):
        split(torch.arange(3), 0.5)
