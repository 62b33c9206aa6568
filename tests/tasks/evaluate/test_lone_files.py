"""Every command on a weight file by itself: moved out of its run, or one that says nothing."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from beit_fast.cli import main
from beit_fast.data.views.statistics import STATISTICS
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.recipes.finetune import small_data
from beit_fast.tasks.evaluate.checkpoints import open_classifier, statistics_of
from beit_fast.tasks.evaluate.config import ClassifierConfig
from beit_fast.tasks.finetune.init import starting_point
from beit_fast.tasks.finetune.task import check_statistics
from beit_fast.train.state import metadata_of, save_checkpoint
from beit_fast.weights.description import NAMED
from labelled_images import write_class_folders
from tiny_classifier import TINY_CLASSIFIER

CLASSES = ["red", "blue", "green"]
# No tensor shows its heads, and no square grid has so many positions.
CONFIG = replace(
    TINY_CLASSIFIER,
    img_size=(16, 40),
    use_abs_pos_emb=True,
    use_rel_pos_bias=False,
    num_classes=3,
)
GIVEN = ["--img_size", "[16,40]", "--num_heads", "2"]
ALONE = ["--device", "cpu", "--precision", "fp32", "--num_threads", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("labelled") / "images", 4, seed=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run's step, its file moved elsewhere, and its tensors as torch saves them."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = BeitForImageClassification(CONFIG)
    for tensor in (model.head.weight, model.pos_embed):
        torch.nn.init.normal_(tensor)
    settings = {"model": asdict(CONFIG), "classes": CLASSES, "statistics": "imagenet"}
    step = save_checkpoint(
        root / "run",
        4,
        {"model": model.state_dict()},
        settings,
        keep=1,
        metadata=metadata_of(settings),
    )
    inside = step / "model.safetensors"
    moved = shutil.copy(inside, root / "moved.safetensors")
    torch.save({"model": model.state_dict()}, root / "silent.pth")
    return {"run": step, "inside": inside, "moved": moved, "silent": root / "silent.pth"}


def evaluated(path, folder, output, *flags):
    arguments = [str(path), str(folder), *ALONE, "--output", str(output), *flags]
    assert main(["evaluate", *arguments]) == 0
    return json.loads(output.read_text())


def test_a_runs_file_is_evaluated_as_the_run(files, folder, tmp_path, capsys):
    same = ("top1", "loss", "classes", "img_size")
    wanted = evaluated(files["run"], folder, tmp_path / "run.json")
    assert wanted["view"]["origin"] == "of the run"
    for name, origin in (("inside", "of the run"), ("moved", "of moved.safetensors")):
        found = evaluated(files[name], folder, tmp_path / f"{name}.json")
        assert [found[key] for key in same] == [wanted[key] for key in same]
        assert found["view"] == wanted["view"] | {"origin": origin}
        assert found["checkpoint"] == str(files[name])
        assert f"imagenet statistics ({origin})" in capsys.readouterr().out


def test_a_silent_file_is_evaluated_with_what_its_error_asks_for(files, folder, tmp_path, capsys):
    wanted = evaluated(files["run"], folder, tmp_path / "run.json")
    arguments = ["evaluate", str(files["silent"]), str(folder), "--match", "order", *ALONE]
    arguments += ["--output", str(tmp_path / "none.json")]
    assert main(arguments) == 1
    assert "pass num_heads" in capsys.readouterr().err
    assert main([*arguments, "--num_heads", "2"]) == 1
    assert "no square grid: pass img_size" in capsys.readouterr().err
    flags = ["--match", "order", "--statistics", "imagenet"]
    found = evaluated(files["silent"], folder, tmp_path / "silent.json", *flags, *GIVEN)
    assert found["img_size"] == wanted["img_size"]
    config = ClassifierConfig(checkpoint=str(files["silent"]), img_size=(16, 40), num_heads=2)
    mine = open_classifier(config).model.eval()
    theirs = open_classifier(ClassifierConfig(checkpoint=str(files["run"]))).model.eval()
    images = torch.randn(2, 3, 16, 40)
    torch.testing.assert_close(mine(images), theirs(images), rtol=0, atol=0)


def test_heads_that_a_checkpoint_has_otherwise_are_refused(files):
    config = ClassifierConfig(checkpoint=str(files["moved"]), num_heads=4)
    with pytest.raises(ValueError, match="has 2 heads, --num_heads is 4: leave it out"):
        open_classifier(config)
    with pytest.raises(ValueError, match="num_heads is 0"):
        replace(config, num_heads=0)


def test_predictions_of_each_are_the_runs(files, folder, capsys):
    image = str(folder / "red" / "0.png")

    def predicted(name, *flags):
        arguments = [str(files[name]), image, "--json", *flags]
        assert main(["predict", *arguments, "--device", "cpu", "--num_threads", "1"]) == 0
        return json.loads(capsys.readouterr().out)

    wanted = predicted("run")
    assert wanted[0]["predictions"][0]["class"] in CLASSES
    assert predicted("inside") == predicted("moved") == wanted
    silent = predicted("silent", *GIVEN, "--statistics", "imagenet")
    for mine, theirs in zip(silent[0]["predictions"], wanted[0]["predictions"], strict=True):
        assert mine == theirs | {"class": None}


def test_probes_of_each_are_the_runs(files, folder, tmp_path, capsys):
    def probed(name, *flags):
        output = tmp_path / name
        arguments = ["--checkpoint", files[name], "--train", folder, "--test", folder]
        arguments += ["--output", output, "--epochs", 2, "--knn", "[1]", *ALONE, *flags]
        assert main(["probe", "imagenet", *map(str, arguments)]) == 0
        return json.loads((output / "probe.json").read_text())["layers"]

    wanted = probed("run")
    assert probed("inside") == probed("moved") == wanted
    assert "does not say the mean" not in capsys.readouterr().out
    assert probed("silent", *GIVEN, "--statistics", "imagenet") == wanted


def test_conversions_of_each_are_the_runs(files, tmp_path, capsys):
    for name, flags in (("inside", []), ("moved", []), ("silent", GIVEN)):
        target = tmp_path / f"{name}.safetensors"
        assert main(["convert", str(files[name]), str(target), "--to", "unilm", *flags]) == 0
        classifier = open_classifier(ClassifierConfig(checkpoint=str(target)))
        assert classifier.model.config.num_heads == 2
        assert classifier.model.config.image_pixels == (16, 40)
        assert classifier.classes == (None if name == "silent" else tuple(CLASSES))
    assert statistics_of(tmp_path / "moved.safetensors") == "imagenet"
    assert statistics_of(tmp_path / "silent.safetensors") is None
    told = ["--statistics", "imagenet", "--to", "unilm", *GIVEN]
    assert main(["convert", str(files["silent"]), str(tmp_path / "told.pth"), *told]) == 0
    view = open_classifier(ClassifierConfig(checkpoint=str(tmp_path / "told.pth"))).view
    assert (view.mean, view.std) == STATISTICS["imagenet"]
    capsys.readouterr()
    assert main(["convert", str(files["silent"]), str(tmp_path / "x"), "--to", "hf"]) == 1
    assert "pass num_heads" in capsys.readouterr().err


def test_what_a_folder_says_of_its_images_goes_along_with_a_conversion(files, tmp_path):
    hf, back = tmp_path / "hf", tmp_path / "back.safetensors"
    assert main(["convert", str(files["moved"]), str(hf), "--to", "hf"]) == 0
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (hf / "preprocessor_config.json").write_text(json.dumps(stated))
    assert main(["convert", str(hf), str(back), "--to", "timm"]) == 0
    for path in (back, hf, hf / "model.safetensors"):
        assert statistics_of(path) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (hf / "preprocessor_config.json").unlink()
    for path in (hf, hf / "model.safetensors"):
        assert statistics_of(path) == "imagenet"
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    assert statistics_of(tmp_path) is None


def test_fine_tuning_starts_from_each_as_from_the_run(files):
    wanted = replace(CONFIG, embed_dim=32, num_heads=4)  # a recipe's, which is another model

    def start(name, config=wanted):
        return starting_point(config, str(files[name]), None, sorted(CLASSES), 0)

    model = start("run").model
    assert model.config.num_heads == 2
    for name in ("inside", "moved"):
        assert start(name).model.config == model.config
        assert "its classes are not those of the folders" in start(name).report
    with pytest.raises(ValueError, match=r"--model\.num_heads .*embed_dim 16 --model\.depth 1"):
        start("silent")
    told = start("silent", replace(wanted, embed_dim=16, depth=1, num_heads=2))
    assert told.model.config == model.config
    assert "num_heads 2 was asked for: the source does not show it" in told.report
    with pytest.raises(ValueError, match="of no square grid: pass img_size"):
        start("silent", replace(wanted, embed_dim=16, depth=1, num_heads=2, img_size=32))


def test_the_names_of_statistics_are_those_that_are_known():
    assert set(NAMED) == set(STATISTICS)


def test_fine_tuning_in_other_units_than_a_lone_files_is_refused(files):
    for name in ("inside", "moved"):
        config = replace(small_data(), init=str(files[name]), statistics="half")
        with pytest.raises(ValueError, match="statistics imagenet and this run has half"):
            check_statistics(config)
        check_statistics(replace(config, statistics="imagenet"))


def test_weights_that_are_not_finite_are_said_by_the_commands(files, folder, tmp_path, capsys):
    state = torch.load(files["silent"], weights_only=True)["model"]
    state["head.bias"][1] = torch.nan
    torch.save({"model": state}, tmp_path / "diverged.pth")
    for arguments in (
        ["evaluate", tmp_path / "diverged.pth", folder, *ALONE, *GIVEN],
        ["predict", tmp_path / "diverged.pth", folder / "red" / "0.png", *GIVEN],
        ["convert", tmp_path / "diverged.pth", tmp_path / "hf", "--to", "hf", *GIVEN],
    ):
        assert main([str(argument) for argument in arguments]) == 1
        said = capsys.readouterr().err
        assert "1 values of 1 tensors are NaN or infinite: head.bias (1 of 3)" in said
