"""Writing a token cache: no fault loses a file, and what does not fit is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from beit_fast import recipes
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.token_cache import TokenCache, TokenCacheError, read_manifest
from beit_fast.tasks.pretrain import pretokenize
from beit_fast.tasks.pretrain.pretokenize import run_pretokenize
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.train.lock import sole_user
from beit_fast.train.stop import Interrupted
from task_runs import ALONE, TWO_RANKS, told_in_a_read


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def start_process(fault, config, tmp_path, launcher=(sys.executable,)):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    script = Path(__file__).with_name("write_tokens.py")
    command = [*launcher, str(script), fault, str(file)]
    return subprocess.run(command, timeout=120, capture_output=True, text=True)


def test_a_kill_costs_the_file_being_made(pretrain_config, cache_of, tmp_path):
    config = cache_of(pretrain_config(data={"batch_size": 2}))
    whole = run_pretokenize(replace(config, output=str(tmp_path / "whole")))
    process = start_process("kill", config, tmp_path)
    assert process.returncode == -signal.SIGKILL, process.stderr
    folder = tmp_path / "tokens"
    (folder / ".view_001_image_00000000.npy.tmp").write_bytes(b"half of a file")
    assert len(read_manifest(folder).files) == 2  # of 3, 3 and 1 batches
    with pytest.raises(TokenCacheError, match="2 of 6 files: run the same"):
        TokenCache(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    run_pretokenize(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(folder) == contents(whole)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))


@pytest.mark.promise("R10")
def test_two_ranks_stop_together_and_any_number_goes_on(pretrain_config, cache_of, tmp_path):
    config = cache_of(pretrain_config(data={"batch_size": 2}), images_per_shard=4, num_views=4)
    whole = run_pretokenize(replace(config, output=str(tmp_path / "whole")))
    process = start_process("term", config, tmp_path, TWO_RANKS)
    assert process.returncode != 0
    said = process.stderr
    once = [line for line in said.splitlines() if line.startswith("beit-fast: ")]
    assert once == ["beit-fast: stopped by SIGTERM after file 6; the same command goes on"], said
    assert "exitcode  : 143" in said
    folder = tmp_path / "tokens"
    # Three rounds of two batches a rank: all of views 0 and 1.
    assert set(contents(folder)) == {n for n in contents(whole) if n < "view_002"}
    run_pretokenize(config)
    assert contents(folder) == contents(whole)
    assert read_manifest(folder).files == read_manifest(whole).files


@pytest.mark.promise("R10")
def test_a_signal_between_batches_ends_it_with_its_code(pretrain_config, cache_of, monkeypatch):
    config = cache_of(pretrain_config())
    tokens = pretokenize._Writer._tokens

    def and_stop(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return tokens(self, batch)

    monkeypatch.setattr(pretokenize._Writer, "_tokens", and_stop)
    with pytest.raises(Interrupted, match="after file 0") as stop:
        run_pretokenize(config)
    assert stop.value.exit_code == 143


@pytest.mark.promise("R17")
def test_a_signal_in_the_wait_for_a_read_ends_it(pretrain_config, cache_of):
    config = cache_of(pretrain_config())
    with told_in_a_read(ImageFolder, 7):
        run_pretokenize(config)
    run_pretokenize(config)


@pytest.mark.promise("R7")
def test_a_full_disk_names_the_file_and_keeps_the_others(
    pretrain_config, cache_of, tmp_path, monkeypatch
):
    config = cache_of(pretrain_config())
    save, calls = np.save, []

    def full(file, records, **options):
        calls.append(0)
        if len(calls) == 4:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, records, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match=r"view_001_image_00000000.npy not written .*MiB free"):
            run_pretokenize(config)
    folder = tmp_path / "tokens"
    assert len(read_manifest(folder).files) == 3
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".tmp") == []
    run_pretokenize(config)
    assert len(read_manifest(folder).files) == 6


def test_a_damaged_file_is_refused_by_name_and_made_anew_alone(
    pretrain_config, cache_of, tmp_path, caplog
):
    config = pretrain_config()
    folder = run_pretokenize(cache_of(config))
    whole = contents(folder)
    path = folder / "view_001_image_00000005.npy"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokenCacheError, match=r"view_001_image_00000005.npy is damaged.*again"):
        PretrainTask(replace(config, tokenizer=None, token_cache=str(folder)), None, ALONE)
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.npy") if p != path}
    run_pretokenize(cache_of(config))
    assert "view_001_image_00000005.npy is damaged" in caplog.text
    assert contents(folder) == whole
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_views_can_be_added_and_not_taken_away(pretrain_config, cache_of, tmp_path):
    config = pretrain_config()
    folder = run_pretokenize(cache_of(config, num_views=1))
    before = contents(folder)
    run_pretokenize(cache_of(config, num_views=2))
    assert before.items() < contents(folder).items()
    run_pretokenize(cache_of(config, num_views=2))  # finished: nothing to do
    whole = run_pretokenize(cache_of(config, output=str(tmp_path / "whole")))
    assert contents(folder) == contents(whole)
    with pytest.raises(TokenCacheError, match="pass --num_views 2 or more"):
        run_pretokenize(cache_of(config, num_views=1))


def test_tokens_of_something_else_are_refused_before_a_tokenizer_is_trained(
    pretrain_config, cache_of, monkeypatch
):
    run_pretokenize(cache_of(pretrain_config()))
    stage = replace(recipes.demo_tokenizer(), dvae=DvaeConfig(vocab_size=32))
    changed = {"tokenizer": None, "tokenizer_training": stage}
    trained = "beit_fast.tasks.pretrain.pipeline.train_tokenizer"
    monkeypatch.setattr(trained, lambda *_: pytest.fail("it was trained"))
    with pytest.raises(TokenCacheError, match="seed"):
        run_pretokenize(cache_of(pretrain_config(**changed, run={"seed": 3})))
    with pytest.raises(ValueError, match=r"pass --views\.token_size"):
        run_pretokenize(cache_of(pretrain_config(**changed, views={"token_size": 64})))


@pytest.mark.promise("R23")
def test_two_writers_do_not_share_a_folder(pretrain_config, cache_of, tmp_path):
    with (
        sole_user(tmp_path / "tokens"),
        pytest.raises(ValueError, match=r"is in use by process .* another --output"),
    ):
        run_pretokenize(cache_of(pretrain_config()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"predict": "pixels"}, "tokenizer": None}, "tokens are made by a tokenizer"),
        ({"token_cache": "other", "tokenizer": None}, "tokens are made by a tokenizer"),
        ({"model": {"vocab_size": 65537}}, "65537 codes do not fit"),
    ],
)
def test_what_cannot_be_pretokenized_is_refused(pretrain_config, cache_of, changes, message):
    config = pretrain_config(**changes)
    with pytest.raises(ValueError, match=message):
        cache_of(config)


@pytest.mark.parametrize("name", ["num_views", "images_per_shard"])
def test_sizes_below_one_are_refused(pretrain_config, cache_of, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        cache_of(pretrain_config(), **{name: 0})
