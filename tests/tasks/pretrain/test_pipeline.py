"""What the last stage refuses is found before the first step of the first."""

import os
import shutil
import signal
from dataclasses import replace

import pytest

from beit_fast.data.sources.folder import ImageFolder
from beit_fast.recipes.tokenizer import demo_tokenizer
from beit_fast.tasks.pretrain import dvae, pipeline
from beit_fast.tasks.pretrain.dvae import DvaeTask, train_tokenizer
from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.train import preflight
from beit_fast.train.state import CheckpointError, checkpoint_paths, read_manifest
from beit_fast.train.stop import Interrupted
from task_runs import steps_of, stopped_in_step, told_in_a_read


@pytest.fixture
def two_stages(pretrain_config, image_folder):
    """`two_stages(changes of the tokenizer's, **changes of BEiT's)`: both with few steps."""

    def change(tokenizer=None, **changes):
        stage = demo_tokenizer()
        stage = replace(
            stage,
            dvae=replace(
                stage.dvae, vocab_size=32, encoder_width=8, decoder_width=8, decoder_input_width=8
            ),
            data=replace(stage.data, path="", batch_size=4, num_threads=1),
            view=replace(stage.view, size=32),
            optim=replace(stage.optim, warmup_steps=1),
            run=replace(stage.run, steps=3, device="cpu"),
        )
        for name, values in (tokenizer or {}).items():
            stage = replace(stage, **{name: replace(getattr(stage, name), **values)})
        return pretrain_config(tokenizer=None, tokenizer_training=stage, **changes)

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"warmup_steps": 100}}, "the warm-up takes 100 of 6 steps"),
        ({"data": {"path": "nowhere"}}, "nowhere does not exist"),
        ({"data": {"batch_size": 0}}, "batch_size"),
        ({"masking": {"num_masked": 100}}, "100"),
        ({"model": {"vocab_size": 64}}, "pass --model.vocab_size 32"),
        ({"views": {"token_size": (40, 40)}}, r"pass --views.token_size \[32,48\]"),
        ({"model": {"in_chans": 1}}, "pass --model.in_chans 3"),
        ({"run": {"resume": "must"}}, "holds no checkpoint and --run.resume is must"),
        ({"run": {"resume_from": 3}}, "no checkpoint to go back to"),
        ({"run": {"cuda_graph": True}}, "pass --run.cuda_graph false"),
        ({"optim": {"backend": "apex"}}, "pass --optim.backend torch"),
    ],
)
def test_it_is_found_before_the_tokenizer_is_trained(
    two_stages, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(DvaeTask, "begin_step", lambda self, step: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=message):
        run_pretraining(two_stages(**changes))
    assert not (tmp_path / "run" / "tokenizer" / "checkpoints").exists()


def test_the_shapes_of_a_step_and_a_batch_are_looked_at(two_stages, monkeypatch):
    """Whatever else is wrong: here a loss that takes no patches of this size."""
    monkeypatch.setattr(DvaeTask, "begin_step", lambda self, step: pytest.fail("a step was taken"))
    loss, seen = PretrainTask.loss, []

    def wrong(self, batch):
        seen.append({name: tuple(value.shape) for name, value in batch.items()})
        return loss(self, batch | {"patches": batch["patches"][..., 1:]})

    monkeypatch.setattr(PretrainTask, "loss", wrong)
    with pytest.raises((ValueError, RuntimeError), match=r"192|191"):
        run_pretraining(two_stages())
    shapes = {"patches": (4, 24, 192), "mask": (4, 24), "masked_index": (36,), "tokens": (36,)}
    assert seen == [shapes | {"keep": (2 * 2, 4)}]


def test_a_disk_without_room_for_the_checkpoints_is_said(two_stages, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(2**30, 2**30, 2**10)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"0\.0 GiB free and the run needs .*lower --run.keep"):
        run_pretraining(two_stages())


def test_an_output_that_cannot_be_written_is_said_at_once(two_stages, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"file/run .*: give another --run.output"):
        run_pretraining(two_stages(run={"output": str(tmp_path / "file" / "run")}))


def test_the_check_changes_nothing_of_the_run(two_stages, tmp_path, monkeypatch):
    run_pretraining(two_stages(run={"output": str(tmp_path / "checked")}))
    monkeypatch.setattr("beit_fast.tasks.pretrain.pipeline.check_run", lambda *_, **__: None)
    run_pretraining(two_stages(run={"output": str(tmp_path / "plain")}))
    digests = [
        read_manifest(checkpoint_paths(tmp_path / name)[-1])["files"]
        for name in ("checked", "plain")
    ]
    assert digests[0] == digests[1]


def test_a_finished_tokenizer_is_taken_as_it_is(two_stages, tmp_path, monkeypatch, capsys):
    run_pretraining(two_stages(run={"steps": 3}))
    file = tmp_path / "run" / "tokenizer" / "tokenizer.safetensors"
    written = file.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(dvae, "train", lambda *_, **__: pytest.fail("it is finished"))
        habits = {"cpu_threads": 2, "save_every": 7, "log_every": 9}
        without_effect = {"loss_mean": "rank"}  # of pixels, as many in every batch
        run_pretraining(two_stages({"run": habits | without_effect}, run={"steps": 4}))
    assert "its training is finished" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == written
    # More steps are trained, another rate has no effect any more, and another dVAE is refused.
    run_pretraining(two_stages({"run": {"steps": 3}, "optim": {"lr": 1e-3, "min_lr": 1e-5}}))
    assert "all 3 steps are done, what changed has no effect" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"dvae\.encoder_width was 8, is 16"):
        run_pretraining(two_stages({"dvae": {"encoder_width": 16}}))


