"""The experiment's bookkeeping: what is chosen by what, and the table of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def science(bench):
    return bench("science")


def arm(science, name, seed):
    return science.Arm(name, seed, Path("runs"), 1)


def test_settings_are_chosen_by_the_mean_over_seeds(science):
    grids = [{(1e-3, 1.0): 0.8, (3e-3, 1.0): 0.9}, {(1e-3, 1.0): 0.8, (3e-3, 1.0): 0.6}]
    judged = {arm(science, "BEiT", seed): {"grid": grid} for seed, grid in enumerate(grids)}
    judged[arm(science, "pixels", 0)] = {"grid": {(1e-3, 1.0): 0.1, (3e-3, 1.0): 0.9}}
    assert science.choose("BEiT", judged) == (1e-3, 1.0)
    assert science.choose("pixels", judged) == (3e-3, 1.0)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_both_sides_learn_from_the_same_images_the_same_way(science, part):
    configs = [
        science.finetuning_of(arm(science, name, 3), 1e-3, 0.75, part)
        for name in (science.BEIT, science.SCRATCH)
    ]
    trained, scratch = configs
    assert trained.data == scratch.data
    assert trained.data.path == "digits:train:10:3"
    assert trained.data.test == f"digits:{part}"
    assert trained.optim == scratch.optim
    assert trained.model == scratch.model
    assert (trained.init is None, scratch.init is None) == (False, True)
    assert trained.run.output != scratch.run.output


def test_variants_differ_in_what_the_paper_changes_and_nothing_else(science):
    ours = science.pretraining_of(arm(science, science.BEIT, 0))
    for name in science.VARIANTS:
        config = science.pretraining_of(arm(science, name, 0))
        assert config.optim == ours.optim
        assert config.views == ours.views
        assert config.masking.num_masked == ours.masking.num_masked
        assert (config.tokenizer is None) == name.startswith("pixels")
        assert config.run.output != ours.run.output or name == science.BEIT


def test_every_arm_is_judged_by_its_own_weights(science):
    for name in science.VARIANTS:
        trained = arm(science, name, 2)
        ours = science.pretraining_of(trained).run.output
        probe = science.probing_of(trained)
        assert science.finetuning_of(trained, 1e-3, 1.0, "test").init == ours
        assert (probe.checkpoint, probe.weights) == (ours, "model")
    assert science.probing_of(arm(science, science.SCRATCH, 2)).weights == "random"


def test_the_table_has_means_errors_and_paired_differences(bench):
    tables = bench("report_tables")
    shared = {"paper": "", "machine": "CPU", "threads": "1", "processes": "2", "minutes": "9.9",
              "labels_per_class": "10", "torch": "2.11.0", "commit": "abc1234"}  # fmt: skip
    rows = [
        {
            "variant": variant,
            "seed": str(seed),
            "measure": measure,
            "accuracy": str(value),
            **shared,
        }
        for variant, values in (("BEiT", (0.9, 0.8)), ("from scratch", (0.5, 0.5)))
        for measure in ("fine-tuned", "linear", "kNN")
        for seed, value in enumerate(values)
    ]
    table = tables.science_table({"science-evidence": rows})
    assert "| BEiT | 85.0 ± 5.0 |" in table
    assert "| from scratch | 50.0 ± 0.0 |" in table
    assert "| difference, seed by seed | 35.0 ± 5.0 |" in table
    assert "not measured: `python bench/science.py table4`" in table


@pytest.fixture
def segmentation(bench):
    return bench("science_segmentation")


@pytest.mark.parametrize("part", ["valid", "test"])
def test_both_sides_segment_the_same_scenes_the_same_way(science, segmentation, part):
    trained, scratch = (
        segmentation.segmenting_of(arm(science, name, 3), 1e-3, 0.75, part)
        for name in (science.BEIT, science.SCRATCH)
    )
    assert trained.data == scratch.data
    assert trained.data.path == f"digit-scenes:train:{segmentation.LABELLED}:3"
    assert trained.data.test == f"digit-scenes:{part}"
    assert (trained.optim, trained.model) == (scratch.optim, scratch.model)
    assert (trained.optim.lr, trained.layer_decay) == (1e-3, 0.75)
    assert trained.run.steps == scratch.run.steps
    assert (trained.init is None, scratch.init is None) == (False, True)
    assert trained.init == segmentation.pretraining_of(arm(science, science.BEIT, 3)).run.output
    assert trained.run.output != scratch.run.output


def test_pretraining_for_segmentation_sees_no_label_and_no_other_part(science, segmentation):
    config = segmentation.pretraining_of(arm(science, science.BEIT, 1))
    assert config.data.path == "digit-scenes:train"
    assert config.tokenizer == str(segmentation.tokenizer_of(arm(science, science.BEIT, 1)))
    assert config.run.seed == 1


def test_what_came_out_is_kept_and_not_repeated(science, segmentation, tmp_path, monkeypatch):
    """Every setting of the grid runs once, from the one pre-training, on scenes to choose by."""
    ran = []

    def run(config):
        ran.append((config.optim.lr, config.layer_decay, config.data.test))
        return SimpleNamespace(raw=SimpleNamespace(miou=0.25))

    monkeypatch.setattr(segmentation, "train_tokenizer", lambda *_: None)
    monkeypatch.setattr(segmentation, "run_pretraining", lambda config: None)
    monkeypatch.setattr(segmentation, "run_segmentation", run)
    one = science.Arm(science.BEIT, 0, tmp_path, 1)
    one.folder.mkdir(parents=True)
    first, again = segmentation.train_and_judge(one), segmentation.train_and_judge(one)
    assert ran == [(*setting, "digit-scenes:valid") for setting in segmentation.GRID]
    assert first == again
    assert first["grid"] == dict.fromkeys(segmentation.GRID, 0.25)


def test_the_table_of_segmentation_has_means_errors_and_paired_differences(bench):
    tables = bench("report_tables")
    shared = {"machine": "CPU", "threads": "1", "processes": "2", "minutes": "", "torch": "2.11.0",
              "cpu_minutes": "30.0", "labelled_scenes": "50", "commit": "abc1234"}  # fmt: skip
    values = {"BEIT": (0.5, 0.6), "from scratch": (0.2, 0.4)}
    rows = [
        {"variant": variant, "seed": str(seed), "measure": "mIoU", "value": str(value)}
        | {"validation": "0.5", "setting": "lr 0.003 decay 1", **shared}
        for variant, found in values.items()
        for seed, value in enumerate(found)
    ]
    table = tables.science_segmentation_table({"science-segmentation": rows})
    assert "| weights at the start | chosen on validation | mIoU |" in table
    assert "| BEIT | lr 0.003 decay 1 | 55.0 ± 5.0 |" in table
    assert "| from scratch | lr 0.003 decay 1 | 30.0 ± 10.0 |" in table
    assert "| difference, seed by seed | | 25.0 ± 5.0 |" in table
    assert "30.0 minutes of one core" in " ".join(table.split())
    assert tables.science_segmentation_table({}) == (
        "not measured: `python bench/science.py segmentation`"
    )


def test_the_picture_has_a_row_for_each_side_and_is_small(
    science, segmentation, tmp_path, monkeypatch
):
    opened = []
    found = SimpleNamespace(model=None, slide=None, statistics=None)
    monkeypatch.setattr(
        segmentation, "open_segmenter", lambda config: opened.append(config.checkpoint) or found
    )
    monkeypatch.setattr(
        segmentation, "segment_image", lambda _, image, *settings: image[..., 0].long() // 25
    )
    names = (science.BEIT, science.SCRATCH)
    arms = [arm(science, name, seed) for seed in (1, 0) for name in names]
    chosen = {science.BEIT: (1e-2, 0.75), science.SCRATCH: (2e-2, 1.0)}
    path = segmentation.draw(arms, chosen, tmp_path / "images" / "picture.png")
    assert opened == [
        "runs/seed0/BEiT/segmenting_0.01_0.75", "runs/seed0/from_scratch/segmenting_0.02_1",
    ]  # fmt: skip
    assert 10_000 < path.stat().st_size < 60_000
