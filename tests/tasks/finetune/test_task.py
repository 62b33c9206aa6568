"""Fine-tuning end to end on crops of photographs: exact resume, mixing, labels, errors."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import beit_fast.data
from beit_fast import BeitForImageClassification, BeitForMaskedImageModeling, from_pretrained
from beit_fast.cli import main
from beit_fast.data.views.config import AugmentConfig
from beit_fast.data.views.two_views import normalize
from beit_fast.model.config import BeitConfig
from beit_fast.tasks import check_images
from beit_fast.tasks.finetune.config import FinetuneConfig, LabelledDataConfig
from beit_fast.tasks.finetune.task import FinetuneTask, run_finetuning
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.log import read_metrics
from beit_fast.train.parallel import World
from beit_fast.train.state import CheckpointError, checkpoint_paths, load_checkpoint
from beit_fast.train.stop import Interrupted
from beit_fast.weights.pretrained import convert
from beit_fast.weights.read import read_checkpoint

ALONE = World(0, 1, torch.device("cpu"))
CLASSES = ["bee", "galaxies", "lemurs"]
PLAIN = AugmentConfig(erase=0.0, mixup=0.0, cutmix=0.0)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Crops of three photographs: six of each to train on, two to test on."""
    folder = tmp_path_factory.mktemp("classes")
    for name in CLASSES:
        image = Image.open(Path(beit_fast.data.__file__).parent / "photographs" / f"{name}.jpg")
        for number in range(8):
            path = folder / ("test" if number < 2 else "train") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            left, top = 20 * number, 10 * number
            image.crop((left, top, left + 90, top + 80)).resize((45, 40)).save(path)
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """An untrained BEiT as pre-training leaves it."""
    torch.manual_seed(0)
    config = BeitConfig(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, vocab_size=16
    )
    path = tmp_path_factory.mktemp("pretrained") / "beit.pth"
    torch.save({"model": BeitForMaskedImageModeling(config).state_dict()}, path)
    return str(path)


@pytest.fixture
def finetune_config(photographs, pretrained, tmp_path):
    """`finetune_config(section={field: value}, field=value)` changes the tiny configuration."""
    base = FinetuneConfig(
        model=BeitConfig(
            img_size=(32, 40),
            patch_size=8,
            use_rel_pos_bias=True,
            use_shared_rel_pos_bias=False,
            num_classes=0,
            drop_path_rate=0.3,
        ),
        data=LabelledDataConfig(
            path=str(photographs / "train"),
            test=str(photographs / "test"),
            batch_size=5,  # of 18 images: odd, and passes end within batches
            num_threads=2,
        ),
        optim=OptimConfig(lr=5e-3, warmup_steps=2, clip_grad=None),
        run=RunConfig(
            output=str(tmp_path / "run"),
            epochs=2,
            precision="fp32",
            device="cpu",
            log_every=2,
            evaluate_every=1,
            ema_decay=0.8,
        ),
        init=pretrained,
    )

    def change(**changes):
        sections = {
            name: replace(getattr(base, name), **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return replace(base, **sections)

    return change


def records_of(output):
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def first_batch(task):
    batches = task.batches(0)
    try:
        return next(batches)
    finally:
        batches.close()


def test_two_epochs_that_are_stopped_and_resumed_are_bitwise_the_undisturbed_ones(
    finetune_config, tmp_path, monkeypatch
):
    whole = run_finetuning(finetune_config(run={"output": str(tmp_path / "whole")}))
    parts = finetune_config(run={"output": str(tmp_path / "parts")})
    begin_step = FinetuneTask.begin_step

    def stop_in_step_4(self, step):
        if step == 3:  # the step that ends the first epoch, and is evaluated
            os.kill(os.getpid(), signal.SIGTERM)
        begin_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTask, "begin_step", stop_in_step_4)
        with pytest.raises(Interrupted):
            run_finetuning(parts)
    resumed = run_finetuning(parts)

    theirs, ours = (load_checkpoint(r.train.checkpoint) for r in (whole, resumed))
    assert theirs.step == 6  # an epoch is 3.6 batches, counted as 3
    for stem, tensors in theirs.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, ours.tensors[stem][name]), (stem, name)
    assert records_of(tmp_path / "whole") == records_of(tmp_path / "parts")
    assert (whole.raw.loss, whole.ema.loss) == (resumed.raw.loss, resumed.ema.loss)


