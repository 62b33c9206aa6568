"""A pre-training run from start to end: tokenizer, BEiT, curve, picture, and what it came to."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from beit_fast.flags import flags_of
from beit_fast.tasks.pretrain.config import DvaeTrainingConfig, PretrainConfig
from beit_fast.tasks.pretrain.dvae import TOKENIZER, finished_tokenizer, train_tokenizer
from beit_fast.tasks.pretrain.task import PretrainTask, TokensToCome
from beit_fast.tasks.sources import describe_source, say, task_settings
from beit_fast.tokenizer.checkpoint import load_tokenizer, tokenizer_digest
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.aside import Aside
from beit_fast.train.log import METRICS, plain_console, read_metrics
from beit_fast.train.loop import SAVED, Outcome, train
from beit_fast.train.preflight import check_run
from beit_fast.train.start import open_run
from beit_fast.train.state import CheckpointError, checkpoint_paths, newest_manifest
from beit_fast.train.stop import stop_signals
from beit_fast.train.world import World
from beit_fast.viz.curves import draw_curves

# Settings of the tokenizer's training that are the run's own, wherever it trains one first.
OUTER_FLAGS = (
    *("run.output", "run.device", "run.cpu_threads", "data.path"),
    *("run.timeout", "run.startup_timeout", "run.requeue"),
)
CLEAR_GAIN = 0.05  # share of the marginals' entropy; less could be positions, not content


def run_pretraining(config: PretrainConfig) -> Outcome:
    """Train as `config` says, resume where it was left, and print where the results are.

    What BEiT's own training would refuse is found before a tokenizer is trained for it. Raises
    ValueError (also CheckpointError), OSError, BadDataError, NonFiniteLoss, CaptureError,
    Interrupted.
    """
    with open_run(config, config.run.output) as world, stop_signals() as stop:
        stage = tokenizer_stage(config)
        finished = finished_tokenizer(stage) if stage is not None else None
        left = sole_tokenizer(stage, config) if stage is not None and finished is None else None
        file = finished or left
        to_train = stage is not None and file is None
        if to_train:
            tokenizer = TokensToCome(stage.dvae.vocab_size)
        elif file is not None:
            tokenizer = load_tokenizer(file)
        else:
            tokenizer = None if config.token_cache is not None else open_tokenizer(config, world)
        task = PretrainTask(config, tokenizer, world)
        say(f"images: {describe_source(task.loader.source)}", world)
        console = plain_console(quiet=not world.is_main)
        if finished is not None:
            console.print(f"tokenizer: its training is finished, {file} is used")
        elif left is not None:
            console.print(
                f"tokenizer: {file} is used, the one that the checkpoints were trained with; of "
                "its own training no checkpoint is left"
            )
        if task.cache is not None:
            console.print(
                f"tokens of {task.cache.num_views} views come from {config.token_cache}; "
                f"evaluation is on {task.evaluated_on}"
            )
        run = (task, config.optim, config.run)
        if to_train:
            check_run(
                *run,
                settings=settings_of(task, None),
                world=world,
                unknown={"tokenizer"},
                step=True,
            )
            keep_tokenizer(stage, config)
            tokenizer = load_tokenizer(train_first(stage, world))
            stop.leave(world, "between the tokenizer's training and BEiT's")
            task.use(tokenizer)
        settings = settings_of(task, tokenizer)
        check_run(*run, settings=settings, world=world)
        outcome = train(*run, settings=settings, world=world, config=config)
        if world.is_main:
            aside = Aside(world, strict=config.run.strict)
            with aside.work("the summary"):
                _summarise(task, outcome, config)
        stop.leave(world, f"after step {outcome.num_steps}", SAVED)
        return outcome


def settings_of(task: PretrainTask, tokenizer: Dvae | None) -> dict[str, Any]:
    """What the weights depend on; the tokenizer by its weights, for its file may move and another
    may come in its place."""
    settings = task_settings(task.config)
    del settings["tokenizer_training"]
    settings["tokenizer"] = tokenizer_digest(tokenizer) if tokenizer is not None else None
    settings["token_cache"] = None
    if task.cache is not None:
        settings["tokenizer"] = task.cache.manifest.made_from["tokenizer"]["weights"]
        settings["token_cache"] = task.cache.num_views
    return settings


def tokenizer_stage(config: PretrainConfig) -> DvaeTrainingConfig | None:
    """How the tokenizer is trained first, in a folder of the run; None: it is not."""
    if config.tokenizer_training is None:
        return None
    training = config.tokenizer_training
    output = str(Path(config.run.output) / "tokenizer")
    data = training.data
    if not data.path:
        links = data.follow_links and config.data.follow_links
        # Of the same images, whose indices and copies lie in one place and have one limit.
        order = config.data if data.shuffle == "full" else data
        kept = data if data.cache else config.data
        data = replace(
            data,
            path=config.data.path,
            follow_links=links,
            shuffle=order.shuffle,
            window=order.window,
            cache=kept.cache,
            cache_size=kept.cache_size,
        )
    return replace(training, data=data, run=replace(training.run, output=output))


def open_tokenizer(config: PretrainConfig, world: World) -> Dvae | None:
    """The tokenizer that the configuration names, trained first where it says how; None for a model
    that predicts pixels."""
    if config.model.predict == "pixels":
        return None
    stage = tokenizer_stage(config)
    if stage is None:
        return load_tokenizer(config.tokenizer)
    return load_tokenizer(finished_tokenizer(stage) or train_first(stage, world))


def sole_tokenizer(stage: DvaeTrainingConfig, config: PretrainConfig) -> Path | None:
    """The file of a tokenizer that BEiT's checkpoints were trained with, and whose own are gone:
    trained anew it could be another, and would be written over it. None: there is no such file."""
    output = Path(stage.run.output)
    trained, file = newest_manifest(Path(config.run.output)), output / TOKENIZER
    if trained is None or checkpoint_paths(output) or not file.is_file():
        return None
    if "tokenizer" in config.run.resume_with:
        return None
    same = tokenizer_digest(load_tokenizer(file)) == trained["settings"].get("tokenizer")
    return file if same else None


def keep_tokenizer(stage: DvaeTrainingConfig, config: PretrainConfig) -> None:
    """Raise CheckpointError where more training would write over the tokenizer that BEiT's
    checkpoints were trained with: BEiT could not go on, and the tokenizer would be gone."""
    trained = newest_manifest(Path(config.run.output))
    before = newest_manifest(Path(stage.run.output))
    file = Path(stage.run.output) / TOKENIZER
    if trained is None or before is None or not file.is_file():
        return
    if "tokenizer" in config.run.resume_with:
        return
    more = stage.run.resume_from is not None
    if stage.run.steps is not None:
        more = more or before["step"] < stage.run.steps
    else:
        more = more or before["settings"].get("run", {}).get("epochs") != stage.run.epochs
    if more and tokenizer_digest(load_tokenizer(file)) == trained["settings"].get("tokenizer"):
        raise CheckpointError(
            f"{file} would be trained on and written over, and the checkpoints in "
            f"{config.run.output} were trained with it as it is: restore the settings of "
            "--tokenizer_training, give another --run.output, or accept another tokenizer from "
            "here on: --run.resume_with '[tokenizer]'"
        )


def train_first(stage: DvaeTrainingConfig, world: World) -> Path:
    """`train_tokenizer` as a stage of another task, whose flags its messages name."""
    with flags_of("tokenizer_training", OUTER_FLAGS):
        return train_tokenizer(stage, world)


def _summarise(task: PretrainTask, outcome: Outcome, config: PretrainConfig) -> None:
    output = Path(config.run.output)
    vocab_size = config.model.vocab_size if task.predicts_tokens else None
    result = task.evaluate(outcome.model)
    console = plain_console()
    console.print(f"\nAfter {outcome.num_steps} steps, on {task.evaluated_on}", style="bold")
    if vocab_size is None:
        console.print(f"  squared error of the pixels  {result['loss']:.4f}")
    else:
        entropy, loss, accuracy = result["marginal_entropy"], result["loss"], result["accuracy"]
        console.print(
            f"  loss      {loss:.3f} nats  chance ln V = {math.log(vocab_size):.3f}, "
            f"entropy of the token marginals = {entropy:.3f}\n"
            f"  accuracy  {accuracy:.1%}  chance 1/V = {1 / vocab_size:.2%}"
        )
        said, style = _verdict(entropy - loss, entropy)
        console.print(f"  {said}", style=style)
    if bad := task.loader.bad_samples:
        console.print(f"  {len(bad)} images could not be used and were replaced: {', '.join(bad)}")
    if said := str(task.loader.decode_counts):
        console.print(f"  {said}")
    for failed in outcome.failed:
        console.print(f"  failed, beside training: {failed}")
    curve = draw_curves(read_metrics(output / METRICS), output / "curve.png", vocab_size=vocab_size)
    for name, path in (
        ("checkpoint", outcome.checkpoint),
        ("metrics", output / METRICS),
        ("curve", curve),
        ("picture", outcome.picture),
    ):
        console.print(f"  {name:10} {path}")


def _verdict(gain: float, entropy: float) -> tuple[str, str]:
    """What a loss `gain` nats below the marginals' entropy says of the model, and its colour."""
    if gain > CLEAR_GAIN * entropy:
        return f"{gain:.3f} nats below the marginals: it predicts from context", "green"
    if gain > 0:
        return f"{gain:.3f} nats below the marginals: it knows little more than them", "red"
    return f"{-gain:.3f} nats above the marginals: it has not learnt even those", "red"
