"""A fine-tuning goes on over a folder that changed: labels are those of the images really read."""

import re
import shutil

import pytest

from beit_fast.tasks.finetune.task import FinetuneTask, run_finetuning
from beit_fast.train.state import CheckpointError
from labelled_images import PHOTOGRAPHED
from task_runs import ALONE, stopped_in_step, take_batches


@pytest.fixture
def images(photographs, tmp_path):
    return shutil.copytree(photographs / "train", tmp_path / "images")


def change(folder) -> None:
    """A first image of the first class, two of the last, and one of the second is gone."""
    first, second, third = (folder / name for name in PHOTOGRAPHED)
    shutil.copy(first / "2.png", first / "0.png")
    shutil.copy(third / "3.png", third / "8.png")
    shutil.copy(third / "4.png", third / "9.png")
    (second / "5.png").unlink()


def test_labels_are_those_of_the_images_read_in_the_old_pass_and_in_the_new(
    finetune_config, images, tmp_path
):
    config = finetune_config(data={"path": str(images)})
    before = FinetuneTask(config, ALONE).images
    before.keep(tmp_path / "lists")
    change(images)
    task = FinetuneTask(config, ALONE)
    parts = task.images.go_on(before.begin(), 10, tmp_path / "lists")  # 10 of 18 are read
    assert [part["count"] for part in parts] == [18, 20]
    source, read = task.loader.source, []
    for batch in take_batches(task, 6, 2):
        labels = task.prepare(batch)["labels"].tolist()
        names = [source.key(number) for number in batch["sample_index"].tolist()]
        assert labels == [PHOTOGRAPHED.index(name.split("/")[0]) for name in names]
        read += names
    assert not {f"{PHOTOGRAPHED[0]}/0.png", f"{PHOTOGRAPHED[2]}/9.png"} & {*read[:8]}
    assert sorted(read[8:28]) == [source.key(number) for number in range(20)]


def test_what_is_held_out_changes_with_the_folder_and_that_is_said(
    finetune_config, images, tmp_path
):
    data = {"path": str(images), "test": "", "held_out": 0.4}
    with stopped_in_step(FinetuneTask, 2):
        run_finetuning(finetune_config(data=data))
    change(images)
    with pytest.raises(CheckpointError) as refused:
        run_finetuning(finetune_config(data=data))
    said = str(refused.value)
    assert re.search(r"\(data\.images: \d+ images? w\w+ added .* gone \(.*\)\): restore", said)
    assert "--data.held_out then holds out other images, some of which were trained on" in said
    assert said.endswith("--run.resume_with '[data.images]'")
    run_finetuning(finetune_config(data=data, run={"resume_with": ("data.images",)}))
