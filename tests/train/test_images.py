"""Which images a run has had: in its manifests and in its folder, by way of the toy."""

import json

import pytest

from beit_fast.data.run_images import RunImages
from beit_fast.train.images import count_of
from beit_fast.train.state import MANIFEST, CheckpointError, checkpoint_paths, read_manifest
from loaded import Numbers
from toy import ToyTask


def of_images(count: int) -> ToyTask:
    task = ToyTask()
    task.num_images, task.images = count, RunImages(Numbers(count))
    return task


def edit(output, change) -> None:
    """The newest manifest, as no run writes it."""
    path = checkpoint_paths(output)[-1] / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["format"] = 1  # which has no digest of itself
    path.write_text(json.dumps(manifest))


def test_a_run_keeps_its_list_and_says_it_in_every_manifest(tmp_path, run_toy):
    run_toy(tmp_path, save_every=4, keep=9)
    (kept,) = (tmp_path / "images").iterdir()
    digest = of_images(20).images.digest
    assert kept.name == f"{digest}.txt.gz"
    for path in checkpoint_paths(tmp_path):
        manifest = read_manifest(path)
        assert manifest["images"] == [{"first": 0, "epoch": 0, "count": 20, "images": digest}]
        assert manifest["settings"]["data"]["images"] == digest


def test_a_run_that_goes_back_has_the_images_of_then(tmp_path, run_toy):
    run_toy(tmp_path, steps=6, save_every=2, keep=9)  # 48 samples: 2.4 passes
    accepted = {"resume_with": ("data.images",)}
    run_toy(tmp_path, of_images(24), steps=12, save_every=2, keep=9, **accepted)
    parts = read_manifest(checkpoint_paths(tmp_path)[-1])["images"]
    assert [(part["first"], part["epoch"]) for part in parts] == [(0, 0), (60, 3)]
    run_toy(tmp_path, steps=12, save_every=2, keep=9, resume_from=4)
    (part,) = read_manifest(checkpoint_paths(tmp_path)[-1])["images"]
    assert part["count"] == 20


def test_a_run_of_a_version_without_lists_goes_on(tmp_path, run_toy):
    def older(manifest):
        del manifest["images"], manifest["settings"]["data"]

    run_toy(tmp_path, steps=6)
    edit(tmp_path, older)
    (kept,) = (tmp_path / "images").iterdir()
    kept.unlink()
    with pytest.raises(
        CheckpointError, match=r"\(run\.num_images was 20, is 24\): restore the folder"
    ):
        run_toy(tmp_path, of_images(24))
    run_toy(tmp_path, steps=8)
    assert kept.exists()
    assert read_manifest(checkpoint_paths(tmp_path)[-1])["images"][0]["images"]

    edit(tmp_path, older)
    run_toy(tmp_path, of_images(19))  # a few removed need no word
    parts = read_manifest(checkpoint_paths(tmp_path)[-1])["images"]
    assert [(part["first"], part["epoch"], part["count"]) for part in parts] == [
        (0, 0, 20), (64, 4, 19),
    ]  # fmt: skip


def test_parts_that_are_none_are_named_and_the_run_goes_back_before_them(tmp_path, run_toy):
    run_toy(tmp_path, steps=6, save_every=3)
    edit(tmp_path, lambda manifest: manifest.update(images=[{"first": 0}]))
    with pytest.raises(CheckpointError, match="images by pass are damaged") as refused:
        run_toy(tmp_path)
    assert str(checkpoint_paths(tmp_path)[-1] / MANIFEST) in str(refused.value)
    assert "--run.resume_from with the step of another checkpoint" in str(refused.value)
    _, outcome = run_toy(tmp_path, resume_from=3)
    assert outcome.num_steps == 12


def test_a_manifest_that_says_no_number_has_none():
    assert count_of({"run": {"num_images": 5}}) == 5
    assert count_of({"run": {"num_images": "5"}}) == count_of({"run": 3}) == count_of({}) == 0
