"""Features of every block, their cache, and the whole command on a tiny checkpoint."""

import importlib
import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit_fast.cli import main
from beit_fast.data.bad_samples import BadDataError
from beit_fast.data.sources.class_folders import class_folders
from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.tasks.evaluate.checkpoints import open_weights, weights_digest
from beit_fast.tasks.probe import features as features_module
from beit_fast.tasks.probe.config import ProbeConfig
from beit_fast.tasks.probe.features import block_features, cached_features
from beit_fast.tasks.probe.probes import knn_accuracy
from beit_fast.tasks.probe.task import load_encoder, run_probe
from beit_fast.train.state import save_checkpoint
from beit_fast.train.stop import Interrupted
from beit_fast.weights.convert import convert
from labelled_images import write_class_folders

TINY = BeitConfig(
    img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, vocab_size=16
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    train = write_class_folders(root / "train", 8, seed=0)
    return train, write_class_folders(root / "test", 4, seed=1)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Two checkpoints of a run; the weights are random, and of step 2 without an average."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"model": asdict(TINY), "statistics": "half"}
    for step in (1, 2):
        torch.manual_seed(step)
        model = BeitForMaskedImageModeling(TINY).state_dict()
        tensors = {"model": model} | ({"ema": model} if step == 1 else {})
        save_checkpoint(folder, step, tensors, settings, keep=2)
    return folder


@pytest.fixture
def config(folders, run_folder, tmp_path):
    return ProbeConfig(
        checkpoint=str(run_folder),
        train=str(folders[0]),
        test=str(folders[1]),
        output=str(tmp_path / "probe"),
        precision="fp32",
        knn=(1, 3),
        epochs=4,
        batch_size=8,
        device="cpu",
        images_at_once=5,
        num_threads=2,
    )


def test_features_are_the_outputs_of_the_blocks_without_norm():
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(TINY).eval()
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    images = torch.randn(2, 3, 32, 48)
    features = block_features(model, images)
    with torch.no_grad():
        x, bias = model._embed(images, None), model.rel_pos_bias()
        for layer, block in enumerate(model.blocks):
            x = block(x, bias)
            torch.testing.assert_close(features[:, layer, 0], x[:, 0])
            torch.testing.assert_close(features[:, layer, 1], x[:, 1:].mean(1))
        torch.testing.assert_close(x, model.forward_features(images))  # hooks are gone again
    assert not any(block._forward_hooks for block in model.blocks)


def test_the_command_probes_every_block_and_keeps_features(config, capsys, monkeypatch):
    arguments = ["probe", "small", "--knn", "[1,3]", "--rates", "[0.01,0.1]"]
    for name in ("checkpoint", "train", "test", "output", "precision", "device"):
        arguments += [f"--{name}", getattr(config, name)]
    arguments += ["--epochs", "4", "--batch_size", "8"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for words in (
        f"train: {config.train}: 24 images, 3 classes",
        "3-NN",
        "patch mean",
        "The usual mistake",
        "probe.png",
    ):
        assert words in said
    report = Path(config.output) / "probe.json"
    edge = [r["block"] for r in json.loads(report.read_text())["layers"] if r["lr"] == 0.1]
    assert ("add them to --rates" in said) == bool(edge)
    result = json.loads(report.read_text())
    assert result["checkpoint"].endswith("step_00000002")
    assert [row["block"] for row in result["layers"]] == [1, 2, 3]
    assert result["chosen"]["knn"]["accuracy"] >= 0.9  # colours: even random features tell them
    assert (report.parent / "probe.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*_):
        raise AssertionError("features were computed again")

    monkeypatch.setattr(features_module, "block_features", refuse)
    assert main(arguments) == 0
    assert json.loads(report.read_text())["layers"] == result["layers"]


def test_features_of_something_else_are_refused_with_every_difference(config, folders):
    run_probe(config)
    with pytest.raises(
        ValueError, match=r"weights was '[0-9a-f]{64}', is 'random, seed 0'.*delete"
    ):
        run_probe(replace(config, weights="random"))
    with pytest.raises(ValueError, match=r"transform was 'bicubic, centre, 0.875 of 32x48 px', is"):
        run_probe(replace(config, crop_pct=1.0))
    with pytest.raises(ValueError, match=r"images was .*; labels was "):
        run_probe(replace(config, train=str(folders[1])))


def test_damaged_features_are_refused(config):
    run_probe(config)
    file = Path(config.output) / "features" / "train" / "features.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train are damaged.*delete the folder"):
        run_probe(config)
    np.save(file, np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"are damaged \(float64 \(1, 2\) and not float32 \(24,"):
        run_probe(config)
    file.unlink()
    with pytest.raises(ValueError, match="train are damaged"):
        run_probe(config)


@pytest.mark.promise("R14")
def test_training_images_that_cannot_be_used_are_left_out_with_their_labels(
    config, folders, tmp_path, capsys, caplog
):
    folder = write_class_folders(tmp_path / "broken", 8, seed=0)  # as folders[0]
    broken = [folder / "blue" / "5.png", folder / "red" / "0.png"]
    for path in broken:
        path.write_bytes(b"no image")
    wanted = run_probe(config)
    whole = np.load(Path(config.output) / "features" / "train" / "features.npy")
    config = replace(config, train=str(folder), output=str(tmp_path / "other"))
    for _ in range(2):  # computed, and kept
        caplog.clear()
        result = run_probe(config)
        assert result["num_train"] == wanted["num_train"] - 2
        assert list(result["left_out"]) == [str(path) for path in broken]
        said = capsys.readouterr().out
        assert f"2 images could not be used and were left out: {broken[0]}, {broken[1]}" in said
        assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
            f"cannot use {path}" for path in broken
        ]
        assert all(record.getMessage().endswith("it is left out") for record in caplog.records)
    kept = [row for row in range(24) if row not in (5, 16)]
    features = Path(config.output) / "features" / "train"
    np.testing.assert_array_equal(np.load(features / "features.npy"), whole[kept])
    assert np.load(features / "labels.npy").tolist() == [row // 8 for row in kept]
    with pytest.raises(BadDataError, match=r"1 of 24 files are bad and --max_bad_share 0 allows 0"):
        run_probe(replace(config, max_bad_share=0))


def test_more_bad_training_images_than_allowed_end_it_and_the_remedy_works(config, tmp_path):
    folder = write_class_folders(tmp_path / "broken", 8, seed=0)
    for number in range(3):  # of 24: a tenth is borne
        (folder / "red" / f"{number}.png").write_bytes(b"no image")
    config = replace(config, train=str(folder))
    with pytest.raises(BadDataError, match=r"3 of 24 files are bad.*or raise --max_bad_share"):
        run_probe(config)
    assert list((Path(config.output) / "features" / "train").iterdir()) == []
    assert run_probe(replace(config, max_bad_share=0.2))["num_train"] == 21


@pytest.mark.promise("R14")
def test_test_images_that_cannot_be_used_are_all_named_before_anything_is_computed(
    config, tmp_path, monkeypatch
):
    folder = write_class_folders(tmp_path / "broken", 4, seed=1)
    for number in (1, 3):
        (folder / "red" / f"{number}.png").write_bytes(b"no image")
    monkeypatch.setattr(features_module, "block_features", None)
    with pytest.raises(ValueError, match=r"2 of 12 .*red/1.png, .*red/3.png \(.*Repair or remove"):
        run_probe(replace(config, test=str(folder)))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("beit_fast.tasks.probe.features.block_features", "while features were computed"),
        ("beit_fast.tasks.probe.probes._logits", "while probes were trained"),
    ],
)
def test_a_stop_signal_is_heeded_and_the_same_command_goes_on(config, monkeypatch, place, words):
    module, _, name = place.rpartition(".")
    module = importlib.import_module(module)
    function, calls = getattr(module, name), []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    monkeypatch.setattr(module, name, stop)
    with pytest.raises(Interrupted, match=words) as stopped:
        run_probe(config)
    assert stopped.value.exit_code == 143
    assert not (Path(config.output) / "probe.json").exists()
    run_probe(config)
    assert (Path(config.output) / "probe.json").exists()


