"""Pre-training end to end on tiny images: exact resume, ablations, errors that say what to do."""

import math
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from beit_fast.data.views.color_jitter import jitter_views
from beit_fast.data.views.two_views import normalize
from beit_fast.model.patch_embed import patchify
from beit_fast.tasks.pretrain import task as pretrain
from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tasks.sources import UNSEEN_BATCH
from beit_fast.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from beit_fast.train.state import CheckpointError, checkpoint_paths, load_checkpoint
from task_runs import (
    ALONE,
    TWO_RANKS,
    RefuseSyncs,
    assert_compiles_to_one_graph,
    assert_the_same_run,
    first_batch,
    first_images,
    records_of,
    stopped_in_step,
)


def task_of(config):
    return PretrainTask(config, load_tokenizer(config.tokenizer), ALONE)


@pytest.mark.promise("R1")
@pytest.mark.parametrize(
    ("stop", "data", "run"),
    [
        (3, {}, {}),  # at the end of a pass
        (4, {"num_threads": 1}, {"ema_decay": 0.9}),  # in a pass, and in a window of the log
        (5, {"batch_size": 2}, {"accumulate": 2, "log_every": 4}),
    ],
    ids=["pass-end", "averages", "accumulation"],
)
def test_a_stopped_and_resumed_run_is_bitwise_the_undisturbed_one(
    pretrain_config, tmp_path, stop, data, run
):
    """With drop path, crops, jitter and masks."""
    run_pretraining(pretrain_config(data=data, run=run | {"output": str(tmp_path / "whole")}))
    parts = pretrain_config(data=data, run=run | {"output": str(tmp_path / "parts")})
    with stopped_in_step(PretrainTask, stop):
        run_pretraining(parts)
    assert load_checkpoint(checkpoint_paths(tmp_path / "parts")[-1]).step == stop
    run_pretraining(parts)
    assert_the_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_leaves_checkpoint_curve_picture_and_metrics(pretrain_config, tmp_path, capsys):
    outcome = run_pretraining(pretrain_config())
    output = tmp_path / "run"
    said = capsys.readouterr().out
    for path in (outcome.checkpoint, output / "curve.png", output / "picture.png"):
        assert path.exists()
        assert str(path) in said
    assert "entropy of the token marginals" in said
    assert f"ln V = {math.log(32):.3f}" in said
    record = records_of(output)[-1]
    assert {"loss", "accuracy", "marginal_entropy", "lr", "grad_norm", "epoch"} <= record.keys()
    assert record["epoch"] == pytest.approx(6 * 4 / 12)
    manifest = load_checkpoint(outcome.checkpoint).manifest
    assert manifest["settings"]["model"]["embed_dim"] == 32
    assert manifest["environment"]["torch"]
    assert any(output.joinpath("tensorboard").iterdir())


