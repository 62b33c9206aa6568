import pytest

from beit_fast.data.views.config import AugmentConfig, SingleViewConfig, ViewConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "quick"}, "give reference, fast or gpu"),
        ({"size": 0}, "at least 1"),
        ({"token_size": (112, 0)}, "at least 1"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"color_jitter": 1.5}, "color_jitter is 1.5: .* at most 1"),
        ({"hflip": -0.1}, "hflip is -0.1: .* at least 0"),
        (
            {"kind": "gpu", "max_pixels": 10**9},
            "max_pixels is 1000000000, and kind gpu .* 715827882: pass",
        ),
        ({"decode": "half"}, "give full or scaled"),
        ({"kind": "reference", "decode": "scaled"}, "decode is scaled, .* or --views.kind fast"),
    ],
)
def test_two_views_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViewConfig(**options)


def test_a_view_that_does_not_split_into_the_grid_is_refused_with_a_size_that_does():
    ViewConfig(size=(224, 320), token_size=(112, 160)).check_grid((14, 20))
    with pytest.raises(
        ValueError, match=r"size=230x230 px does not split .* 14x14 .* take 224x224"
    ):
        ViewConfig(size=230).check_grid((14, 14))
    with pytest.raises(
        ValueError, match=r"token_size=100x100 px .* take 98x98 .--views.token_size"
    ):
        ViewConfig(token_size=100).check_grid((14, 14))


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"scale": (0.0, 1.0)}, {"scale": (0.9, 0.1)}, {"hflip": 2.0}], ids=str
)
def test_a_tokenizers_view_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SingleViewConfig(**options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rand_augment": 11.0}, "at least 0 and at most 10, or null"),
        ({"erase": 1.5}, "erase is 1.5: give a finite number, at least 0 and at most 1"),
        ({"label_smoothing": 1.0}, "at least 0 and below 1"),
        ({"mixup": -0.1}, "mixup is -0.1: give a finite number, at least 0"),
    ],
)
def test_augmentation_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**fields)
