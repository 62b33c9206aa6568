"""The experiment's bookkeeping: what is chosen by what, and the table of it."""

from pathlib import Path

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
