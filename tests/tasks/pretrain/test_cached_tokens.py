"""Training from a token cache: it is the live run bitwise, and another cache is refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast import recipes
from beit_fast.data import token_cache
from beit_fast.data.token_cache import MANIFEST, TokenCacheError
from beit_fast.tasks.pretrain import task as pretrain
from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.pretrain.pretokenize import run_pretokenize
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tokenizer.checkpoint import load_tokenizer, save_tokenizer, tokenizer_digest
from beit_fast.train.state import CheckpointError, load_checkpoint
from task_runs import ALONE, assert_the_same_run, take_batches


def cached(config, folder, **changes):
    return replace(config, **{"tokenizer": None, "token_cache": str(folder)} | changes)


def task_of(config):
    return PretrainTask(config, None, ALONE)


# A run from the cache is the live run


def assert_the_same_batches_and_losses(config, folder, count):
    """Of a live task and one from the cache, whose models start alike."""
    live = PretrainTask(config, load_tokenizer(config.tokenizer), ALONE)
    ours = task_of(cached(config, folder))
    both = (take_batches(task, count) for task in (live, ours))
    for theirs, batch in zip(*both, strict=True):
        for name in theirs.keys() - {"token_images"}:
            assert torch.equal(theirs[name], batch[name]), name
        losses = []
        for task, values in ((live, theirs), (ours, batch)):
            torch.manual_seed(0)
            losses.append(task.loss(task.prepare(values))[0])
        assert torch.equal(*losses)
    assert torch.equal(live.counters["token_counts"], ours.counters["token_counts"])


@pytest.mark.promise("R1")
def test_a_run_from_the_cache_is_bitwise_the_live_run(pretrain_config, cache_of, tmp_path):
    """Two passes and two thirds over twelve images, from three views of each."""
    config = pretrain_config(run={"steps": 8, "log_every": 1})
    folder = run_pretokenize(cache_of(config, num_views=3))
    live = replace(config, run=replace(config.run, output=str(tmp_path / "live")))
    run_pretraining(live)
    run_pretraining(cached(config, folder))
    assert_the_same_run(tmp_path / "run", tmp_path / "live")


@pytest.mark.parametrize(
    "changes",
    [
        {"views": {"kind": "reference"}},
        {"views": {"color_jitter": 0.0}},
        {"views": {"decode": "scaled"}},
        {"tokenizer_precision": "fp16"},
        {"objective": "all"},
    ],
    ids=str,
)
def test_variants_have_the_batches_and_losses_of_the_live_run(pretrain_config, cache_of, changes):
    config = pretrain_config(**changes)
    assert_the_same_batches_and_losses(config, run_pretokenize(cache_of(config)), count=6)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 12])
def test_tokens_on_a_cpu_do_not_depend_on_the_batch(pretrain_config, cache_of, batch_size):
    """Neither on its size, nor on its images, nor on which patches are asked for."""
    config = pretrain_config()
    folder = run_pretokenize(cache_of(config))
    other = pretrain_config(data={"batch_size": batch_size})
    live = PretrainTask(other, load_tokenizer(config.tokenizer), ALONE)
    ours = task_of(cached(other, folder))
    both = (take_batches(task, -(-12 // batch_size)) for task in (live, ours))
    for theirs, batch in zip(*both, strict=True):
        theirs = pretrain.jitter_views(theirs)
        assert torch.equal(live._tokens(theirs), ours._tokens(batch))
        index = batch["masked_index"]
        assert torch.equal(live._tokens(theirs, index), ours._tokens(batch, index))


def test_later_passes_read_the_views_again_under_new_masks(pretrain_config, cache_of):
    config = pretrain_config(data={"batch_size": 12})
    task = task_of(cached(config, run_pretokenize(cache_of(config))))
    passes = []
    for batch in take_batches(task, 4):
        order = batch["sample_index"].argsort()
        passes.append({n: batch[n][order] for n in ("images", "jitter", "tokens", "mask")})
    for name in ("images", "jitter", "tokens"):
        assert torch.equal(passes[0][name], passes[2][name])
        assert torch.equal(passes[1][name], passes[3][name])
        assert not torch.equal(passes[0][name], passes[1][name])
    assert len({batch["mask"].numpy().tobytes() for batch in passes}) == 4


def test_training_has_no_tokenizer_and_no_token_view(pretrain_config, cache_of):
    config = pretrain_config()
    task = task_of(cached(config, run_pretokenize(cache_of(config)), tokenizer=config.tokenizer))
    (batch,) = take_batches(task, 1)
    assert "token_images" not in batch
    assert task.tokenizer is None
    loss, _ = task.loss(task.prepare(batch))
    assert loss.isfinite()
    assert task.counters["token_counts"].sum() == batch["mask"].sum()


def test_a_checkpoint_holds_the_tokenizer_and_the_views_of_its_cache(
    pretrain_config, cache_of, tokenizer_file
):
    config = pretrain_config(run={"steps": 3})
    more = cache_of(config, num_views=3)
    folder = run_pretokenize(cache_of(config))
    outcome = run_pretraining(cached(config, folder))
    settings = load_checkpoint(outcome.checkpoint).manifest["settings"]
    assert settings["tokenizer"] == tokenizer_digest(load_tokenizer(tokenizer_file))
    assert settings["token_cache"] == 2
    run_pretokenize(more)
    with pytest.raises(CheckpointError, match="token_cache was 2, is 3"):
        run_pretraining(cached(config, folder))


# What is shown of a run


def test_without_a_tokenizer_evaluation_is_on_cached_crops_and_says_so(
    pretrain_config, cache_of, tmp_path, capsys
):
    config = pretrain_config(run={"steps": 3})
    run_pretraining(cached(config, run_pretokenize(cache_of(config))))
    said = capsys.readouterr().out
    assert said.count("crops of the token cache, seen in training, and masks never trained on") == 2
    assert "tokens of 2 views come from" in said
    assert (tmp_path / "run" / "picture.png").exists()


def test_with_a_tokenizer_evaluation_and_picture_are_those_of_a_live_run(
    pretrain_config, cache_of, tmp_path, monkeypatch
):
    config = pretrain_config()
    live = PretrainTask(config, load_tokenizer(config.tokenizer), ALONE)
    folder = run_pretokenize(cache_of(config))
    ours = task_of(cached(config, folder, tokenizer=config.tokenizer))
    alone = task_of(cached(config, folder))
    drawn = []
    monkeypatch.setattr(pretrain, "draw_columns", lambda columns, path: drawn.append(columns))
    for task in (live, ours, alone):
        task.picture(task.model, tmp_path / "picture.png")
    assert ours.evaluated_on == live.evaluated_on == "crops and masks never trained on"
    assert ours.evaluate(ours.model) == live.evaluate(live.model) != alone.evaluate(alone.model)
    assert ours.tokenizer is None
    for name, column in drawn[0].items():
        assert torch.equal(column, drawn[1][name])
    colours = drawn[2]["its visual tokens"]
    assert colours.shape == (4, 3, 32, 48)
    for box in (colours[..., :8, :8], colours[..., 8:16, 40:]):  # one colour for each patch
        assert torch.equal(box, box[..., :1, :1].expand_as(box))


# Bad images


@pytest.fixture
def spoilt(image_folder, tmp_path):
    """The twelve images, two of them unreadable."""
    folder = tmp_path / "spoilt"
    shutil.copytree(image_folder, folder)
    paths = sorted(folder.rglob("*.jpg"))
    for path in (paths[3], paths[11]):
        path.write_bytes(b"not an image")
    return folder


def test_bad_images_are_replaced_as_in_a_live_run(pretrain_config, cache_of, spoilt, capsys):
    config = pretrain_config(data={"path": str(spoilt), "max_bad_share": 0.5})
    folder = run_pretokenize(cache_of(config))
    assert "2 images could not be used and were replaced" in capsys.readouterr().out
    records = np.load(folder / "view_001_image_00000000.npy")
    assert records["image"].tolist() == [0, 1, 2, 4, 4]
    assert_the_same_batches_and_losses(config, folder, count=6)


@pytest.mark.parametrize(("number", "named"), [(3, 4), (5, 5)], ids=["repaired", "replaced"])
def test_an_image_that_changed_stops_the_run(pretrain_config, cache_of, spoilt, number, named):
    """While the run lasts; before it starts the digest of names and sizes sees this one."""
    data = {"path": str(spoilt), "max_bad_share": 0.5, "batch_size": 12}
    config = pretrain_config(data=data)
    task = task_of(cached(config, run_pretokenize(cache_of(config))))
    paths = sorted(spoilt.rglob("*.jpg"))
    Image.new("RGB", (30, 40)).save(paths[number])
    message = rf"{paths[named].name} is not the image .*file size was \d+, is \d+; crop was"
    with pytest.raises(TokenCacheError, match=message):
        take_batches(task, 1)


def test_an_image_that_cannot_be_read_any_more_stops_the_run(
    pretrain_config, cache_of, spoilt, monkeypatch
):
    """Even if the next image looks the same: as large a file, and as large a picture."""
    data = {"path": str(spoilt), "max_bad_share": 0.5, "batch_size": 12}
    config = pretrain_config(data=data)
    paths = sorted(spoilt.rglob("*.jpg"))
    shutil.copy(paths[6], paths[5])
    task = task_of(cached(config, run_pretokenize(cache_of(config))))
    read = task.loader.source.read

    def fail(index):
        if index == 5:
            raise OSError("stale handle")
        return read(index)

    monkeypatch.setattr(task.loader.source, "read", fail)
    with pytest.raises(
        TokenCacheError, match=rf"tokens of .*{paths[5].name} came with .*{paths[6].name}"
    ):
        take_batches(task, 1)


# What does not fit


def another_tokenizer(config, tmp_path):
    other = load_tokenizer(config.tokenizer)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    path = tmp_path / "other.safetensors"
    save_tokenizer(other, path)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"seed": 1}}, "seed was 0, is 1"),
        ({"views": {"scale": (0.2, 1.0)}}, r"views\.scale was \[0\.08, 1\.0\], is \[0\.2, 1\.0\]"),
        ({"views": {"kind": "reference"}}, r"pixels was .*views\.kind was 'fast'"),
        ({"views": {"decode": "scaled"}}, r"pixels was .*views\.decode was 'full', is 'scaled'"),
        ({"tokenizer_precision": "fp16"}, r"tokenizer\.precision was 'fp32', is 'fp16'"),
        ({"model": {"vocab_size": 64}}, r"tokenizer\.vocab_size was 32, is 64"),
        (
            {"run": {"seed": 1}, "views": {"hflip": 0.0}},
            r"\(pixels was .*; seed was 0, is 1; views\.hflip was 0\.5, is 0\.0\)",
        ),
    ],
)
def test_a_cache_of_something_else_is_refused_with_every_difference(
    pretrain_config, cache_of, changes, message
):
    folder = run_pretokenize(cache_of(pretrain_config(), num_views=1))
    with pytest.raises(TokenCacheError, match=message):
        task_of(cached(pretrain_config(**changes), folder))


def test_other_files_and_another_tokenizer_are_refused_and_moved_ones_are_not(
    pretrain_config, cache_of, image_folder, tmp_path
):
    config = pretrain_config()
    folder = run_pretokenize(cache_of(config, num_views=1))
    other = another_tokenizer(config, tmp_path)
    with pytest.raises(TokenCacheError, match=r"tokenizer\.weights was"):
        task_of(cached(config, folder, tokenizer=other))
    with pytest.raises(TokenCacheError, match=r"tokenizer\.weights was"):
        run_pretokenize(cache_of(config, num_views=1, tokenizer=other))
    shutil.copytree(image_folder, tmp_path / "moved")
    shutil.copytree(folder, tmp_path / "moved_tokens")
    moved = pretrain_config(data={"path": str(tmp_path / "moved")})
    task_of(cached(moved, tmp_path / "moved_tokens"))
    first, second, *_ = sorted((tmp_path / "moved").rglob("*.jpg"))
    content = first.read_bytes()
    first.write_bytes(content + b"\0")
    with pytest.raises(TokenCacheError, match=r"data\.names_and_sizes was"):
        task_of(cached(moved, folder))
    first.write_bytes(content)
    second.rename(second.with_name("renamed.jpg"))
    with pytest.raises(TokenCacheError, match=r"data\.names_and_sizes was"):
        task_of(cached(moved, folder))
    second.with_name("renamed.jpg").unlink()
    with pytest.raises(TokenCacheError, match=r"data\.names_and_sizes was .*num_images was 12, is"):
        task_of(cached(moved, folder))


def test_another_decoder_is_refused(pretrain_config, cache_of, monkeypatch):
    """Libraries and this package count by the pixels they make."""
    config = pretrain_config()
    folder = run_pretokenize(cache_of(config, num_views=1))
    make_views = token_cache.make_views

    def one_level_off(*arguments):
        views, draw = make_views(*arguments)
        views["images"][0, 0, 0] ^= 1
        return views, draw

    monkeypatch.setattr(token_cache, "make_views", one_level_off)
    token_cache._pixel_digest.cache_clear()
    with pytest.raises(TokenCacheError, match=r"\(pixels was '\w+', is '\w+'\)"):
        task_of(cached(config, folder))
    token_cache._pixel_digest.cache_clear()


def test_a_cache_takes_the_place_of_training_a_tokenizer(pretrain_config):
    config = recipes.demo()
    with pytest.raises(ValueError, match="--tokenizer_training null"):
        replace(config, token_cache="tokens")
    with pytest.raises(ValueError, match="predicts tokens"):
        pretrain_config(model={"predict": "pixels"}, tokenizer=None, token_cache="tokens")
    replace(config, token_cache="tokens", tokenizer_training=None)
    with pytest.raises(TokenCacheError, match=f"no/such/{MANIFEST} is missing"):
        task_of(pretrain_config(tokenizer=None, token_cache="no/such"))
