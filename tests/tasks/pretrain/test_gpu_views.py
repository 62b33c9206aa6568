"""Pre-training on views of kind gpu: where the device is a CPU it is the run of kind reference."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from beit_fast.data.token_cache import TokenCacheError, read_manifest, write_manifest
from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.pretrain.pretokenize import run_pretokenize
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.train.world import World
from task_runs import ALONE, assert_the_same_run, records_of, stopped_in_step


@pytest.fixture
def spoiled(image_folder, tmp_path):
    """Settings of the twelve images, of which one is broken in its pixels alone, one is a PNG and
    one progressive."""
    folder = shutil.copytree(image_folder, tmp_path / "spoiled")
    broken, png, progressive, *_ = sorted(folder.rglob("*.jpg"))
    data = broken.read_bytes()
    start = data.index(b"\xff\xdb")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    broken.write_bytes(data[:start] + data[end:])
    image = Image.open(png).copy()
    image.save(png, "PNG")
    image.save(progressive, "JPEG", progressive=True)
    return {"path": str(folder), "max_bad_share": 0.1}


def test_a_run_that_is_stopped_and_goes_on_is_bitwise_that_of_the_reference(
    pretrain_config, spoiled, tmp_path, capsys
):
    def run(kind, output):
        return run_pretraining(
            pretrain_config(
                views={"kind": kind},
                data=spoiled,
                run={"steps": 8, "log_every": 1, "output": str(tmp_path / output)},
            )
        )

    run("reference", "reference")
    with stopped_in_step(PretrainTask, 3):
        run("gpu", "run")
    capsys.readouterr()
    run("gpu", "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 images could not be used and were replaced" in said
    assert "images loaded here were left to the CPU's decoder: " in said
    assert " not JPEG" in said
    assert " progressive" in said
    assert_the_same_run(tmp_path / "run", tmp_path / "reference")


def test_a_run_from_its_cache_is_the_live_run(pretrain_config, cache_of, spoiled, tmp_path, capsys):
    """The image that is broken only by its pixels is replaced by the one that the record is of."""
    config = pretrain_config(views={"kind": "gpu"}, data=spoiled, run={"steps": 6, "log_every": 1})
    folder = run_pretokenize(cache_of(config, num_views=2))
    said = " ".join(capsys.readouterr().out.split())
    assert "1 images could not be used and were replaced" in said
    assert (
        "6 of 24 images loaded here were left to the CPU's decoder: 4 not JPEG, 2 progressive"
        in said
    )
    live = replace(config, run=replace(config.run, output=str(tmp_path / "live")))
    run_pretraining(live)
    run_pretraining(replace(config, tokenizer=None, token_cache=str(folder)))
    assert_the_same_run(tmp_path / "run", tmp_path / "live")


def test_its_cache_holds_what_that_of_the_reference_does(
    pretrain_config, cache_of, spoiled, tmp_path
):
    written = []
    for kind in ("reference", "gpu"):
        config = pretrain_config(views={"kind": kind}, data=spoiled)
        folder = run_pretokenize(cache_of(config, output=str(tmp_path / kind)))
        written.append({path.name: path.read_bytes() for path in folder.glob("*.npy")})
    assert written[0] == written[1]
    made_from = [read_manifest(tmp_path / kind).made_from for kind in ("reference", "gpu")]
    assert made_from[0]["pixels"] == made_from[1]["pixels"]
    assert "decoder" not in made_from[0]
    assert made_from[1]["decoder"] == "cpu"


def test_a_cache_of_another_devices_decoder_is_refused(pretrain_config, cache_of):
    config = pretrain_config(views={"kind": "gpu"})
    folder = run_pretokenize(cache_of(config))
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, made_from=manifest.made_from | {"decoder": "cuda"}))
    with pytest.raises(TokenCacheError, match="decoder was 'cuda', is 'cpu'"):
        PretrainTask(replace(config, tokenizer=None, token_cache=str(folder)), None, ALONE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs and nvJPEG")
@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_on_a_gpu_graphs_are_captured_beside_the_decoding(
    pretrain_config, spoiled, tmp_path, ahead
):
    for graph in (False, True):
        run = {"device": "cuda", "steps": 10, "log_every": 1, "output": str(tmp_path / str(graph))}
        run |= {"cuda_graph": graph, "prepare_ahead": ahead and graph, "compile": "off"}
        run_pretraining(pretrain_config(views={"kind": "gpu"}, data=spoiled, run=run))
    losses = [
        [record["loss"] for record in records_of(tmp_path / str(graph)) if "loss" in record]
        for graph in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_views_are_made_on_the_device_that_trains(pretrain_config):
    config = pretrain_config(views={"kind": "gpu"})
    tokenizer = load_tokenizer(config.tokenizer)
    task = PretrainTask(config, tokenizer, World(0, 1, torch.device("meta")))
    assert task.loader.device.type == "meta"
    task.take_rank(World(1, 2, task.loader.device))
    assert task.loader.device.type == "meta"


def test_evaluation_and_picture_are_those_of_the_reference(pretrain_config, tmp_path):
    results, pictures = [], []
    for kind in ("reference", "gpu"):
        config = pretrain_config(views={"kind": kind})
        task = PretrainTask(config, load_tokenizer(config.tokenizer), ALONE)
        results.append(task.evaluate(task.model, num_batches=2))
        task.picture(task.model, tmp_path / f"{kind}.png")
        pictures.append((tmp_path / f"{kind}.png").read_bytes())
    assert results[0] == results[1]
    assert pictures[0] == pictures[1]