def test_an_output_that_cannot_be_written_is_said_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "beit_fast.tasks.probe.task.open_weights", lambda *_: pytest.fail("too late")
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="give another --output"):
        run_probe(replace(config, output=str(tmp_path / "file" / "probe")))


def test_features_do_not_depend_on_the_images_computed_at_once(config, folders, tmp_path):
    source, labels, _ = class_folders(folders[0])
    torch.manual_seed(0)
    model = Beit(TINY)
    parts = [
        cached_features(
            tmp_path / str(batch_size),
            model,
            source,
            labels,
            made_from={},
            statistics=((0.5,) * 3, (0.5,) * 3),
            crop_pct=0.875,
            precision="fp32",
            batch_size=batch_size,
            num_threads=2,
            device=torch.device("cpu"),
        ).features
        for batch_size in (24, 5)
    ]
    np.testing.assert_allclose(*parts, atol=1e-6)
    assert model.training


def test_a_net_that_was_trained_knows_more_than_a_random_one():
    """Stripes up or across, faint and shifted at random, on colours that say nothing."""

    def draw(count, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, (count,), generator=generator)
        place = torch.arange(16) + torch.randint(4, (count, 1), generator=generator)
        wave = 0.5 * torch.sin(place * torch.pi / 2)[:, None]
        stripes = torch.where(labels[:, None, None] > 0, wave, wave.transpose(1, 2))
        colours = torch.randn(count, 3, 1, 1, generator=generator)
        return stripes[:, None] + colours, labels

    config = BeitConfig(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    torch.manual_seed(0)
    model, head = Beit(config), torch.nn.Linear(32, 2)
    (bank, bank_labels), (queries, labels) = draw(200, seed=1), draw(200, seed=2)

    def accuracy():
        far, near = block_features(model, bank), block_features(model, queries)
        return knn_accuracy(far[:, 1, 1], bank_labels, near[:, 1, 1], labels, [5])[5]

    before = accuracy()
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    for step in range(60):
        images, target = draw(64, seed=100 + step)
        optimizer.zero_grad()
        F.cross_entropy(head(model(images)[:, 1:].mean(1)), target).backward()
        optimizer.step()
    after = accuracy()
    assert after > before + 0.15, (before, after)
    assert after > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": ""}, "no checkpoint was named: pass --checkpoint"),
        ({"train": "no/such"}, "no/such does not exist"),
        ({"weights": "ema"}, "no average of the weights"),
        ({"knn": (1, 22)}, "asks for 22 neighbours"),
        ({"knn": ()}, "at least one"),
        ({"rates": (0.0,)}, "rates is .0.0,.: give a list .* above 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"crop_pct": 1.1}, "crop_pct is 1.1"),
        ({"max_bad_share": 2}, "max_bad_share is 2"),
    ],
)
def test_a_mistake_is_explained(config, change, message):
    with pytest.raises(ValueError, match=message):
        run_probe(replace(config, **change))


