"""Labelled images, and a run whose classifier knows their classes."""

from dataclasses import asdict, replace

import pytest

from beit_fast.train.state import save_checkpoint
from labelled_images import FOUR_COLOURS, write_class_folders
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("labelled") / "test", 5, seed=0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Knows four colours, in an order that is not that of the folders; one has no folder."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_classifier(replace(TINY_CLASSIFIER, num_classes=4))
    settings = {"model": asdict(model.config), "statistics": "half", "classes": FOUR_COLOURS}
    save_checkpoint(folder, 4, {"model": model.state_dict()}, settings, keep=1)
    return folder
