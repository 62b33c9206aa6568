"""What a checkpoint says of its images and classes, in every layout, and what it lacks."""

import io
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data.views.centre_view import centre_view
from beit_fast.data.views.statistics import HALF_MEAN, IMAGENET_MEAN
from beit_fast.data.views.two_views import normalize
from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.tasks.evaluate.checkpoints import (
    open_classifier,
    open_weights,
    view_of,
    weights_digest,
    write_image_processor,
)
from beit_fast.tasks.evaluate.config import ClassifierConfig
from beit_fast.train.state import save_checkpoint
from beit_fast.weights.pretrained import convert, from_pretrained, save_pretrained
from beit_fast.weights.published import PUBLISHED
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier

CLASSES = list("gfedcba")
SHARED = replace(TINY_CLASSIFIER, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)


def opened(checkpoint, **fields):
    return open_classifier(ClassifierConfig(checkpoint=str(checkpoint), **fields))


def logits(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of fine-tuning; the average's head is twice the weights'."""
    folder = tmp_path_factory.mktemp("run")
    weights = tiny_classifier().state_dict()
    ema = weights | {"head.weight": 2 * weights["head.weight"]}
    settings = {"model": asdict(TINY_CLASSIFIER), "statistics": "imagenet", "classes": CLASSES}
    save_checkpoint(folder, 4, {"model": weights, "ema": ema}, settings, keep=1)
    return folder


def test_a_run_says_its_classes_and_statistics(run_folder):
    for path in (run_folder, run_folder / "checkpoints" / "step_00000004"):
        classifier = opened(path)
        assert classifier.classes == tuple(CLASSES)
        assert classifier.path.endswith("step_00000004")
        view = classifier.view
        assert (view.mean, view.crop_pct, view.origin) == (IMAGENET_MEAN, 0.875, "of the run")
        assert not classifier.model.training
        assert logits(classifier.model).equal(logits(tiny_classifier().eval()))


def test_averages_are_taken_from_runs_and_from_unilms_files(run_folder, tmp_path):
    plain, average = opened(run_folder), opened(run_folder, weights="ema")
    assert average.model.head.weight.equal(2 * plain.model.head.weight)
    state = plain.model.state_dict()
    both = {"model": state, "model_ema": state | {"head.bias": state["head.bias"] + 1}}
    torch.save(both, tmp_path / "unilm.pth")
    average = opened(tmp_path / "unilm.pth", weights="ema")
    assert average.model.head.bias.equal(state["head.bias"] + 1)


def test_where_there_is_no_average_it_says_so(run_folder, tmp_path):
    save_pretrained(tiny_classifier(), tmp_path / "hf")
    state = tiny_classifier().state_dict()
    torch.save({"model": state}, tmp_path / "unilm.pth")
    save_checkpoint(tmp_path, 1, {"model": state}, {"model": asdict(TINY_CLASSIFIER)}, keep=1)
    for path in (tmp_path / "hf", tmp_path, "beit_base_patch16_224_pt22k_ft1k"):
        with pytest.raises(ValueError, match=r"no average .*pass --weights model"):
            opened(path, weights="ema")
    with pytest.raises(ValueError, match="no 'model_ema'"):
        opened(tmp_path / "unilm.pth", weights="ema")


def test_every_layout_gives_the_same_classifier_and_the_names_it_can_hold(run_folder, tmp_path):
    wanted = logits(opened(run_folder).model)
    for to, target, names in (
        ("hf", "hf", tuple(CLASSES)),
        ("timm", "timm.safetensors", tuple(CLASSES)),
        ("unilm", "unilm.pth", tuple(CLASSES)),
        ("timm", "timm.pth", None),
    ):
        report = convert(run_folder, tmp_path / target, to=to)
        assert ("has no place for config, classes" in str(report)) == (names is None)
        classifier = opened(tmp_path / target)
        assert logits(classifier.model).equal(wanted)
        assert classifier.classes == names


def test_other_sizes_resize_positions_as_fine_tuning_does(run_folder):
    classifier = opened(run_folder, img_size=(24, 32))
    wanted = from_pretrained(run_folder, img_size=(24, 32))
    assert classifier.model.config.image_pixels == (24, 32)
    for name, tensor in wanted.state_dict().items():
        assert classifier.model.state_dict()[name].equal(tensor), name
    assert opened(run_folder, img_size=384).view.crop_pct == 1.0
    with pytest.raises(ValueError, match="20x20 pixels do not divide"):
        opened(run_folder, img_size=20)


def test_flags_change_what_the_checkpoint_says(run_folder):
    view = opened(run_folder, statistics="half", crop_pct=0.9, crop_mode="squash").view
    assert (view.mean, view.crop_pct, view.crop_mode) == (HALF_MEAN, 0.9, "squash")
    assert view.origin == "of the run, changed by flags"
    assert str(view).startswith("squashed to size, bicubic, half statistics")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_has_timms_view_and_the_hubs_name_transformers_own(name):
    entry = PUBLISHED[name]
    view = view_of(name, entry.config)
    assert (view.mean, view.std) == (entry.mean, entry.std)
    assert view.crop_pct == (entry.crop_pct or 1.0)
    if entry.hf_id is not None and entry.task == "classifier":
        view = view_of(entry.hf_id, entry.config)
        assert (view.crop_pct, view.interpolation, view.crop_mode) == (1.0, "bilinear", "squash")


def test_timms_and_transformers_folders_say_how_their_images_are_made(tmp_path):
    save_pretrained(tiny_classifier(), tmp_path)
    assert view_of(tmp_path, TINY_CLASSIFIER).origin == "nothing says otherwise"
    file = tmp_path / "preprocessor_config.json"
    mean = [0.1, 0.2, 0.3]

    def stated(**fields):
        file.write_text(json.dumps({"image_mean": mean, "image_std": mean, **fields}))
        view = view_of(tmp_path / "model.safetensors", TINY_CLASSIFIER)
        assert view.mean == view.std == tuple(mean)
        assert view.origin == "of preprocessor_config.json"
        return view.crop_pct, view.interpolation, view.crop_mode

    # microsoft/beit-base-patch16-224; BeitImageProcessor's defaults; BitImageProcessor.
    old = {"do_center_crop": False, "crop_size": 224, "size": 224, "resample": 2}
    assert stated(**old) == (1.0, "bilinear", "squash")
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    assert stated(**crop, size={"height": 256, "width": 256}) == (0.875, "bicubic", "squash")
    assert stated(**crop, size={"shortest_edge": 256}) == (0.875, "bicubic", "center")
    with pytest.raises(ValueError, match=r"interpolation of preprocessor_config\.json is None"):
        stated(resample=5)
    view = view_of(tmp_path, TINY_CLASSIFIER, interpolation="bicubic")
    assert view.origin == "of preprocessor_config.json, changed by flags"
    file.unlink()
    timm = {"mean": mean, "std": mean, "crop_pct": 0.9, "interpolation": "bicubic"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": timm}))
    view = view_of(tmp_path, TINY_CLASSIFIER)
    assert (view.mean, view.crop_pct, view.origin) == (tuple(mean), 0.9, "of config.json")
    # A file of another name may lie beside anything.
    torch.save({}, tmp_path / "mine.pth")
    assert view_of(tmp_path / "mine.pth", TINY_CLASSIFIER).origin == "nothing says otherwise"


@pytest.mark.parametrize(
    "view", [{}, {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash"}]
)
def test_transformers_makes_the_same_images_of_what_is_written_for_it(view, tmp_path):
    from transformers import AutoImageProcessor

    save_pretrained(tiny_classifier(replace(TINY_CLASSIFIER, img_size=32)), tmp_path)
    config = {"pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2], **view}}
    source = tmp_path / "source"
    convert(tmp_path, source, to="hf")
    theirs = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(theirs | config))
    wanted = view_of(source, replace(TINY_CLASSIFIER, img_size=32))
    assert write_image_processor(source, tmp_path).name == "preprocessor_config.json"
    pixels = np.random.default_rng(0).integers(0, 256, (57, 44, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.save(file, "PNG")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    got = processor(image, return_tensors="pt")["pixel_values"]
    for mine in (wanted, view_of(tmp_path, replace(TINY_CLASSIFIER, img_size=32))):
        made = centre_view(
            file.getvalue(), (32, 32), mine.crop_pct, mine.interpolation, mine.crop_mode
        )
        made = normalize(torch.from_numpy(made)[None], mine.mean, mine.std)
        torch.testing.assert_close(got, made, rtol=0, atol=1e-6)


def test_a_centre_that_transformers_cannot_cut_is_said(tmp_path, caplog):
    save_pretrained(tiny_classifier(replace(TINY_CLASSIFIER, img_size=(16, 32))), tmp_path)
    assert write_image_processor(tmp_path, tmp_path) is None
    assert "no preprocessor_config.json was written" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BeitForMaskedImageModeling(SHARED), "masked image modelling .*finetune RECIPE"),
        (lambda: Beit(SHARED), r"encoder without a classifier .*finetune RECIPE --init"),
        (
            lambda: BeitForImageClassification(replace(TINY_CLASSIFIER, num_classes=0)),
            "features and no classifier .*finetune RECIPE --init",
        ),
        (
            lambda: BeitForImageClassification(replace(TINY_CLASSIFIER, in_chans=1)),
            "takes 1 channels: images here have 3",
        ),
        (lambda: torch.nn.Linear(2, 2), "no BEiT's .*pass weights with unilm's, timm's or trans"),
    ],
)
def test_a_checkpoint_that_is_no_classifier_says_what_to_do(make, message, tmp_path):
    torch.save({"model": make().state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "weights.pth")


def test_a_path_that_is_not_there_names_what_is_read(tmp_path):
    with pytest.raises(OSError, match="a run's output, or one of"):
        opened(tmp_path / "nothing")


def test_a_digest_is_of_names_and_values(run_folder):
    first = open_weights(run_folder).state
    digest = weights_digest(first)
    assert digest == weights_digest(dict(reversed(first.items())))
    head = first["head.bias"]
    for other in (
        first | {"head.bias": head + 1},
        first | {"head.bias": head[:, None]},
        {name.replace("head", "tail"): tensor for name, tensor in first.items()},
    ):
        assert weights_digest(other) != digest
