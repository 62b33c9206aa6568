"""Which output of a classifier a folder of images belongs to."""

import pytest

from beit_fast.tasks.evaluate.classes import describe_class, match_classes, wordnet_ids


def test_names_are_matched_whatever_the_order():
    labels, names, how = match_classes(["a", "b", "c"], ["c", "a", "b"], 3)
    assert labels == [1, 2, 0]
    assert names == ["c", "a", "b"]
    assert "by name" in how
    assert "order is not" in how


def test_classes_without_a_folder_are_named():
    labels, _, how = match_classes(["b"], [*"abcdefgh"], 8)
    assert labels == [1]
    assert "7 of 8 classes have no folder: a, c, d, e, f and 2 more" in how


def test_a_folder_of_no_class_is_named_with_what_to_do():
    with pytest.raises(ValueError, match=r"1 of 2 class folders .*: x; its 2 classes are a, b: re"):
        match_classes(["b", "x"], ["a", "b"], 2)
    labels, names, how = match_classes(["b", "x"], ["a", "b"], 2, by_order=True)
    assert (labels, names, how) == ([0, 1], ["b", "x"], "the sorted folders are the classes")


def test_a_name_of_two_classes_is_refused():
    with pytest.raises(ValueError, match="crane is the name of several classes"):
        match_classes(["crane"], ["crane", "tench", "crane"], 3)


def test_without_names_the_sorted_folders_are_the_classes_if_they_are_as_many():
    assert match_classes(["a", "b"], None, 2)[0] == [0, 1]
    with pytest.raises(
        ValueError, match=r"2 class folders .* 3 classes and says no names .*finetu"
    ):
        match_classes(["a", "b"], None, 3)
    with pytest.raises(ValueError, match="2 class folders and the checkpoint has 3 classes: give"):
        match_classes(["a", "b"], ["a", "b", "c"], 3, by_order=True)


@pytest.mark.parametrize("names", [None, [f"class in prose {i}" for i in range(1000)]])
def test_wordnet_folders_meet_a_head_of_imagenets_size_by_their_ids(names):
    """Also some of them alone, as subsets of ImageNet have."""
    labels, classes, _ = match_classes(["n01443537", "n02123045"], names, 1000)
    assert labels == [1, 281]
    assert classes[281] == "n02123045"
    with pytest.raises(ValueError, match="n99999999"):
        match_classes(["n01443537", "n99999999"], names, 1000)


def test_imagenets_ids_are_sorted_and_have_words():
    for count in (1000, 21841):
        assert list(wordnet_ids(count)) == sorted(wordnet_ids(count))
        assert len(wordnet_ids(count)) == count
        assert describe_class("n02123045", count) == "tabby, tabby cat"
    assert wordnet_ids(10) is None
    assert describe_class("n02123045", 10) == "n02123045"
    assert describe_class("red", 1000) == "red"
