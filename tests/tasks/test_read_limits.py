"""Whoever reads many images has a limit of time for each, and passes it on."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

import beit_fast
from beit_fast.data.config import DataConfig
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.recipes import finetune, pretrain, segment, tokenizer
from beit_fast.tasks.evaluate.config import EvaluateConfig, PredictConfig
from beit_fast.tasks.finetune.config import LabelledDataConfig
from beit_fast.tasks.probe.config import ProbeConfig
from beit_fast.tasks.segment.config import SegmentationDataConfig
from beit_fast.tasks.segment.config_evaluation import (
    EvaluateSegmentationConfig,
    PredictSegmentationConfig,
)
from task_runs import with_fields

pytestmark = pytest.mark.promise("R17")
# What reads many images, if it is called: with limits, which default to what no setting says.
READERS = {
    *("Loader", "unusable_images", "batches_in_order", "ids_of_masks", "open_segmentation"),
    *("evaluate_classifier", "evaluate_segmenter", "cached_features", "MaskedFolder"),
    *("check_test_images", "check_segmentation", "Reads"),
}


@pytest.mark.parametrize(
    "config",
    [
        *(DataConfig, LabelledDataConfig, SegmentationDataConfig, ProbeConfig),
        *(EvaluateConfig, PredictConfig, EvaluateSegmentationConfig, PredictSegmentationConfig),
    ],
)
def test_every_verb_that_reads_images_has_the_settings(config):
    assert issubclass(config, ReadConfig)


def test_every_call_that_reads_many_images_passes_the_limits():
    calls = 0
    for path in Path(beit_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in READERS:
                calls += 1
                passed = {keyword.arg for keyword in node.keywords} & {"reads", None}
                given = node.func.id in ("Reads", "ids_of_masks") and len(node.args) == 2
                assert passed or given, f"{path}:{node.lineno} passes no limits"
    assert calls > 15


RECIPES = {
    "pretrain": pretrain.demo,
    "tokenizer": tokenizer.demo_tokenizer,
    "finetune": finetune.small_data,
    "segment": segment.small_data,
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_limit_that_outlasts_the_run_is_refused_and_both_remedies_work(recipe):
    config = recipe()
    with pytest.raises(ValueError, match="a file that hangs would end the run before") as error:
        with_fields(config, data={"read_timeout": 300.0})
    message = str(error.value)
    assert message.startswith("--data.read_timeout is 300 s and --run.timeout 300 s: ")
    assert "pass a --data.read_timeout below 300, or a larger --run.timeout" in message
    with_fields(config, data={"read_timeout": 299.0})
    with_fields(config, data={"read_timeout": 300.0}, run={"timeout": 301.0})


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_whoever_sets_the_time_out_alone_gets_a_limit_below_it(recipe):
    assert with_fields(recipe(), run={"timeout": 9.0}).data.read_timeout == 4.5
    assert with_fields(recipe(), run={"timeout": 60.0}).data.read_timeout == 30
    assert with_fields(recipe(), run={"timeout": 61.0}).data.read_timeout == 60
    given = with_fields(recipe(), data={"read_timeout": 5.0}, run={"timeout": 9.0})
    assert given.data.read_timeout == 5


def test_the_time_out_of_a_run_holds_in_its_tokenizer_too():
    config = with_fields(pretrain.demo(), run={"timeout": 9.0})
    assert config.tokenizer_training.data.read_timeout == 4.5
    data = replace(config.tokenizer_training.data, read_timeout=70.0)
    with pytest.raises(ValueError, match="before it is replaced") as error:
        with_fields(config, tokenizer_training={"data": data}, run={"timeout": 65.0})
    message = str(error.value)
    assert message.startswith("--tokenizer_training.data.read_timeout is 70 s and --run.timeout 65")
    data = replace(data, read_timeout=64.0)
    with_fields(config, tokenizer_training={"data": data}, run={"timeout": 65.0})
