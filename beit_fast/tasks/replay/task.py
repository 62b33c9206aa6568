"""`beit-fast replay`: a run's step again, beside what its files say of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from beit_fast.files import replace_file
from beit_fast.tasks.architecture import as_begun
from beit_fast.tasks.finetune.task import FinetuneTask
from beit_fast.tasks.pretrain.dvae import TOKENIZER, DvaeTask
from beit_fast.tasks.pretrain.pipeline import tokenizer_stage
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tasks.replay.config import Replay as Wanted
from beit_fast.tasks.segment.init import OF_HEAD
from beit_fast.tasks.segment.training import SegmentTask
from beit_fast.tokenizer.checkpoint import load_tokenizer, tokenizer_digest
from beit_fast.train.bad_steps import plain, read_record, record_path
from beit_fast.train.config import RunConfig
from beit_fast.train.images import follow_again
from beit_fast.train.length import Length
from beit_fast.train.log import METRICS, plain_console, read_metrics
from beit_fast.train.optim import warmup_steps
from beit_fast.train.replay import Replay, Replayed, newest_before
from beit_fast.train.state import Checkpoint, CheckpointError, newest_manifest
from beit_fast.train.stop import stop_signals
from beit_fast.train.task import Task
from beit_fast.train.world import World, open_world

SHOWN = 8  # samples in a line
CLOSE = 1e-3  # of loss and norm, relative: rounding and the order of sums


def run_replay(wanted: Wanted) -> dict[str, Any]:
    """Take the step again, print what was found, and return it as plain data.

    Raises ValueError (also CheckpointError) where the run's files do not allow it, OSError,
    Interrupted.
    """
    output, step = Path(wanted.wanted.run), wanted.wanted.step
    config = replace(wanted.config, run=replace(wanted.config.run, output=str(output)))
    checkpoint = newest_before(output, step)
    record = _record_of(output, step)
    manifest = newest_manifest(output) if checkpoint is None else checkpoint.manifest
    of_run = {} if manifest is None else manifest["settings"]["run"]
    ranks, accumulate, batch_size = _split(wanted.wanted.ranks, record, of_run, config)
    config = replace(
        config,
        data=replace(config.data, batch_size=batch_size),
        run=replace(config.run, accumulate=accumulate),
    )
    run = config.run
    console = plain_console()
    with open_world(run.device, run.cpu_threads) as world, stop_signals():
        task, as_one = _task(wanted.verb, config, checkpoint, ranks, world)
        if manifest is not None:  # of the run's beginning too, whose images a later one knows
            done = 0 if checkpoint is None else checkpoint.step
            sample = done * task.images_per_batch * (1 if as_one else ranks) * accumulate
            follow_again(task, manifest, output, sample, run.resume_with)
        length = _length(task, config, checkpoint, step, ranks, as_one)
        if step > length.num_steps:
            raise ValueError(f"step {step} of a run of {length.num_steps}: give one that it took")
        replay = Replay(
            task,
            config.optim,
            run,
            checkpoint,
            ranks=ranks,
            as_one=as_one,
            world=world,
            length=length,
        )
        where = "the run's beginning" if checkpoint is None else str(checkpoint.path)
        split = (
            f"{ranks} rank{'s' * (ranks > 1)} x {accumulate} micro-batch{'es' * (accumulate > 1)}"
        )
        console.print(f"step {step} of {output} ({wanted.verb}), {split}, from {where}")
        if step - 1 > replay.start:
            console.print(f"first the steps before it, {replay.start + 1} to {step - 1}")
        replayed = replay.step(step)
        files = {i: task.sample_name(i) for _, _, samples in replayed.batches for i in samples}
    compared = _compared(replayed, record)
    for line in _lines(replayed, record, compared, files):
        console.print(line)
    found = _plain(replayed, record, compared, files) | {"checkpoint": where, "verb": wanted.verb}
    if wanted.wanted.json is not None:
        text = json.dumps(found, indent=1, allow_nan=False)
        replace_file(Path(wanted.wanted.json), lambda file: file.write(text.encode()))
    return found


def _record_of(output: Path, step: int) -> dict[str, Any]:
    """What the run's files say of the step: that of a bad one, or the line of metrics where it is
    of this step alone. Empty: nothing."""
    if (path := record_path(output, step)).exists():
        return read_record(path) | {"from": str(path)}
    lines = read_metrics(output / METRICS) if (output / METRICS).exists() else []
    lines = [line for line in lines if "loss" in line]
    for before, line in zip([{"step": 0}, *lines], lines, strict=False):
        if line["step"] == step and before["step"] == step - 1:
            kept = {name: line[name] for name in ("loss", "grad_norm") if name in line}
            return kept | {"from": str(output / METRICS)}
    return {}


def _split(
    given: int | None, record: Mapping[str, Any], of_run: Mapping[str, Any], config: Any
) -> tuple[int, int, int]:
    """Ranks, micro-batches and their images, which belong together: of the step, else of the
    checkpoint. Another split, as the configuration may have since, would be other steps."""
    size = of_run.get("images_per_batch")
    if "world_size" in record:
        of_run = record
        batches = [batch for rank in record["ranks"] for batch in rank["micro_batches"]]
        size = max((len(batch["samples"]) for batch in batches if batch["samples"]), default=size)
    ranks = given or of_run.get("world_size") or 1
    return (
        ranks,
        of_run.get("accumulate") or config.run.accumulate,
        size or config.data.batch_size,
    )


def _task(
    verb: str, config: Any, checkpoint: Checkpoint | None, ranks: int, world: World
) -> tuple[Task, bool]:
    """The run's task, and whether its batches are those of all ranks together.

    Where there is a checkpoint the weights are its, and so is the architecture: what training
    started from need not be there any more. From the beginning it has to.
    """
    settings = None if checkpoint is None else checkpoint.manifest["settings"]
    if settings is None and verb in ("finetune", "segment"):  # whose output would stand for it
        config = replace(config, run=replace(config.run, output=f"{config.run.output}/nothing"))
    if verb == "tokenizer":
        task = DvaeTask(config, world)
    elif verb == "pretrain":
        task = PretrainTask(config, _tokenizer(config, settings), world)
    else:
        if settings is not None:
            names = OF_HEAD if verb == "segment" else ()
            model = as_begun(config.model, settings, *names)
            config = replace(config, model=model, init=None, init_key=None)
        if verb == "finetune":
            task = FinetuneTask(config, world)
        else:  # whose ranks share the statistics of batch norms
            data = replace(config.data, batch_size=config.data.batch_size * ranks)
            task = SegmentTask(replace(config, data=data), world)
    return task, verb == "segment"


def _tokenizer(config: Any, settings: Mapping[str, Any] | None) -> Any:
    if config.model.predict == "pixels" or config.token_cache is not None:
        return None
    stage = tokenizer_stage(config)
    file = config.tokenizer if stage is None else Path(stage.run.output) / TOKENIZER
    if not Path(file).is_file():
        raise ValueError(
            f"{file}, the run's tokenizer, is not there: pass --tokenizer with its file"
        )
    tokenizer = load_tokenizer(file)
    if settings is not None and settings["tokenizer"] != tokenizer_digest(tokenizer):
        raise CheckpointError(f"{file} is not the tokenizer that the run was trained with")
    return tokenizer


def _length(
    task: Task, config: Any, checkpoint: Checkpoint | None, step: int, ranks: int, as_one: bool
) -> Length:
    """Of the checkpoint, unless the run was made longer there and step `step` came by that."""
    run: RunConfig = config.run
    if checkpoint is not None and "schedule" in checkpoint.manifest:
        length = Length(**checkpoint.manifest["schedule"])
        if step <= length.num_steps:
            return length
    size = task.images_per_batch * (1 if as_one else ranks)
    batches = max(1, task.num_images // size)
    num_steps = run.num_steps(batches)
    return Length(num_steps, warmup_steps(config.optim, num_steps, batches / run.accumulate))


def _compared(replayed: Replayed, record: Mapping[str, Any]) -> dict[str, float]:
    """By how much loss and norm differ from the record, relative, where both are finite."""
    differences = {}
    for name in ("loss", "grad_norm"):
        was, now = record.get(name), getattr(replayed, name)
        if isinstance(was, int | float) and math.isfinite(now):
            differences[name] = abs(now - was) / max(abs(was), 1e-30)
    return differences


def _lines(
    replayed: Replayed,
    record: Mapping[str, Any],
    compared: Mapping[str, float],
    files: Mapping[int, str],
) -> list[str]:
    was = {name: record.get(name, "not recorded") for name in ("loss", "grad_norm")}
    lines = [
        f"  loss       {_number(replayed.loss)} here, {_number(was['loss'])} then",
        f"  grad_norm  {_number(replayed.grad_norm)} here, {_number(was['grad_norm'])} then",
    ]
    groups = record.get("grad_norms", {})
    if not replayed.finite or groups:
        width = max(map(len, replayed.grad_norms))
        for group, norm in replayed.grad_norms.items():
            then = f", {_number(groups[group])} then" if group in groups else ""
            lines.append(f"    {group:{width}}  {_number(norm)} here{then}")
    if replayed.found is not None:
        lines.append(str(replayed.found))
        if replayed.found_in is not None:
            lines.append(f"  in {_place(replayed, replayed.found_in, files)}")
        else:
            lines.append("  in what the micro-batches add up to: each of them was finite")
    elif not replayed.finite and math.isfinite(replayed.loss):
        lines.append("every gradient is finite, and their norm is too large for fp32")
    elif not replayed.finite:
        lines.append(
            "with its modules watched, and so with other rounding, the step is finite: it went bad "
            "by little"
        )
    else:
        lines.append(f"the step is finite here{_differs(compared, record)}")
    if record.get("why") == "spike":
        mean, deviation = record["mean_before"], record["deviation_before"]
        lines.append(
            f"it was skipped as a spike: losses before it were {mean:.4g} +- {deviation:.4g}"
        )
    return lines


def _differs(compared: Mapping[str, float], record: Mapping[str, Any]) -> str:
    if not record:
        return "; nothing was recorded of it"
    if len(compared) < 2:
        return " and was not then: see whether images, weights or machine are the same"
    if not any(compared.values()):
        return ", with loss and norm of then to the last bit"
    said = ", ".join(f"{name} differs by {value:.1e}" for name, value in compared.items())
    far = max(compared.values()) > CLOSE
    return f"; {said} of what it was then" + (": see whether the images are the same" * far)


def _place(replayed: Replayed, index: int, files: Mapping[int, str]) -> str:
    rank, micro, samples = replayed.batches[index]
    whose = "all ranks" if rank is None else f"rank {rank}"
    shown = ", ".join(f"{i} ({files[i]})" for i in samples[:SHOWN])
    more = " ..." if len(samples) > SHOWN else ""
    return f"micro-batch {micro} of {whose}, samples {shown}{more}"


def _plain(
    replayed: Replayed,
    record: Mapping[str, Any],
    compared: Mapping[str, float],
    files: Mapping[int, str],
) -> dict[str, Any]:
    micro_batches = [
        {
            "rank": rank,
            "micro_batch": micro,
            "loss": plain(loss),
            "samples": samples,
            "files": [files[i] for i in samples],
        }
        for (rank, micro, samples), loss in zip(replayed.batches, replayed.losses, strict=True)
    ]
    return {
        "step": replayed.step,
        "finite": replayed.finite,
        "loss": plain(replayed.loss),
        "grad_norm": plain(replayed.grad_norm),
        "grad_norms": {group: plain(norm) for group, norm in replayed.grad_norms.items()},
        "found": None if replayed.found is None else asdict(replayed.found),
        "found_in": replayed.found_in,
        "micro_batches": micro_batches,
        "recorded": dict(record),
        "differences": dict(compared),
    }


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)
