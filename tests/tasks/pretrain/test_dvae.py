"""Training a tokenizer end to end on tiny images: what it leaves, resume, collapse."""

import functools

import pytest
import torch
from PIL import Image

from beit_fast.data.config import DataConfig
from beit_fast.data.views.config import SingleViewConfig
from beit_fast.tasks.pretrain.config import DvaeTrainingConfig
from beit_fast.tasks.pretrain.dvae import DvaeTask, run_dvae
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.tokenizer.config import CosineSchedule, DvaeConfig
from beit_fast.tokenizer.metrics import codebook_use
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.optim import build_optimizer, lr_at
from beit_fast.train.state import checkpoint_paths, load_checkpoint
from task_runs import (
    ALONE,
    RefuseSyncs,
    assert_the_same_run,
    first_batch,
    records_of,
    stopped_in_step,
    with_fields,
)


@pytest.fixture
def config(image_folder, tmp_path):
    """`config(field=value, section={field: value})` changes the tiny configuration."""
    base = DvaeTrainingConfig(
        dvae=DvaeConfig(
            vocab_size=32,
            encoder_width=8,
            decoder_width=8,
            decoder_input_width=16,
            blocks_per_group=1,
        ),
        data=DataConfig(path=str(image_folder), batch_size=8, num_threads=2),
        view=SingleViewConfig(size=32, scale=(0.5, 1.0)),
        optim=OptimConfig(lr=3e-3, min_lr=3e-5, warmup_steps=2, clip_grad=1.0),
        run=RunConfig(
            output=str(tmp_path / "run"), steps=6, precision="fp32", device="cpu", log_every=2
        ),
        beta=CosineSchedule(start=0.0, end=6.6, num_steps=10),
        temperature=CosineSchedule(start=1.0, end=1 / 16, num_steps=30),
    )

    return functools.partial(with_fields, base)


def test_a_run_leaves_a_tokenizer_a_curve_a_picture_and_metrics(config, tmp_path, capsys):
    path = run_dvae(config())
    output = tmp_path / "run"
    said = capsys.readouterr().out
    tokenizer = load_tokenizer(path)
    assert tokenizer.config == config().dvae
    trained = load_checkpoint(checkpoint_paths(output)[-1]).tensors["model"]
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    for name in ("tokenizer.safetensors", "curve.png", "picture.png"):
        assert str(output / name) in said
        assert (output / name).exists()
    with Image.open(output / "picture.png") as picture:
        assert picture.height > 2 * picture.width  # eight rows: image, tokens
    record = records_of(output)[-1]
    assert {"loss", "mae", "mse", "kl", "codes_used", "perplexity", "lr"} <= record.keys()
    assert "of 32 codes used in 1024 positions" in said  # 8 batches x 8 images x 16


def test_training_lowers_the_error_and_keeps_the_codebook_in_use(config, tmp_path):
    """The demo in small: k-means codes, a slow encoder, and DALL-E's weight of the KL term."""
    run_dvae(
        config(
            dvae={"encoder_width": 16, "decoder_width": 16},
            optim={"lr": 1e-2, "min_lr": 1e-4},
            run={"steps": 60},
            codebook_init="kmeans",
            encoder_lr_scale=0.01,
        )
    )
    records = records_of(tmp_path / "run")
    start, end = records[0], {k: sum(r[k] for r in records[-5:]) / 5 for k in records[0]}
    assert end["mae"] < 0.85 * start["mae"]
    assert end["loss"] < start["loss"] - 0.1
    assert end["codes_used"] > 0.7
    assert end["perplexity"] > 15


def test_a_collapsed_codebook_is_reported(config, capsys):
    """256 codes from random weights and a rate far too high: the run must not hide what came."""
    run_dvae(config(dvae={"vocab_size": 256}, optim={"lr": 0.05, "min_lr": 0.05}))
    assert "COLLAPSED" in capsys.readouterr().out


@pytest.mark.promise("R1")
def test_a_stopped_and_resumed_run_is_bitwise_the_undisturbed_one(config, tmp_path):
    changes = {"codebook_init": "kmeans", "encoder_lr_scale": 0.1}
    averaged = {"ema_decay": 0.9}
    run_dvae(config(**changes, run=averaged | {"output": str(tmp_path / "whole")}))
    parts = config(**changes, run=averaged | {"output": str(tmp_path / "parts")})
    with stopped_in_step(DvaeTask, 3):
        run_dvae(parts)
    run_dvae(parts)
    whole = load_checkpoint(checkpoint_paths(tmp_path / "whole")[-1])
    assert {"model", "ema", "optimizer"} <= whole.tensors.keys()
    assert_the_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_averaged_weights_are_what_is_saved(config, tmp_path):
    tokenizer = load_tokenizer(run_dvae(config(run={"ema_decay": 0.9})))
    saved = load_checkpoint(checkpoint_paths(tmp_path / "run")[-1]).tensors
    name = "decoder.blocks.output.conv.w"
    assert torch.equal(tokenizer.state_dict()[name], saved["ema"][name])
    assert not torch.equal(tokenizer.state_dict()[name], saved["model"][name])