def test_a_tokenizer_goes_on_over_other_images_by_a_flag_of_its_own(
    two_stages, image_folder, tmp_path, monkeypatch
):
    images = shutil.copytree(image_folder, tmp_path / "images")
    data = {"path": str(images)}
    monkeypatch.setattr(DvaeTask, "picture", lambda self, model, path: path.touch())
    with stopped_in_step(DvaeTask, 2):
        run_pretraining(two_stages(data=data))
    shutil.copy(images / "class_0/0.jpg", images / "class_0/00.jpg")
    with pytest.raises(CheckpointError, match=r"1 image was added \(class_0/00\.jpg\)") as refused:
        run_pretraining(two_stages(data=data))
    assert str(refused.value).endswith("--tokenizer_training.run.resume_with '[data.images]'")
    monkeypatch.setattr(PretrainTask, "picture", lambda self, model, path: path.touch())
    monkeypatch.setattr(PretrainTask, "evaluate", lambda self, model: {"loss": 1.0})
    monkeypatch.setattr(pipeline, "_summarise", lambda *_: None)
    run_pretraining(two_stages({"run": {"resume_with": ("data.images",)}}, data=data))
    assert len([*(tmp_path / "run/tokenizer/images").iterdir()]) == 2
    assert len([*(tmp_path / "run/images").iterdir()]) == 1


def test_a_tokenizer_that_beit_was_trained_with_is_not_written_over(two_stages, tmp_path):
    run_pretraining(two_stages(run={"steps": 3}))
    file = tmp_path / "run" / "tokenizer" / "tokenizer.safetensors"
    written, more = file.read_bytes(), {"run": {"steps": 5}}
    with pytest.raises(CheckpointError, match=r"--run\.resume_with '\[tokenizer\]'"):
        run_pretraining(two_stages(more, run={"steps": 4}))
    assert file.read_bytes() == written
    run_pretraining(two_stages(run={"steps": 4}))  # restored
    run_pretraining(two_stages(more, run={"steps": 5, "resume_with": ("tokenizer",)}))
    assert file.read_bytes() != written


def test_a_tokenizer_whose_checkpoints_are_gone_is_not_trained_anew(two_stages, tmp_path, capsys):
    run_pretraining(two_stages(run={"steps": 3}))
    folder = tmp_path / "run" / "tokenizer"
    written = (folder / "tokenizer.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints")  # to save room
    other = {"optim": {"lr": 1e-3, "min_lr": 1e-5}}
    assert run_pretraining(two_stages(other, run={"steps": 4})).num_steps == 4
    assert "no checkpoint is left" in capsys.readouterr().out
    assert (folder / "tokenizer.safetensors").read_bytes() == written
    # On request another one takes its place.
    run_pretraining(two_stages(other, run={"steps": 5, "resume_with": ("tokenizer",)}))
    assert (folder / "tokenizer.safetensors").read_bytes() != written


def test_a_run_of_fewer_steps_than_it_has_says_how_many_it_has(two_stages):
    run_pretraining(two_stages(run={"steps": 4}))
    assert run_pretraining(two_stages(run={"steps": 3})).num_steps == 4


def test_a_tokenizer_made_anew_of_its_checkpoint_is_the_same(two_stages, tmp_path):
    run_pretraining(two_stages(run={"steps": 3}))
    file = tmp_path / "run" / "tokenizer" / "tokenizer.safetensors"
    before = file.read_bytes()
    file.unlink()
    run_pretraining(two_stages(run={"steps": 4}))
    assert file.read_bytes() == before


@pytest.mark.parametrize("where", ["picture", "report", "between"])
def test_a_stop_between_the_stages_is_heard(two_stages, tmp_path, monkeypatch, where):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    if where == "picture":
        monkeypatch.setattr(DvaeTask, "picture", stop)
    elif where == "report":
        monkeypatch.setattr(dvae, "draw_curves", stop)
    else:

        def train_and_stop(*arguments):
            path = train_tokenizer(*arguments)
            stop()
            return path

        monkeypatch.setattr("beit_fast.tasks.pretrain.pipeline.train_tokenizer", train_and_stop)
    begin_step = PretrainTask.begin_step
    steps = []
    monkeypatch.setattr(PretrainTask, "begin_step", lambda self, step: steps.append(step))
    with pytest.raises(Interrupted) as stopped:
        run_pretraining(two_stages())
    assert stopped.value.exit_code == 143
    assert not steps
    monkeypatch.undo()
    run_pretraining(two_stages())
    assert read_manifest(checkpoint_paths(tmp_path / "run")[-1])["step"] == 6
    assert PretrainTask.begin_step is begin_step


def test_a_summary_that_fails_takes_nothing_down(two_stages, monkeypatch, caplog):
    def fails(*_, **__):
        raise ValueError("no metrics were logged")

    monkeypatch.setattr("beit_fast.tasks.pretrain.pipeline.draw_curves", fails)
    monkeypatch.setattr(dvae, "draw_curves", fails)
    run_pretraining(two_stages())
    assert "the tokenizer's report failed" in caplog.text
    assert "the summary failed" in caplog.text
    with pytest.raises(ValueError, match="no metrics"):
        run_pretraining(two_stages(run={"strict": True}))


@pytest.mark.promise("R10", "R17")
def test_a_stop_in_the_wait_for_a_read_is_heard_in_every_stage(two_stages, tmp_path):
    config = two_stages(data={"num_threads": 1})
    for number in (3, 40):  # of the first look, and of the tokenizer's codes or steps
        with told_in_a_read(ImageFolder, number):
            run_pretraining(config)
        assert not steps_of(tmp_path / "run")
    run_pretraining(config)
    assert steps_of(tmp_path / "run")[-1] == 6
