"""A folder that grows or shrinks between runs: refused with what changed, or gone on with."""

import shutil

import pytest

from beit_fast.data.listing import Listing
from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.pretrain.pretokenize import run_pretokenize
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.train.state import CheckpointError, checkpoint_paths, read_manifest
from task_runs import assert_the_same_run, records_of, stopped_in_step

ADDED = ["class_0/20.jpg", "class_0/22.jpg", "class_1/21.jpg", "class_1/23.jpg"]
GONE = ["class_1/11.jpg"]
STEPS, CHANGED = 14, 4  # of 3 images: the second pass over 12 is begun, and ends after step 8
ACCEPTED = {"resume_with": ("data.images",)}


@pytest.fixture
def images(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "images")


def grow(folder) -> None:
    for number, name in enumerate(ADDED):
        shutil.copy(folder / f"class_0/{2 * number}.jpg", folder / name)


def shrink(folder) -> None:
    for name in GONE:
        (folder / name).unlink()


@pytest.fixture
def config_of(pretrain_config, images, tmp_path):
    def make(output="run", batch_size=3, path=images, **run):
        return pretrain_config(
            data={"path": str(path), "batch_size": batch_size, "num_threads": 1},
            optim={"warmup_steps": 1},
            run={"output": str(tmp_path / output), "steps": STEPS, "keep": 9} | run,
        )

    return make


@pytest.fixture
def read_by(monkeypatch):
    """`read_by(config)`: run it, and give the names of the images of its steps."""

    def run(config, stop=None):
        seen, prepare = [], PretrainTask.prepare
        with monkeypatch.context() as patch:
            patch.setattr(PretrainTask, "evaluate", lambda self, model: {"loss": 1.0})
            patch.setattr(PretrainTask, "picture", lambda self, model, path: path.touch())
            patch.setattr("beit_fast.tasks.pretrain.pipeline._summarise", lambda *_: None)

            def note(self, batch):
                numbers = batch["sample_index"].tolist()
                seen.extend(self.loader.source.key(number) for number in numbers)
                return prepare(self, batch)

            patch.setattr(PretrainTask, "prepare", note)
            if stop is None:
                run_pretraining(config)
            else:
                with stopped_in_step(PretrainTask, stop):
                    run_pretraining(config)
        return seen

    return run


def parts_of(output) -> list[list[int]]:
    """Of the newest checkpoint: first sample, pass and number of images."""
    parts = read_manifest(checkpoint_paths(output)[-1])["images"]
    return [[part[name] for name in ("first", "epoch", "count")] for part in parts]


@pytest.mark.promise("R1")
def test_another_folder_is_refused_and_on_request_gone_on_with_from_the_next_pass_on(
    config_of, read_by, images, tmp_path, capsys
):
    before = sorted(str(path.relative_to(images)) for path in images.rglob("*.jpg"))
    first = read_by(config_of(), stop=CHANGED + 1)
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    first += read_by(config_of("undisturbed"))[len(first) : 24]  # the rest of the second pass
    assert sorted(first[:12]) == sorted(first[12:]) == before

    grow(images)
    shrink(images)
    with pytest.raises(CheckpointError) as refused:
        run_pretraining(config_of())
    assert str(refused.value) == (
        f"{tmp_path}/run/checkpoints/step_{CHANGED + 1:08} belongs to a run over other images "
        "(data.images: 4 images were added (class_0/20.jpg, class_0/22.jpg, class_1/21.jpg, ...), "
        "1 image is gone (class_1/11.jpg)): restore the folder, give another --run.output, or "
        "accept it from the next pass on: --run.resume_with '[data.images]'"
    )
    capsys.readouterr()
    rest = read_by(config_of(**ACCEPTED))
    said = capsys.readouterr().out
    assert "from step 5 on, data.images: 4 images were added" in said
    assert "pass 1 goes on over the 12 images of before, 1 of which is gone" in said
    old, new = rest[:9], rest[9:]
    wanted = first[15:24]
    assert [a for a, b in zip(old, wanted, strict=True) if b not in GONE] == [
        name for name in wanted if name not in GONE
    ]
    now = sorted({*before, *ADDED} - {*GONE})
    assert sorted(new[:15]) == now
    assert parts_of(tmp_path / "run") == [[0, 0, 12], [24, 2, 15]]
    (entry,) = read_manifest(checkpoint_paths(tmp_path / "run")[-1])["history"]
    assert entry["step"] == 5
    assert [*entry["changed"]] == ["data.images"]
    epochs = {record["step"]: record["epoch"] for record in records_of(tmp_path / "run")}
    assert epochs[8] == 2.0
    assert epochs[14] == pytest.approx(2 + 18 / 15)
    lists = {path.name.partition(".")[0] for path in (tmp_path / "run/images").iterdir()}
    assert lists == {
        p["images"] for p in read_manifest(checkpoint_paths(tmp_path / "run")[-1])["images"]
    }

    # Stopped in the old pass and in the new one, and with other micro-batches: the same run.
    shutil.copytree(tmp_path / "stopped", tmp_path / "parts")
    read = read_by(config_of("parts", **ACCEPTED), stop=7)
    read += read_by(config_of("parts"), stop=10)
    read += read_by(config_of("parts", batch_size=1, accumulate=3))
    assert read == rest
    shutil.rmtree(tmp_path / "parts")
    shutil.copytree(tmp_path / "stopped", tmp_path / "parts")
    read_by(config_of("parts", **ACCEPTED), stop=7)
    read_by(config_of("parts"))
    assert_the_same_run(tmp_path / "parts", tmp_path / "run")


