"""A pre-training run from start to end: tokenizer, BEiT, curve, picture, and what it came to."""

import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from beit_fast.tasks.dvae import train_tokenizer
from beit_fast.tasks.pretrain import PretrainConfig, PretrainTask
from beit_fast.tasks.sources import describe_source, lasting_settings, say
from beit_fast.tokenizer.checkpoint import load_tokenizer, tokenizer_digest
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.log import METRICS, read_metrics
from beit_fast.train.loop import Outcome, train
from beit_fast.train.parallel import World, open_world
from beit_fast.viz.curves import draw_curves

CLEAR_GAIN = 0.05  # share of the marginals' entropy; less could be positions, not content


def run_pretraining(config: PretrainConfig) -> Outcome:
    """Train as `config` says, resume where it was left, and print where the results are.

    Raises ValueError (also CheckpointError), OSError, NonFiniteLoss, CaptureError, Interrupted.
    """
    with open_world(config.run.device, config.run.cpu_threads) as world:
        tokenizer = None if config.token_cache is not None else open_tokenizer(config, world)
        task = PretrainTask(config, tokenizer, world)
        say(f"images: {describe_source(task.loader.source)}", world)
        console = Console(highlight=False, soft_wrap=True, quiet=not world.is_main)
        if task.cache is not None:
            console.print(
                f"tokens of {task.cache.num_views} views come from {config.token_cache}; "
                f"evaluation is on {task.evaluated_on}"
            )
        # The tokenizer by its weights: its file may move, and another may come in its place.
        settings = lasting_settings(config)
        del settings["tokenizer_training"], settings["grad_checkpointing"]
        settings["tokenizer"] = tokenizer_digest(tokenizer) if tokenizer is not None else None
        settings["token_cache"] = None
        if task.cache is not None:
            settings["tokenizer"] = task.cache.manifest.made_from["tokenizer"]["weights"]
            settings["token_cache"] = task.cache.num_views
        outcome = train(task, config.optim, config.run, settings=settings, world=world)
        if world.is_main:
            _summarise(task, outcome, config)
        return outcome


def open_tokenizer(config: PretrainConfig, world: World) -> Dvae | None:
    """The tokenizer that the configuration names, trained first where it says how; None for a model
    that predicts pixels."""
    if config.model.predict == "pixels":
        return None
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    training = config.tokenizer_training
    output = str(Path(config.run.output) / "tokenizer")
    data = training.data
    if not data.path:
        links = data.follow_links and config.data.follow_links
        data = replace(data, path=config.data.path, follow_links=links)
    training = replace(training, data=data, run=replace(training.run, output=output))
    return load_tokenizer(train_tokenizer(training, world))


def _summarise(task: PretrainTask, outcome: Outcome, config: PretrainConfig) -> None:
    output = Path(config.run.output)
    records = read_metrics(output / METRICS)
    vocab_size = config.model.vocab_size if task.predicts_tokens else None
    curve = draw_curves(records, output / "curve.png", vocab_size=vocab_size)
    result = task.evaluate(outcome.model)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]After {outcome.num_steps} steps, on {task.evaluated_on}[/]")
    if vocab_size is None:
        console.print(f"  squared error of the pixels  {result['loss']:.4f}")
    else:
        entropy, loss, accuracy = result["marginal_entropy"], result["loss"], result["accuracy"]
        console.print(
            f"  loss      {loss:.3f} nats  chance ln V = {math.log(vocab_size):.3f}, "
            f"entropy of the token marginals = {entropy:.3f}\n"
            f"  accuracy  {accuracy:.1%}  chance 1/V = {1 / vocab_size:.2%}"
        )
        console.print(f"  {_verdict(entropy - loss, entropy)}")
    if bad := task.loader.bad_samples:
        console.print(f"  {len(bad)} images could not be used and were replaced: {', '.join(bad)}")
    for name, path in (
        ("checkpoint", outcome.checkpoint),
        ("metrics", output / METRICS),
        ("curve", curve),
        ("picture", outcome.picture),
    ):
        console.print(f"  {name:10} {path}")


def _verdict(gain: float, entropy: float) -> str:
    """What a loss `gain` nats below the marginals' entropy says of the model, in rich's markup."""
    if gain > CLEAR_GAIN * entropy:
        return f"[green]{gain:.3f} nats below the marginals: it predicts from context[/]"
    if gain > 0:
        return f"[red]{gain:.3f} nats below the marginals: it knows little more than them[/]"
    return f"[red]{-gain:.3f} nats above the marginals: it has not learnt even those[/]"