def test_a_run_is_evaluated_on_the_way_and_at_the_end_and_names_its_classes(
    finetune_config, tmp_path, capsys
):
    result = run_finetuning(finetune_config())
    output, said = tmp_path / "run", capsys.readouterr().out
    evaluated = [record for record in records_of(output) if "test_top1" in record]
    assert [record["step"] for record in evaluated] == [4]  # the end has a place of its own
    assert {"test_top5", "test_loss", "test_ema_top1", "test_ema_loss"} <= evaluated[0].keys()
    assert result.raw.num_images == 6
    assert result.raw.loss != result.ema.loss
    saved = json.loads((output / "result.json").read_text())
    assert saved["classes"] == CLASSES
    assert saved["ema"]["top1"] == result.ema.top1
    assert saved["raw"]["images_per_class"] == [2, 2, 2]
    for text in ("fresh: fc_norm.bias", "averaged weights  top-1", "result.json", "picture.png"):
        assert text in said
    assert (output / "picture.png").exists()
    settings = load_checkpoint(result.train.checkpoint).manifest["settings"]
    assert settings["classes"] == CLASSES
    assert settings["model"]["embed_dim"] == 32  # the checkpoint's
    assert settings["statistics"] == "half"


def test_a_run_is_read_back_converted_and_fine_tuned_further(finetune_config, tmp_path):
    result = run_finetuning(finetune_config(run={"epochs": 1, "evaluate_every": None}))
    model = from_pretrained(str(tmp_path / "run"), key="ema")
    assert isinstance(model, BeitForImageClassification)
    for name, value in result.train.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    lone = read_checkpoint(
        shutil.copy(result.train.checkpoint / "model.safetensors", tmp_path / "lone.safetensors")
    )
    assert (lone.config, lone.labels) == (result.train.model.config, tuple(CLASSES))
    assert lone.statistics == "half"
    convert(str(tmp_path / "run"), tmp_path / "hf", to="hf")
    labels = json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"]
    assert list(labels.values()) == CLASSES
    for source in ("run", "hf"):
        config = finetune_config(
            init=str(tmp_path / source), model={"img_size": 48}, run={"output": str(tmp_path / "x")}
        )
        task = FinetuneTask(config, ALONE)
        assert torch.equal(task.model.head.weight, load_raw(result).pop("head.weight"))
    config = replace(config, init=str(tmp_path / "run"), statistics="imagenet")
    with pytest.raises(ValueError, match=r"trained with statistics half .* --statistics half"):
        FinetuneTask(config, ALONE)


def load_raw(result):
    return load_checkpoint(result.train.checkpoint).tensors["model"]


def test_weights_are_learnt_by_layer(finetune_config):
    task = FinetuneTask(finetune_config(layer_decay=0.5), ALONE)
    scales = {group["name"]: group["lr_scale"] for group in task.param_groups(0.05)}
    assert scales["layer_0_decay"] == 0.125
    assert scales["layer_3_no_decay"] == 1.0


def test_two_micro_batches_learn_what_one_of_twice_the_size_does(finetune_config, tmp_path):
    weights = []
    for batch_size, accumulate in ((6, 1), (3, 2)):
        run = {"accumulate": accumulate, "output": str(tmp_path / str(accumulate))}
        config = finetune_config(
            model={"drop_path_rate": 0.0}, data={"batch_size": batch_size}, augment=PLAIN, run=run
        )
        weights.append(load_raw(run_finetuning(config)))
    # Not to the last bit: AdamW divides rounding differences by small second moments.
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


