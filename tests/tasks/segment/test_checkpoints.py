"""What a checkpoint says of classes, colours, statistics and the window, and what it lacks."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.cli import VERBS, WITHOUT_RECIPE, main
from beit_fast.data.sources import ade20k
from beit_fast.data.views.statistics import STATISTICS
from beit_fast.data.views.two_views import normalize
from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.tasks.evaluate.checkpoints import open_classifier
from beit_fast.tasks.evaluate.config import ClassifierConfig
from beit_fast.tasks.segment.checkpoints import open_segmenter
from beit_fast.tasks.segment.config_evaluation import SegmenterSourceConfig, SlideConfig
from beit_fast.weights.convert import convert
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier
from tiny_segmenter import save_run, tiny_segmenter

CLASSES, PALETTE = ("ground", "red", "blue"), ((9, 9, 9), (255, 0, 0), (0, 0, 255))
SETTINGS = {
    "statistics": "half",
    "classes": CLASSES,
    "palette": PALETTE,
    "evaluation": asdict(SlideConfig(stride=(16, 20), scale=(64, 48), flip=True)),
}


def opened(checkpoint, **fields):
    return open_segmenter(SegmenterSourceConfig(checkpoint=str(checkpoint), **fields))


def scores(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 32 * 40).view(1, 3, 32, 40))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), tiny_segmenter(), **SETTINGS)


def test_a_run_says_classes_colours_statistics_and_window(run_folder):
    for path in (run_folder, run_folder / "checkpoints" / "step_00000004"):
        segmenter = opened(path)
        assert (segmenter.classes, segmenter.names, segmenter.palette) == (
            CLASSES,
            CLASSES,
            PALETTE,
        )
        assert segmenter.statistics == STATISTICS["half"]
        # Mirrors and scales are asked for, as the time that they take.
        assert segmenter.slide == SlideConfig(stride=(16, 20), scale=(64, 48))
        assert segmenter.path.endswith("step_00000004")
        assert not segmenter.model.training
        assert scores(segmenter.model).equal(scores(tiny_segmenter()))


def test_flags_change_what_the_checkpoint_says(run_folder):
    segmenter = opened(
        run_folder,
        statistics="imagenet",
        stride=8,
        scale=(96, 32),
        multi_scale=(0.5, 1),
        flip=True,
        windows_at_once=3,
    )
    assert segmenter.statistics == STATISTICS["imagenet"]
    assert segmenter.slide == SlideConfig(
        stride=8, scale=(96, 32), multi_scale=(0.5, 1), flip=True, windows_at_once=3
    )
    biases = [
        opened(run_folder, weights=which).model.decode_head.conv_seg.bias.detach()
        for which in ("model", "ema")
    ]
    assert (biases[1] - biases[0]).tolist() == [9, 0, 0]


def test_another_window_resizes_positions_and_has_the_usual_stride(run_folder):
    segmenter = opened(run_folder, img_size=(48, 32))
    assert segmenter.model.config.image_pixels == (48, 32)
    assert segmenter.slide == SlideConfig()
    assert segmenter.model(torch.zeros(1, 3, 48, 32)).shape == (1, 3, 48, 32)
    with pytest.raises(ValueError, match="stride is 33 and the window 48x32"):
        opened(run_folder, img_size=(48, 32), stride=33)


@pytest.mark.parametrize(
    ("to", "target"), [("hf", "hf"), ("unilm", "x.pth"), ("unilm", "x.safetensors")]
)
def test_every_layout_gives_the_same_segmenter(run_folder, to, target, tmp_path):
    convert(run_folder, tmp_path / target, to=to)
    segmenter = opened(tmp_path / target)
    assert scores(segmenter.model).equal(scores(tiny_segmenter()))
    assert segmenter.classes == CLASSES
    assert segmenter.statistics == STATISTICS["half"]
    assert segmenter.slide == SlideConfig()


def test_what_says_nothing_has_imagenets_statistics_and_numbers_for_names(tmp_path):
    state = {f"backbone.{name}": t for name, t in tiny_segmenter(img_size=32).state_dict().items()}
    state = {name.replace("backbone.decode", "decode"): t for name, t in state.items()}
    state = {name.replace("backbone.auxil", "auxil"): t for name, t in state.items()}
    torch.save({"state_dict": state}, tmp_path / "mine.pth")
    segmenter = opened(tmp_path / "mine.pth", num_heads=2)
    assert segmenter.statistics == STATISTICS["imagenet"]
    assert (segmenter.classes, segmenter.palette) == (None, None)
    assert segmenter.names == ("class 0", "class 1", "class 2")


def test_transformers_is_told_to_squash_images_to_the_window(tmp_path):
    from transformers import AutoImageProcessor

    torch.save({"state_dict": tiny_segmenter(img_size=32).state_dict()}, tmp_path / "mine.pth")
    command = ["convert", tmp_path / "mine.pth", tmp_path / "hf", "--to", "hf"]
    assert main([*map(str, command)]) == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    wanted = normalize(torch.from_numpy(image)[None], *STATISTICS["imagenet"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    wide = processor(Image.new("RGB", (90, 40), (255, 0, 0)), return_tensors="pt")["pixel_values"]
    assert wide.shape == (1, 3, 32, 32)
    assert opened(tmp_path / "hf").statistics == STATISTICS["imagenet"]


def test_a_file_under_a_published_name_has_ade20ks_classes(tmp_path):
    path = tmp_path / "beit_base_patch16_640_pt22k_ft22ktoade20k.pth"
    torch.save({"state_dict": tiny_segmenter(img_size=32, num_classes=150).state_dict()}, path)
    segmenter = opened(path)
    assert (segmenter.classes, segmenter.palette) == (ade20k.CLASSES, ade20k.PALETTE)
    torch.save({"state_dict": tiny_segmenter(img_size=32).state_dict()}, path)
    assert opened(path).classes is None  # it has three


SHARED = replace(TINY_CLASSIFIER, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BeitForMaskedImageModeling(SHARED), "checkpoint of masked image modelling"),
        (tiny_classifier, "classifies images, not pixels"),
        (lambda: Beit(SHARED), "encoder without a head"),
        (
            lambda: BeitForImageClassification(replace(TINY_CLASSIFIER, num_classes=0)),
            "features and no head for pixels",
        ),
    ],
)
def test_a_checkpoint_that_is_no_segmenter_says_what_to_do(make, message, tmp_path):
    torch.save({"model": make().state_dict()}, tmp_path / "w.pth")
    remedy = r".*`beit-fast segment RECIPE --init .*w\.pth`"
    with pytest.raises(ValueError, match=message + remedy):
        opened(tmp_path / "w.pth")
    assert "segment" in VERBS


def test_a_segmenter_given_to_evaluate_or_predict_names_the_verbs_for_it(run_folder):
    with pytest.raises(ValueError, match="classifies pixels, not images") as raised:
        open_classifier(ClassifierConfig(checkpoint=str(run_folder)))
    for verb in ("evaluate-segmentation", "predict-segmentation"):
        assert verb in str(raised.value)
        assert verb in WITHOUT_RECIPE


def test_channels_that_images_do_not_have_are_said(tmp_path):
    state = tiny_segmenter(img_size=32, in_chans=1).state_dict()
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="takes 1 channels: images here have 3"):
        opened(tmp_path / "w.pth")


def test_a_window_that_a_run_says_wrongly_is_named(tmp_path):
    said = {"evaluation": {"stride": -1}}
    save_run(tmp_path, tiny_segmenter(), **said)
    with pytest.raises(ValueError, match=r"its evaluation\.stride is -1"):
        opened(tmp_path)