def test_a_resume_follows_files_that_moved_and_refuses_another_tokenizer(
    pretrain_config, image_folder, tokenizer_file, tmp_path
):
    run_pretraining(pretrain_config())
    shutil.copytree(image_folder, tmp_path / "moved")
    shutil.copy(tokenizer_file, tmp_path / "moved.safetensors")
    moved = {"data": {"path": str(tmp_path / "moved")}, "run": {"log_every": 3}}
    run_pretraining(pretrain_config(tokenizer=str(tmp_path / "moved.safetensors"), **moved))

    other = load_tokenizer(tokenizer_file)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    save_tokenizer(other, tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer was"):
        run_pretraining(pretrain_config(tokenizer=str(tmp_path / "moved.safetensors")))
    shutil.copy(tmp_path / "moved/class_0/0.jpg", tmp_path / "moved/class_0/new.jpg")
    with pytest.raises(CheckpointError, match=r"1 image was added \(class_0/new\.jpg\)\): restore"):
        run_pretraining(pretrain_config(**moved))


def test_the_loss_starts_at_chance(pretrain_config):
    task = task_of(pretrain_config())
    assert task.evaluate(task.model)["loss"] == pytest.approx(math.log(32), rel=0.02)


def test_evaluation_and_picture_change_nothing_of_the_run(pretrain_config, tmp_path):
    task = task_of(pretrain_config())
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    task.model.train()
    task.evaluate(task.model, num_batches=1)
    task.picture(task.model, tmp_path / "picture.png")
    assert task.model.training
    assert task.counters["token_counts"].sum() == 0
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_counters_hold_the_tokens_that_were_to_be_predicted(pretrain_config):
    task = task_of(pretrain_config())
    batch = first_batch(task)
    task.loss(task.prepare(batch))
    assert task.counters["token_counts"].sum() == batch["mask"].sum()
    token_images = jitter_views(batch)["token_images"]
    tokens = task.tokenizer.encode(token_images.permute(0, 3, 1, 2)).flatten(1)
    expected = torch.bincount(tokens[batch["mask"]], minlength=32)
    assert torch.equal(task.counters["token_counts"].long(), expected)


def test_model_tokenizer_and_pictures_get_jittered_views(pretrain_config, tmp_path, monkeypatch):
    task = task_of(pretrain_config())
    task.model.eval()
    batches = task.batches(UNSEEN_BATCH)
    batch = next(batches)
    batches.close()
    jittered = jitter_views(batch)
    plain = {name: value for name, value in batch.items() if name != "jitter"}
    seen, drawn = [], []
    encode = task.tokenizer.encode
    monkeypatch.setattr(task.tokenizer, "encode", lambda x, i: seen.append(x) or encode(x, i))
    monkeypatch.setattr(pretrain, "draw_columns", lambda columns, path: drawn.append(columns))
    loss = task.loss(task.prepare(batch))[0]
    assert torch.equal(loss, task.loss(task.prepare(jittered))[0])
    assert not torch.equal(loss, task.loss(task.prepare(plain))[0])
    task.evaluate(task.model, num_batches=1)
    task.picture(task.model, tmp_path / "picture.png")
    for number, views in enumerate(seen):
        expected = (batch if number == 2 else jittered)["token_images"].permute(0, 3, 1, 2)
        assert torch.equal(views, expected)
    assert len(seen) == 5
    expected = jittered["images"].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(drawn[0]["image"], expected, rtol=0, atol=0)


def test_bf16_and_averaged_weights_train_and_draw_on_the_way(pretrain_config, tmp_path):
    run = {"precision": "bf16", "ema_decay": 0.5, "picture_every": 3, "evaluate_every": 1}
    outcome = run_pretraining(pretrain_config(run=run))
    assert (tmp_path / "run" / "picture_00000003.png").exists()
    saved = load_checkpoint(outcome.checkpoint).tensors
    assert torch.equal(saved["ema"]["lm_head.weight"], outcome.model.lm_head.weight)
    assert not torch.equal(saved["ema"]["lm_head.weight"], saved["model"]["lm_head.weight"])
    assert all(v.dtype == torch.float32 for v in saved["model"].values())
    assert all(math.isfinite(record["loss"]) for record in records_of(tmp_path / "run"))
    evaluated = [record for record in records_of(tmp_path / "run") if "test_ema_loss" in record]
    assert [record["step"] for record in evaluated] == [3]  # the pass in the middle of two


@pytest.mark.parametrize("objective", ["masked", "all", "all_unmasked"])
def test_a_training_step_never_waits_for_the_device(pretrain_config, objective):
    task = task_of(pretrain_config(objective=objective))
    batch = first_batch(task)
    task.model.train()
    with RefuseSyncs():
        loss, _ = task.loss(task.prepare(batch))
        loss.backward()
        task.report(task.counters)


@pytest.mark.parametrize("statistics", ["half", "imagenet"])
def test_the_model_gets_the_patches_of_the_normalised_images(pretrain_config, statistics):
    config = pretrain_config(statistics=statistics)
    task = task_of(config)
    batch = first_batch(task)
    images = normalize(batch["images"], *pretrain.STATISTICS[statistics])
    expected = patchify(images, config.model.patch_pixels)
    assert torch.equal(task._inputs(batch)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):  # what the product would round is rounded before
        patches, *_ = task._inputs(batch)
    assert torch.equal(patches, expected.bfloat16())


@pytest.mark.parametrize("objective", ["all", "all_unmasked"])
def test_the_ablations_predict_every_token(pretrain_config, objective):
    task = task_of(pretrain_config(objective=objective))
    batch = first_batch(task)
    _, mask, index = task._inputs(batch)
    assert sorted(index.tolist()) == list(range(4 * 24))
    assert mask.any() == (objective == "all")
    loss, _ = task.loss(task.prepare(batch))
    assert loss.isfinite()


def test_pixels_are_learnt_without_a_tokenizer(pretrain_config, tmp_path):
    config = pretrain_config(
        model={"predict": "pixels"}, tokenizer=None, optim={"lr": 5e-3}, run={"steps": 60}
    )
    before = PretrainTask(config, None, ALONE)
    untrained = before.evaluate(before.model)["loss"]
    outcome = run_pretraining(config)
    assert "marginal_entropy" not in records_of(tmp_path / "run")[-1]
    # Images of random colours: little more than their mean can be learnt.
    assert before.evaluate(outcome.model)["loss"] < 0.95 * untrained


def test_half_precision_tokens_are_nearly_those_of_full_precision(pretrain_config):
    tokens = []
    for precision in ("fp32", "fp16"):
        task = task_of(pretrain_config(tokenizer_precision=precision))
        tokens.append(task._tokens(first_batch(task)))
    assert (tokens[0] == tokens[1]).double().mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab_size": 64}}, r"32 codes .* 64: pass --model\.vocab_size 32"),
        ({"views": {"size": 32}}, r"views are 32x32 px .* 32x48: pass --views\.size \[32,48\]"),
        ({"views": {"token_size": 48}}, r"needs 32x48: pass --views\.token_size \[32,48\]"),
        ({"tokenizer": None}, "give one of --tokenizer"),
        ({"model": {"predict": "pixels"}}, "uses no tokenizer"),
        ({"data": {"path": "no/such/folder"}}, "does not exist"),
        ({"data": {"path": ""}}, r"pass --data\.path"),
        ({"masking": {"num_masked": 25, "min_block": 3}}, "has 24 patches"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(pretrain_config, changes, message):
    with pytest.raises(ValueError, match=message):
        task_of(pretrain_config(**changes))


def test_a_compiled_step_is_one_graph_and_learns_as_the_plain_one(
    pretrain_config, tmp_path, monkeypatch
):
    def train(**run):
        run_pretraining(pretrain_config(model={"drop_path_rate": 0.0}, run=run))

    assert_compiles_to_one_graph(train, tmp_path, monkeypatch)


def test_a_compiled_backward_sends_gradients_before_it_ends(pretrain_config, tmp_path):
    model = {"embed_dim": 256, "num_heads": 4, "depth": 1, "drop_path_rate": 0.0}  # 3 MiB
    config = tmp_path / "config.pkl"
    config.write_bytes(pickle.dumps(pretrain_config(model=model)))
    script = Path(__file__).with_name("compiled_ranks.py")
    command = [*TWO_RANKS, str(script), str(config), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    for rank in (0, 1):
        traces = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        split, whole = traces["split"], traces["whole"]
        # One compiled backward has all gradients at its end: nothing is sent beside it.
        assert whole["events"] == ["backward"] + ["bucket"] * whole["events"].count("bucket")
        assert split["events"][:4] == ["backward", "bucket"] * 2
        for name, gradient in split["gradients"].items():
            torch.testing.assert_close(gradient, whole["gradients"][name], rtol=1e-4, atol=1e-6)


def test_another_batch_size_is_compiled_for_itself(pretrain_config, compiled_sides):
    task = task_of(pretrain_config())
    task.compile("default")
    batch = first_batch(task)
    listed = len(batch["masked_index"]) // len(batch["mask"])
    for size in (4, 2):
        part = first_images(batch, size)
        index = batch["masked_index"][: size * listed]
        part["masked_index"] = index.where(index < part["mask"].numel(), -1)
        task.loss(task.prepare(part))
    assert len(compiled_sides) == 2
    assert all(type(side) is int for sides in compiled_sides for side in sides)


def test_fp8_is_emulated_on_a_cpu_and_learns(pretrain_config, tmp_path):
    losses = {}
    for precision in ("fp32", "fp8"):
        config = pretrain_config(run={"precision": precision, "output": str(tmp_path / precision)})
        run_pretraining(config)
        losses[precision] = [record["loss"] for record in records_of(tmp_path / precision)]
    assert losses["fp8"] != losses["fp32"]
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.02)
