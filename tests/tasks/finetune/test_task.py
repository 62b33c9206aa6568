"""What a step of fine-tuning is made of: mixing, labels, images held out, learning rates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from beit_fast.data.views.config import AugmentConfig
from beit_fast.data.views.two_views import normalize
from beit_fast.tasks.finetune.task import FinetuneTask
from labelled_images import PHOTOGRAPHED
from task_runs import ALONE, RefuseSyncs, first_batch

PLAIN = AugmentConfig(erase=0.0, mixup=0.0, cutmix=0.0)


def test_weights_are_learnt_by_layer(finetune_config):
    task = FinetuneTask(finetune_config(layer_decay=0.5), ALONE)
    scales = {group["name"]: group["lr_scale"] for group in task.param_groups(0.05)}
    assert scales["layer_0_decay"] == 0.125
    assert scales["layer_3_no_decay"] == 1.0


def test_the_loss_is_that_of_the_mixed_and_normalised_images(finetune_config):
    task = FinetuneTask(finetune_config(augment=AugmentConfig(erase=0.0, cutmix=0.0)), ALONE)
    task.model.eval()
    torch.nn.init.normal_(task.model.head.weight)
    batch = first_batch(task)
    images, lam = normalize(batch["images"], (0.5,) * 3, (0.5,) * 3), batch["mix_weights"][0]
    assert 0 < lam < 1
    logits = task.model(lam * images + (1 - lam) * images.flip(0))
    labels = torch.nn.functional.one_hot(task._labels[batch["sample_index"]], 3).float()
    targets = 0.9 * (lam * labels + (1 - lam) * labels.flip(0)) + 0.1 / 3
    loss, metrics = task.loss(task.prepare(batch))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))
    assert not metrics


def test_an_image_that_takes_a_bad_ones_place_brings_its_own_label(finetune_config, tmp_path):
    folder = tmp_path / "bad"
    for number, name in enumerate(PHOTOGRAPHED):
        (folder / name).mkdir(parents=True)
        for image in range(5):
            colour = tuple(200 * (channel == number) for channel in range(3))
            Image.new("RGB", (40, 40), colour).save(folder / name / f"{image}.png")
    (folder / PHOTOGRAPHED[0] / "4.png").write_bytes(b"no image")
    augment = replace(PLAIN, rand_augment=None)
    config = finetune_config(
        data={"path": str(folder), "batch_size": 15, "max_bad_share": 0.1}, augment=augment
    )
    task = FinetuneTask(config, ALONE)
    batch = task.prepare(first_batch(task))
    assert torch.equal(batch["pixels"].mean((2, 3)).argmax(1), batch["labels"])
    assert batch["labels"].bincount().tolist() == [4, 6, 5]


def test_held_out_images_are_a_share_of_each_class_and_never_trained_on(
    finetune_config, photographs
):
    config = finetune_config(data={"test": "", "held_out": 0.34}, run={"seed": 5})
    task = FinetuneTask(config, ALONE)
    test, labels = task._test
    assert labels.bincount().tolist() == [2, 2, 2]
    held_out = {test.name(index) for index in range(len(test))}
    trained_on = {task.loader.source.name(index) for index in range(task.num_images)}
    assert not held_out & trained_on
    assert held_out | trained_on == set(map(str, photographs.glob("train/*/*.png")))
    for source, truth in ((test, labels), (task.loader.source, task._labels)):
        for index, label in enumerate(truth.tolist()):
            assert Path(source.name(index)).parent.name == PHOTOGRAPHED[label]
            assert source.read(index) == Path(source.name(index)).read_bytes()
    assert test.digest() != task.loader.source.digest()
    other = FinetuneTask(replace(config, run=replace(config.run, seed=6)), ALONE)
    assert other._test[0].digest() == test.digest()  # seeds are compared on the same images
    assert 0 <= task.evaluate(task.model)["top1"] <= 1
    with pytest.raises(ValueError, match=r"and then no data\.test"):
        finetune_config(data={"held_out": 0.34})


def test_a_training_step_never_waits_for_the_device(finetune_config):
    task = FinetuneTask(finetune_config(), ALONE)
    task.model.train()
    batch = first_batch(task)
    with RefuseSyncs():
        loss, _ = task.loss(task.prepare(batch))
        loss.backward()


def test_another_batch_size_is_compiled_for_itself(finetune_config, compiled_sides):
    task = FinetuneTask(finetune_config(augment=PLAIN), ALONE)
    task.compile("default")
    batch = first_batch(task)
    for size in (5, 3):
        task.begin_step(0)
        part = {name: value[:size] for name, value in batch.items() if name != "keep"}
        task.loss(task.prepare(part | {"keep": batch["keep"][:, :size]}))
    assert len(compiled_sides) == 2
    assert all(type(side) is int for sides in compiled_sides for side in sides)


def test_evaluation_and_picture_change_nothing_of_the_run(finetune_config, tmp_path):
    task = FinetuneTask(finetune_config(), ALONE)
    task.model.train()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    state = torch.get_rng_state()
    task.evaluate(task.model)
    task.picture(task.model, tmp_path / "picture.png")
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.training
    assert all(torch.equal(v, before[n]) for n, v in task.model.state_dict().items())
