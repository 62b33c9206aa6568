"""Every task reads from tar shards what it reads from a folder of the same images."""

import json
import shutil
from dataclasses import replace

import pytest

from beit_fast.cli import main
from beit_fast.tasks.pretrain.config import PretokenizeConfig
from beit_fast.tasks.pretrain.pretokenize import run_pretokenize
from beit_fast.tasks.probe.config import ProbeConfig
from beit_fast.tasks.probe.task import run_probe
from labelled_images import COLOURS
from refusals import refusal, write_good
from shards import write_tar
from task_runs import records_of
from tiny_commands import tiny_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images of each of three classes in `images`, and weights for them in w.safetensors."""
    return write_good(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def shards(folder):
    """The same as shards, one a class: in the same order."""
    path = folder / "shards"
    path.mkdir()
    for label, name in enumerate(COLOURS):
        content = []
        for image in sorted((folder / "images" / name).iterdir()):
            key = f"{name}_{image.stem}"
            content += [(f"{key}.cls", b"%d" % label), (f"{key}.png", image.read_bytes())]
        (path / f"train-{label:04d}.tar").write_bytes(write_tar(content))
    (path / "classes.txt").write_text("\n".join(COLOURS))
    return path


@pytest.fixture
def damaged(shards, tmp_path):
    """The last shard is cut within its last image."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    last = folder / "train-0002.tar"
    last.write_bytes(last.read_bytes()[:-12_000])
    return folder


@pytest.mark.parametrize("verb", ["tokenizer", "finetune"])
def test_a_run_from_shards_is_the_run_from_a_folder(
    verb, folder, shards, tokenizer_file, tmp_path, capsys
):
    losses = []
    for name, images in ("a", folder / "images"), ("b", shards):
        given = {"images": images, "pairs": ("", ""), "tokenizer": tokenizer_file}
        command = tiny_command(verb, tmp_path / name, **given, batch_size=2)
        assert main([*command, "--run.steps", "2", "--optim.warmup_steps", "1"]) == 0
        losses.append(records_of(tmp_path / name))
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
    assert f"{shards}: 6 images" in capsys.readouterr().out


def test_tokens_of_shards_are_the_tokens_of_a_folder(folder, shards, pretrain_config, tmp_path):
    tokens = []
    for name, images in ("a", folder / "images"), ("b", shards):
        base = vars(pretrain_config(data={"path": str(images)}))
        run_pretokenize(PretokenizeConfig(**base, output=str(tmp_path / name), num_views=1))
        tokens.append([path.read_bytes() for path in sorted((tmp_path / name).glob("*.npy"))])
    assert tokens[0]
    assert tokens[0] == tokens[1]


def test_an_evaluation_of_shards_is_that_of_a_folder_and_a_damaged_one_is_refused(
    folder, shards, damaged, tmp_path, capsys
):
    found = []
    command = ["evaluate", str(folder / "w.safetensors"), "--device", "cpu"]
    for images in folder / "images", shards:
        output = tmp_path / "found.json"
        assert main([*command[:2], str(images), *command[2:], "--output", str(output)]) == 0
        found.append(json.loads(output.read_text()))
    same = set(found[0]) - {"folder", "environment", "images_per_second"}
    differ = {name for name in same if found[0][name] != found[1][name]}
    assert differ == set()
    assert {"top1", "loss"} <= same
    capsys.readouterr()
    line = refusal([*command[:2], damaged, *command[2:]], capsys)
    assert f"cannot be used: {damaged}/train-0002.tar (it is cut" in line


def test_a_probe_of_shards_is_that_of_a_folder_and_test_images_are_of_whole_shards(
    folder, shards, damaged, tmp_path
):
    base = ProbeConfig(
        checkpoint=str(folder / "w.safetensors"),
        statistics="half",
        knn=(1,),
        rates=(1e-3,),
        epochs=1,
        device="cpu",
        precision="fp32",
        held_out=0.5,
        num_threads=1,
        output=str(tmp_path / "probe"),
    )
    found = []
    for train, test in (folder / "images", folder / "images"), (shards, f"{shards}/train-*.tar"):
        found.append(run_probe(replace(base, train=str(train), test=str(test))))
        shutil.rmtree(tmp_path / "probe")
    assert found[0]["layers"] == found[1]["layers"]
    with pytest.raises(ValueError, match=r"1 of 5 images cannot be used: .*train-0002.tar \(it is"):
        run_probe(replace(base, train=str(shards), test=str(damaged)))