def test_the_schedules_of_beta_and_temperature_reach_the_loss(config):
    task = DvaeTask(config(), ALONE)
    batch = first_batch(task)

    def loss_at(step):
        torch.manual_seed(0)
        task.begin_step(step)
        return task.loss(batch)

    total, metrics = loss_at(0)
    torch.testing.assert_close(total, metrics["nats_per_value"])  # beta is 0
    total, metrics = loss_at(10)
    expected = metrics["nats_per_value"] + 6.6 / 192 * metrics["kl"]
    torch.testing.assert_close(total, expected)
    reconstructions = [loss_at(step)[1]["nats_per_value"] for step in (10, 30, 40)]
    assert reconstructions[0] != reconstructions[1]  # the temperature fell
    assert reconstructions[1] == reconstructions[2]  # and stays where its schedule ends


def test_codes_start_as_clusters_of_the_images(config):
    batch = first_batch(DvaeTask(config(), ALONE))
    used = {}
    for start in ("random", "kmeans"):
        task = DvaeTask(config(codebook_init=start), ALONE)
        task.to(torch.device("cpu"))
        used[start] = task.loss(batch)[1]["codes_used"].item()
    assert used["random"] < 0.5
    assert used["kmeans"] > 0.8


def test_the_encoder_learns_at_its_own_rate(config, tmp_path):
    changed = config(encoder_lr_scale=0.03)
    task = DvaeTask(changed, ALONE)
    optimizer = build_optimizer(task.param_groups(0.1), changed.optim, torch.device("cpu"))
    encoder, decoder = optimizer.param_groups
    assert {id(p) for p in encoder["params"]} == {id(p) for p in task.model.encoder.parameters()}
    assert {id(p) for p in decoder["params"]} == {id(p) for p in task.model.decoder.parameters()}
    assert encoder["weight_decay"] == decoder["weight_decay"] == 0.1
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    run_dvae(config(encoder_lr_scale=1e-6, run={"steps": 3}))
    saved = load_checkpoint(checkpoint_paths(tmp_path / "run")[-1]).tensors["model"]
    moved = {
        half: max(
            float((saved[name] - before[name]).abs().max())
            for name in before
            if name.startswith(half)
        )
        for half in ("encoder", "decoder")
    }
    assert moved["encoder"] < 1e-5 < 1e-3 < moved["decoder"]


def test_a_training_step_never_waits_for_the_device(config):
    task = DvaeTask(config(), ALONE)
    batch = first_batch(task)
    with RefuseSyncs():
        task.begin_step(3)
        loss, _ = task.loss(task.prepare(batch))
        loss.backward()


def test_evaluation_is_on_discrete_codes_and_changes_nothing(config):
    task = DvaeTask(config(), ALONE)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    error, counts = task.reconstruct(task.model, num_batches=2)
    assert counts.sum() == 2 * 8 * 16
    assert codebook_use(counts).perplexity >= 1
    assert 0 < error.mse < error.mae < 1
    assert task.reconstruct(task.model, num_batches=2)[0] == error
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_dalles_own_schedules_are_the_defaults():
    config = DvaeTrainingConfig(
        data=DataConfig(path="images"),
        optim=OptimConfig(
            lr=1e-4, min_lr=1.25e-6, warmup_steps=0, decay_steps=1_200_000, weight_decay=1e-4
        ),
        run=RunConfig(output="run", steps=3_000_000),
    )
    assert (config.beta(0), config.beta(5_000)) == (0, 6.6)
    assert (config.temperature(0), config.temperature(150_000)) == (1, 1 / 16)
    rates = [lr_at(step, config.optim, 3_000_000, 0) for step in (0, 600_000, 1_200_000, 2_999_999)]
    assert rates == pytest.approx([1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6])
    assert config.codebook_init == "random"
    assert config.encoder_lr_scale == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view": {"size": 36}}, "view.size is 36 px.*multiple of 8"),
        ({"encoder_lr_scale": 0.0}, "encoder_lr_scale is 0.0"),
        ({"run": {"precision": "fp8"}}, "precision is fp8, which convolutions do not have"),
        (
            {"temperature": CosineSchedule(start=1.0, end=0.0, num_steps=1)},
            r"--temperature\.end is 0\.0: .* above 0",
        ),
    ],
    ids=["size", "scale", "fp8", "temperature"],
)
def test_impossible_configurations_are_explained(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_compiled_step_is_one_graph_with_the_plain_ones_loss(config, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    task = DvaeTask(config(), ALONE)
    batch = first_batch(task)
    totals = []
    for compiled in (False, True):
        if compiled:
            task.compile("default")
        torch.manual_seed(0)
        task.begin_step(20)
        totals.append(task.loss(task.prepare(batch))[0])
    torch.testing.assert_close(totals[1], totals[0])


def test_another_batch_size_is_compiled_for_itself(config, compiled_sides):
    task = DvaeTask(config(), ALONE)
    task.compile("default")
    batch = first_batch(task)
    for size in (8, 4):
        task.begin_step(0)
        task.loss(task.prepare({name: value[:size] for name, value in batch.items()}))
    assert len(compiled_sides) == 2
    assert all(type(side) is int for sides in compiled_sides for side in sides)