def test_two_ranks_learn_and_count_what_one_does_with_two_micro_batches(
    finetune_config, photographs, pretrained, tmp_path
):
    """Mixed, too: a micro-batch is mixed as its first image draws, on whatever rank."""
    config = finetune_config(
        model={"drop_path_rate": 0.0},
        data={"batch_size": 3},
        augment=AugmentConfig(erase=0.0),
        run={"accumulate": 2, "output": str(tmp_path / "one")},
    )
    one = run_finetuning(config)
    arguments = f"""
        --model {{"img_size":[32,40],"patch_size":8,"drop_path_rate":0.0,"num_classes":0}}
        --data.path {photographs / "train"} --data.test {photographs / "test"}
        --data.batch_size 3 --data.num_threads 1 --augment.erase 0 --init {pretrained}
        --optim.lr 5e-3 --optim.min_lr 1e-5 --optim.warmup_steps 2 --run.epochs 2
        --run.precision fp32 --run.device cpu --run.ema_decay 0.8 --run.cpu_threads 1
        --run.evaluate_every 1 --run.output {tmp_path / "two"}"""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, "-m", "beit_fast.cli", "finetune", "small_data"]
    done = subprocess.run(
        [*command, *arguments.split()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    theirs = load_checkpoint(checkpoint_paths(tmp_path / "two")[-1]).tensors["model"]
    for name, value in load_raw(one).items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["raw"]["num_images"] == 6
    assert result["raw"]["loss"] == pytest.approx(one.raw.loss, rel=1e-3)


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
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for image in range(5):
            colour = tuple(200 * (channel == number) for channel in range(3))
            Image.new("RGB", (40, 40), colour).save(folder / name / f"{image}.png")
    (folder / CLASSES[0] / "4.png").write_bytes(b"no image")
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
            assert Path(source.name(index)).parent.name == CLASSES[label]
            assert source.read(index) == Path(source.name(index)).read_bytes()
    assert test.digest() != task.loader.source.digest()
    other = FinetuneTask(replace(config, run=replace(config.run, seed=6)), ALONE)
    assert other._test[0].digest() == test.digest()  # seeds are compared on the same images
    assert 0 <= task.evaluate(task.model)["top1"] <= 1
    with pytest.raises(ValueError, match=r"and then no data\.test"):
        finetune_config(data={"held_out": 0.34})


class RefuseSyncs(TorchDispatchMode):
    """Fails on whatever makes the host wait for a value of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert func not in waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_training_step_never_waits_for_the_device(finetune_config):
    task = FinetuneTask(finetune_config(), ALONE)
    task.model.train()
    batch = first_batch(task)
    with RefuseSyncs():
        loss, _ = task.loss(task.prepare(batch))
        loss.backward()


def test_a_compiled_step_is_one_graph_and_learns_as_the_plain_one(
    finetune_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses = {}
    for mode in ("off", "default"):
        run = {"compile": mode, "output": str(tmp_path / mode), "epochs": 1, "log_every": 1}
        config = finetune_config(model={"drop_path_rate": 0.0}, run=run)
        torch._dynamo.utils.counters.clear()
        run_finetuning(config)
        losses[mode] = [record["loss"] for record in records_of(tmp_path / mode)]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == (mode == "default")
    assert losses["default"] == pytest.approx(losses["off"], rel=1e-5)


def test_another_batch_size_is_compiled_for_itself(finetune_config, compiled_sides):
    task = FinetuneTask(finetune_config(augment=PLAIN), ALONE)
    task.compile("default")
    batch = first_batch(task)
    for size in (5, 3):
        task.begin_step(0)
        task.loss(task.prepare({name: value[:size] for name, value in batch.items()}))
    assert len(compiled_sides) == 2
    assert all(type(side) is int for sides in compiled_sides for side in sides)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_step_as_a_cuda_graph_is_bitwise_the_plain_one(finetune_config, tmp_path):
    runs = []
    for graph in (False, True):
        run = {"cuda_graph": graph, "output": str(tmp_path / str(graph)), "device": "cuda"}
        run |= {"compile": "off", "epochs": 4}
        runs.append(load_raw(run_finetuning(finetune_config(run=run))))
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


def test_other_classes_or_weights_are_another_run(finetune_config, photographs, tmp_path):
    run_finetuning(finetune_config(run={"evaluate_every": None, "epochs": 1}))
    again = {"evaluate_every": None, "epochs": 1}
    run_finetuning(finetune_config(run=again, data={"test": "", "num_threads": 1}))
    with pytest.raises(CheckpointError, match="init was"):
        run_finetuning(finetune_config(run=again, init=None, model={"embed_dim": 24, "depth": 2}))


def test_a_run_goes_on_without_the_checkpoint_it_started_from(
    finetune_config, pretrained, tmp_path, capsys
):
    moved = tmp_path / "moved.pth"
    shutil.copy(pretrained, moved)
    begun = {"evaluate_every": None, "epochs": None, "steps": 3}
    run_finetuning(finetune_config(init=str(moved), run=begun))
    moved.unlink()
    result = run_finetuning(finetune_config(init=str(moved), run=begun | {"steps": 5}))
    assert "moved.pth is no longer there" in capsys.readouterr().out
    whole = run_finetuning(finetune_config(run=begun | {"steps": 5, "output": f"{tmp_path}/whole"}))
    assert load_checkpoint(result.train.checkpoint).step == 5
    assert result.train.model.state_dict().keys() == whole.train.model.state_dict().keys()
    new = {**begun, "output": str(tmp_path / "new")}
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        run_finetuning(finetune_config(init=str(moved), run=new))


def test_test_images_are_looked_at_before_the_first_step(
    finetune_config, photographs, tmp_path, monkeypatch
):
    test = tmp_path / "test"
    shutil.copytree(photographs / "test", test)
    config = finetune_config(data={"test": str(test)})
    whole = (test / "bee" / "0.png").read_bytes()
    (test / "bee" / "0.png").write_bytes(whole[:300])
    (test / "lemurs" / "1.png").write_text("<html>")
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTask, "begin_step", lambda *_: pytest.fail("a step was taken"))
        with pytest.raises(ValueError, match="2 of 6 test images cannot be used: ") as error:
            run_finetuning(config)
        for name in ("bee/0.png", "lemurs/1.png", "Repair or remove them"):
            assert name in str(error.value)
        assert not checkpoint_paths(tmp_path / "run")
    (test / "bee" / "0.png").write_bytes(whole)
    (test / "lemurs" / "1.png").unlink()
    assert run_finetuning(config).raw.num_images == 5
    # They are not looked at again, and one that breaks later ends the evaluation alone.
    monkeypatch.setattr(check_images, "unusable_images", lambda *_, **__: pytest.fail("again"))
    (test / "bee" / "0.png").write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match=r"bee/0\.png .* finished and saved in .*step_00000006"):
        run_finetuning(config)


def test_an_image_that_breaks_meanwhile_does_not_end_training(
    finetune_config, tmp_path, monkeypatch, caplog
):
    classify, calls = FinetuneTask.classify, []

    def breaks_once(self, model):
        calls.append(self)
        if len(calls) == 1:
            raise ValueError("cannot use test/3.png")
        return classify(self, model)

    monkeypatch.setattr(FinetuneTask, "classify", breaks_once)
    result = run_finetuning(finetune_config())
    assert "evaluation after step 4 failed, and training goes on" in caplog.text
    assert result.train.failed
    assert result.raw.num_images == 6


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


def test_the_command_line_fine_tunes_in_bf16_and_says_what_is_wrong_in_one_line(
    photographs, pretrained, tmp_path, capsys
):
    train, test = str(photographs / "train"), str(photographs / "test")
    arguments = ["finetune", "small_data", "--init", pretrained, "--run.output", f"{tmp_path}/run"]
    arguments += ["--model.img_size", "32", "--data.batch_size", "8", "--run.device", "cpu"]
    arguments += ["--run.epochs", "1", "--optim.warmup_steps", "1", "--data.path", train]
    assert main([*arguments, "--data.test", test]) == 0
    said = "\n" + capsys.readouterr().out
    for words in (
        f"\nimages: {train}: 18 images, 3 classes\n",
        f"\ntest images: {test}: 6 images, 3 classes\n",
        "averaged weights  top-1",
    ):
        assert said.count(words) == 1
    (tmp_path / "empty" / "bee").mkdir(parents=True)
    (tmp_path / "fewer" / "bee").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "fewer" / "bee" / "1.png")
    (tmp_path / "hollow").mkdir()
    for name in ("bee", "cat"):
        (tmp_path / "hollow" / name).mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "hollow" / "bee" / "1.png")
    for changes, message in (
        ([], "run.evaluate_every is set and there are no test images: pass --data.test"),
        (["--data.path", ""], "pass --data.path with a folder of classes"),
        (["--data.test", str(tmp_path / "empty")], "no images under"),
        (["--data.path", str(tmp_path / "fewer")], "has one class, bee, and one class teaches"),
        (["--data.path", str(photographs)], f"not like classes: pass {test} or {train}"),
        (["--data.test", str(photographs)], f"not like classes: pass {test} or {train}"),
        (["--data.test", str(tmp_path / "hollow")], "no images in the class 'cat'"),
        (["--data.test", str(tmp_path / "fewer")], "only one has galaxies, lemurs: give folders"),
        (["--data.test", test, "--model.num_classes", "4"], "pass --model.num_classes 3"),
        (["--data.test", test, "--model.img_size", "33"], "do not divide into patches"),
        (
            ["--data.test", test, "--init", "no/such", "--run.output", f"{tmp_path}/new"],
            "there are no weights at no/such",
        ),
        (
            ["--data.test", test, "--layer_decay", "0"],
            "--layer_decay is 0.0: give a finite",
        ),
    ):
        assert main([*arguments, *changes]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
