"""The digits: what is in which part, and where they are taken for a folder."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from beit_fast.cli import main
from beit_fast.data.sources import digits as digits_module
from beit_fast.data.sources.decode import decode_pillow
from beit_fast.data.sources.digits import Digits, write_digits
from beit_fast.data.sources.opening import labelled_images
from beit_fast.tasks.sources import open_source

SIZES = {"train": 997, "valid": 300, "test": 500}


def test_parts_are_even_in_the_classes_and_share_no_image():
    names = []
    for part, size in SIZES.items():
        source = Digits(f"digits:{part}")
        counts = torch.bincount(source.labels, minlength=10)
        assert len(source) == len(source.labels) == size
        assert int(counts.max() - counts.min()) <= 5
        names += [source.name(index) for index in range(size)]
    assert len(set(names)) == len(names) == 1797
    # No image under two names either: one that is learnt from would be counted.
    assert len(np.unique(load_digits().data, axis=0)) == 1797


def test_an_image_is_scikit_learns_enlarged():
    source, original = Digits("digits:valid"), load_digits()
    for index in (0, 299):
        row = int(source.name(index).split("/")[-1].removesuffix(".png"))
        assert source.labels[index] == original.target[row]
        image = decode_pillow(source.read(index)).resize((8, 8), Image.Resampling.BOX)
        levels = np.asarray(image)[..., 0] / 255 * 16
        assert np.abs(levels - original.images).mean((1, 2)).argmin() == row


def test_a_few_of_each_class_are_drawn_from_a_part_by_their_seed():
    draws = [Digits(f"digits:train:10{seed}") for seed in ("", ":0", ":1")]
    names = [{draw.name(index) for index in range(len(draw))} for draw in draws]
    train = Digits("digits:train")
    everything = {train.name(index) for index in range(len(train))}
    assert all(torch.bincount(draw.labels).tolist() == [10] * 10 for draw in draws)
    assert all(len(drawn) == 100 and drawn <= everything for drawn in names)
    assert names[0] == names[1] != names[2]
    assert draws[0].digest() == draws[1].digest() != draws[2].digest()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits:tests", "names no digits: take digits:train"),
        ("digits:train:ten", "names no digits"),
        ("digits:valid:30", "a class has 29 images there: ask for 1 to 29"),
        ("digits:train:0", "ask for 1 to 97"),
    ],
)
def test_a_name_of_no_digits_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        open_source(name)


def test_they_stand_for_a_folder_where_one_is_named(tmp_path):
    source, labels, names = labelled_images("digits:test")
    write_digits(tmp_path)
    written, same_labels, same_names = labelled_images(tmp_path / "test")
    assert names == same_names == [str(digit) for digit in range(10)]
    assert sorted(labels.tolist()) == same_labels.tolist()
    read = {source.read(index) for index in range(500)}
    assert read == {written.read(index) for index in range(500)}
    (tmp_path / "digits").mkdir()
    with pytest.raises(ValueError, match="no images"):
        open_source(str(tmp_path / "digits"))  # a folder, whatever it is called


def test_without_scikit_learn_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits_module._load.cache_clear()
    assert main(["tokenizer", "digits"]) == 1
    assert 'pip install scikit-learn, or the extra, pip install -e ".[test]"' in (
        capsys.readouterr().err
    )