def test_a_few_that_are_removed_or_repaired_need_no_word(config_of, read_by, images, tmp_path):
    """As errors about unusable images advise."""
    config = config_of(steps=CHANGED)
    read_by(config)
    shrink(images)
    path = images / "class_0/0.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    read_by(config_of(steps=CHANGED + 2))
    assert parts_of(tmp_path / "run") == [[0, 0, 12], [12, 1, 11]]
    (entry,) = read_manifest(checkpoint_paths(tmp_path / "run")[-1])["history"]
    assert {"data.images", "run.steps"} == entry["changed"].keys()


def test_images_that_were_made_anew_are_another_data_set(config_of, read_by, images):
    read_by(config_of(steps=2))
    for path in images.rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="12 images have another size") as refused:
        run_pretraining(config_of())
    assert "class_0/0.jpg, class_0/10.jpg, class_0/2.jpg, ..." in str(refused.value)
    read_by(config_of(**ACCEPTED))


def test_a_folder_that_moved_has_the_same_images(config_of, read_by, images, tmp_path):
    read_by(config_of(steps=2))
    images.rename(tmp_path / "moved")
    read_by(config_of(path=tmp_path / "moved", steps=3))
    (entry,) = read_manifest(checkpoint_paths(tmp_path / "run")[-1])["history"]
    assert [*entry["changed"]] == ["run.steps"]


def test_without_the_list_of_before_their_number_is_said(config_of, read_by, images, tmp_path):
    read_by(config_of(), stop=CHANGED)
    (kept,) = (tmp_path / "run/images").iterdir()
    kept.unlink()
    read_by(config_of(), stop=CHANGED + 1)  # of the same images it is written again
    assert kept.exists()
    kept.write_bytes(b"")
    grow(images)
    with pytest.raises(CheckpointError) as refused:
        run_pretraining(config_of())
    assert (
        "(data.images: they are others than the 12 of before, which are not known "
        f"({kept} is damaged: its SHA-256 is not the one it is named by)): restore the folder"
    ) in str(refused.value)
    read_by(config_of(**ACCEPTED))
    assert parts_of(tmp_path / "run") == [[0, 0, 12], [15, 2, 16]]


def test_tokens_of_a_cache_are_of_one_list(config_of, read_by, cache_of, images, tmp_path):
    def cached(folder):
        return {"token_cache": str(folder), "tokenizer": None}

    def with_cache(folder, **run):
        return type(config_of())(**vars(config_of(**run)) | cached(folder))

    first = run_pretokenize(cache_of(config_of(), num_views=1))
    read_by(with_cache(first, steps=2))
    grow(images)
    second = run_pretokenize(cache_of(config_of(), num_views=1, output=str(tmp_path / "anew")))
    for accepted in ({}, ACCEPTED):
        with pytest.raises(CheckpointError, match="tokens of a cache are of one list") as refused:
            run_pretraining(with_cache(second, **accepted))
    assert "4 images were added" in str(refused.value)
    read_by(with_cache(second, output="other", steps=2))  # as the message says
    for name in ADDED:
        (images / name).unlink()
    read_by(with_cache(first, steps=3))


@pytest.mark.promise("R25")
def test_the_same_seed_is_the_same_run_and_another_one_is_not(config_of, read_by, tmp_path):
    read = {}
    for output, seed in (("one", 0), ("same", 0), ("other", 1)):
        read[output] = read_by(config_of(output, seed=seed, steps=4, log_every=1))
    assert_the_same_run(tmp_path / "same", tmp_path / "one")
    assert read["same"] == read["one"] != read["other"]
    one, other = records_of(tmp_path / "one"), records_of(tmp_path / "other")
    assert all(a["loss"] != b["loss"] for a, b in zip(one, other, strict=True))


def test_a_list_is_what_is_kept(config_of, read_by, images, tmp_path):
    read_by(config_of(steps=2))
    (part,) = read_manifest(checkpoint_paths(tmp_path / "run")[-1])["images"]
    kept = Listing.kept(tmp_path / "run/images", part["images"], 12)
    assert [*kept.names] == sorted(kept.names)
    assert all((images / name).stat().st_size == kept.sizes[n] for n, name in enumerate(kept.names))