def test_a_checkpoint_that_is_none_says_what_is_read(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at no/such: pass"):
        run_probe(replace(config, checkpoint="no/such"))
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.zeros(2)}}, {"dvae": {}}, keep=1)
    with pytest.raises(ValueError, match=r"no BEiT's \(a\): pass weights with"):
        run_probe(replace(config, checkpoint=str(tmp_path)))


def test_folders_of_other_classes_are_refused(config, tmp_path):
    folder = write_class_folders(tmp_path / "other", 1, seed=0)
    (folder / "red").rename(folder / "pink")
    with pytest.raises(ValueError, match="only one has pink, red"):
        run_probe(replace(config, test=str(folder)))


def test_the_encoder_is_the_checkpoints_without_its_head(run_folder):
    path = run_folder / "checkpoints" / "step_00000001"
    model, digest = load_encoder(open_weights(path, "ema"))
    torch.manual_seed(1)
    wanted = BeitForMaskedImageModeling(TINY).eval()
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(model(images), wanted.forward_features(images), rtol=0, atol=0)
    assert digest == weights_digest(model.state_dict())
    random, _ = load_encoder(open_weights(path), seed=2)
    assert not torch.equal(random(images), model(images))


def test_every_layout_and_task_gives_the_encoders_features(config, run_folder, tmp_path, capsys):
    """Fine-tuned, unilm's and transformers' checkpoints of one encoder, and a run's."""
    wanted = run_probe(config)["layers"]
    source = str(run_folder)
    encoder = load_encoder(open_weights(source))[0].state_dict()
    tuned = BeitForImageClassification(replace(TINY, num_classes=1))
    tuned.load_state_dict(tuned.state_dict() | encoder)
    settings = {"model": asdict(tuned.config), "statistics": "half", "classes": ["a"]}
    save_checkpoint(tmp_path / "tuned", 1, {"model": tuned.state_dict()}, settings, keep=1)
    convert(source, tmp_path / "hf", to="hf")
    convert(source, tmp_path / "unilm.safetensors", to="unilm")
    convert(source, tmp_path / "timm.pth", to="timm")
    # A file that says nothing of itself, whose grid is not square.
    for name, given in (
        ("tuned", {}),
        ("hf", {}),
        ("unilm.safetensors", {}),
        ("timm.pth", {"img_size": TINY.img_size}),
    ):
        capsys.readouterr()
        paths = {"checkpoint": str(tmp_path / name), "output": str(tmp_path / f"of {name}")}
        result = run_probe(replace(config, **paths, **given))
        assert result["layers"] == wanted
        assert ("does not say the mean" in capsys.readouterr().out) == (name == "timm.pth")
    with pytest.raises(ValueError, match=r"mean was \[0.5, 0.5, 0.5\], is \[0.485"):
        run_probe(replace(config, statistics="imagenet"))
