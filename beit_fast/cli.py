"""The command line: `beit-fast <verb> <recipe> [--section.field value ...]`.

Flags are generated from the recipe's dataclasses, on top of the recipe's own values. What a verb
runs is imported when all its arguments are read: torch takes seconds, `--help` and a wrong flag
are answered without it.
"""

import codecs
import contextlib
import inspect
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from beit_fast import recipes
from beit_fast.checks import Count, Filled, Side, check_fields
from beit_fast.errors import RunError, is_out_of_memory
from beit_fast.files import describe, naming
from beit_fast.flags import section_of
from beit_fast.parsing import add_removed, make, new_parser, read
from beit_fast.replay_arguments import read_replay
from beit_fast.tasks.check.config import CheckConfig
from beit_fast.tasks.evaluate.config import EvaluateConfig, PredictConfig
from beit_fast.tasks.pack.config import PackConfig
from beit_fast.tasks.replay.config import Replay
from beit_fast.tasks.segment.config_evaluation import (
    EvaluateSegmentationConfig,
    PredictSegmentationConfig,
)
from beit_fast.train.launch import launched_rank
from beit_fast.train.once import say_once
from beit_fast.train.stop import WRITER, Interrupted

Run = Callable[[Any], Any]  # of a configuration
NAMES = "beit_fast.names"
USAGE = """usage: beit-fast <verb> ...

  pretrain RECIPE        train a BEiT on a folder of images
  pretokenize RECIPE     write the visual tokens that `pretrain RECIPE --token_cache DIR` reads
  finetune RECIPE        train a classifier on class folders, from a pre-trained BEiT
  segment RECIPE         train a segmenter on images with masks, from a pre-trained BEiT
  probe RECIPE           linear and nearest-neighbour accuracy of every block of a pre-trained BEiT
  tokenizer RECIPE       train a dVAE on a folder of images
  evaluate CHECKPOINT FOLDER
                         accuracy of a classifier on a folder of labelled images, class by class
  predict CHECKPOINT IMAGE...
                         the likeliest classes of images
  evaluate-segmentation CHECKPOINT FOLDER
                         IoU of a segmenter on images with masks, class by class
  predict-segmentation CHECKPOINT IMAGE... --output FOLDER
                         the class of every pixel of images, as PNGs of ids and of colours
  replay RUN STEP        a step of a run again: in which module it goes bad
  check IMAGES           read and decode every image once: what is broken, doubled, small
  pack IMAGES SHARDS     images as tar shards, checked on the way
  convert SRC DST --to unilm|timm|hf
                         a BEiT under other names: file, folder, run or published name
  convert-dalle          OpenAI's encoder.pkl and decoder.pkl -> one safetensors file

`beit-fast pretrain` lists the recipes; `beit-fast pretrain RECIPE --help` every field of one,
and `--print_config` its values as YAML for `--config FILE`."""


def main(
    arguments: Sequence[str] | None = None,
    preparing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> int:
    """Run one command. 0 done, 1 an error of one line, 2 wrong usage, 130 or 143 a signal.

    Inside `preparing()` lies all that comes before the work: arguments, and imports that take
    seconds. See beit_fast_main.py.
    """
    codecs.register_error(NAMES, _as_bytes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=NAMES)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        with preparing():
            with _usage_once():
                if verb not in WITHOUT_RECIPE and verb not in VERBS:
                    print(f"{USAGE}\n\nbeit-fast: there is no verb {verb!r}", file=sys.stderr)
                    return 2
                if verb in WITHOUT_RECIPE:
                    parse_verb, load = WITHOUT_RECIPE[verb]
                    config = parse_verb(rest)
                else:
                    known, load = VERBS[verb]
                    if not rest or rest[0] not in known:
                        return _list_recipes(verb, known, rest)
                    config = parse(verb, rest[0], known[rest[0]], rest[1:])
            run = load()
        run(config)
        if sys.stdout is not None:  # it may be closed
            with naming("standard output"):
                sys.stdout.flush()  # at exit it would be too late to say so
    except Interrupted as stop:
        say_once(f"beit-fast: {stop}", stop)
        return stop.exit_code
    except KeyboardInterrupt as stop:
        say_once("beit-fast: interrupted; the last checkpoint is whole", stop)
        if any(thread.name == WRITER for thread in threading.enumerate()):
            sys.stderr.flush()
            os._exit(130)  # an orderly end would wait until it has written
        return 130
    except BrokenPipeError:  # whoever read the output has gone: see beit_fast_main.py
        raise
    except (ValueError, OSError, RunError) as error:
        say_once(f"beit-fast: {describe(error)}", error)
        return 1
    except Exception as error:
        if is_out_of_memory(error):
            say_once(f"beit-fast: {_out_of_memory(error)}", error)
            return 1
        if launched_rank().size == 1:
            raise  # a fault of ours
        say_once(traceback.format_exc(), error)
        return 1
    return 0


@contextlib.contextmanager
def _usage_once() -> Iterator[None]:
    """What stderr gets inside, of wrong arguments, is said by one of the ranks that have them."""
    if launched_rank().size == 1:
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    finally:
        if said.getvalue():
            say_once(said.getvalue().rstrip("\n"))


def _out_of_memory(error: Exception) -> str:
    said = next(iter(str(error).splitlines()), type(error).__name__)
    section = section_of(error)
    return (
        f"memory ran out ({said[:200]}): make the batches smaller (--{section}data.batch_size, "
        f"with --{section}run.accumulate for the same step; --batch_size, --images_at_once or "
        "--windows_at_once where those are the flags), or the model"
    )


def _as_bytes(error: UnicodeError) -> tuple[bytes, int]:
    """For names of files, which need not be text: bytes as they are, and what the terminal cannot
    show by its number. An error handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = b""
    for letter in error.object[error.start : error.end]:
        code = ord(letter)
        is_byte = 0xDC80 <= code <= 0xDCFF  # as os.fsdecode keeps one
        shown += bytes([code - 0xDC00]) if is_byte else letter.encode("ascii", "backslashreplace")
    return shown, error.end


def parse(verb: str, name: str, recipe: Callable[[], Any], arguments: Sequence[str]) -> Any:
    """The recipe's configuration with the command line's changes."""
    default = recipe()
    command = f"beit-fast {verb} {name}"
    parser = new_parser(
        command,
        usage=f"{command} [--config FILE] [--section.field value ...]",
        description=inspect.getdoc(recipe),
    )
    parser.add_argument("--config", action="config", help="YAML file of fields to change")
    parser.add_class_arguments(type(default))
    add_removed(parser, type(default))
    parser.set_defaults(asdict(default))
    chosen = read(parser, arguments, type(default))
    return make(type(default), {k: v for k, v in chosen.items() if k != "config"})


def _list_recipes(verb: str, known: dict[str, Callable[[], Any]], rest: Sequence[str]) -> int:
    asked = bool(rest) and rest[0] not in ("-h", "--help")
    lines = [f"beit-fast: there is no recipe {rest[0]!r}"] if asked else []
    lines.append(f"usage: beit-fast {verb} RECIPE [--section.field value ...]\n")
    width = max(map(len, known))
    for name, recipe in known.items():
        lines.append(f"  {name:{width}}  {(inspect.getdoc(recipe) or '').splitlines()[0]}")
    print("\n".join(lines), file=sys.stderr if asked or not rest else sys.stdout)
    return 0 if rest and not asked else 2


@dataclass(frozen=True, kw_only=True)
class ConvertDalleConfig:
    """OpenAI's two files, and the one to write.

    Args:
        encoder: path of encoder.pkl
        decoder: path of decoder.pkl
        output: path of the safetensors file to write
        overwrite: replace an output that exists
    """

    encoder: Filled
    decoder: Filled
    output: Filled
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


def parse_convert_dalle(arguments: Sequence[str]) -> ConvertDalleConfig:
    """`beit-fast convert-dalle` with these arguments."""
    description = "OpenAI's pickled dVAE as one safetensors file, without running code from it."
    parser = new_parser("beit-fast convert-dalle", description=description)
    parser.add_class_arguments(ConvertDalleConfig)
    return make(ConvertDalleConfig, read(parser, arguments, ConvertDalleConfig))


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A checkpoint, where to write it, and under whose names."""

    source: Filled
    target: Filled
    to: Literal["unilm", "timm", "hf"]
    key: Filled | None = None  # which of several weights: model_ema, ema ...
    img_size: Side | None = None  # pixels, where the source does not show them
    num_heads: Count | None = None  # where the source does not show them
    statistics: Literal["half", "imagenet"] | None = None  # of pixels; else what the source says
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


def parse_convert(arguments: Sequence[str]) -> ConvertConfig:
    """`beit-fast convert` with these arguments."""
    description = "Write a checkpoint in another layout; dtypes stay, and so does every value."
    parser = new_parser("beit-fast convert", description=description)
    parser.add_argument("source", help="file, folder, output of a run, or published name")
    parser.add_argument("target", help="file to write; for hf a folder")
    parser.add_argument("--to", type=Literal["unilm", "timm", "hf"], required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace a target that exists")
    parser.add_class_arguments(ConvertConfig, skip={"source", "target", "to", "overwrite"})
    return make(
        ConvertConfig, read(parser, arguments, ConvertConfig), arguments=("source", "target")
    )


def parse_evaluate(arguments: Sequence[str]) -> EvaluateConfig:
    """`beit-fast evaluate` with these arguments."""
    description = inspect.getdoc(EvaluateConfig)
    parser = new_parser("beit-fast evaluate", description=description)
    parser.add_argument("checkpoint", help="run or step, file, folder, or published name")
    parser.add_argument("folder", help="labelled images: a sub-folder for each class")
    parser.add_class_arguments(EvaluateConfig, skip={"checkpoint", "folder"})
    return make(
        EvaluateConfig, read(parser, arguments, EvaluateConfig), arguments=("checkpoint", "folder")
    )


def parse_predict(arguments: Sequence[str]) -> PredictConfig:
    """`beit-fast predict` with these arguments."""
    description = inspect.getdoc(PredictConfig)
    parser = new_parser("beit-fast predict", description=description)
    parser.add_argument("checkpoint", help="run or step, file, folder, or published name")
    parser.add_argument("images", nargs="+", help="files, folders, patterns")
    parser.add_argument("--json", action="store_true", help="one JSON array, and nothing else")
    parser.add_class_arguments(PredictConfig, skip={"checkpoint", "images", "json"})
    return make(
        PredictConfig, read(parser, arguments, PredictConfig), arguments=("checkpoint", "images")
    )


def parse_evaluate_segmentation(arguments: Sequence[str]) -> EvaluateSegmentationConfig:
    """`beit-fast evaluate-segmentation` with these arguments."""
    kind = EvaluateSegmentationConfig
    parser = new_parser("beit-fast evaluate-segmentation", description=inspect.getdoc(kind))
    parser.add_argument("checkpoint", help="run or step, file, folder, or published name")
    parser.add_argument(
        "folder", help="ADE20K's root; or of images, with --data.masks that of their masks"
    )
    parser.add_class_arguments(kind, skip={"checkpoint", "folder"})
    return make(kind, read(parser, arguments, kind), arguments=("checkpoint", "folder"))


def parse_predict_segmentation(arguments: Sequence[str]) -> PredictSegmentationConfig:
    """`beit-fast predict-segmentation` with these arguments."""
    kind = PredictSegmentationConfig
    parser = new_parser("beit-fast predict-segmentation", description=inspect.getdoc(kind))
    parser.add_argument("checkpoint", help="run or step, file, folder, or published name")
    parser.add_argument("images", nargs="+", help="files, folders, patterns")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_class_arguments(kind, skip={"checkpoint", "images", "overwrite"})
    return make(kind, read(parser, arguments, kind), arguments=("checkpoint", "images"))


def parse_check(arguments: Sequence[str]) -> CheckConfig:
    """`beit-fast check` with these arguments."""
    parser = new_parser("beit-fast check", description=inspect.getdoc(CheckConfig))
    parser.add_argument("images", help="folder, shards, tables or store, as --data.path takes them")
    parser.add_class_arguments(CheckConfig, skip={"images"})
    return make(CheckConfig, read(parser, arguments, CheckConfig), arguments=("images",))


def parse_pack(arguments: Sequence[str]) -> PackConfig:
    """`beit-fast pack` with these arguments."""
    parser = new_parser("beit-fast pack", description=inspect.getdoc(PackConfig))
    parser.add_argument("images", help="folder, shards, tables or store, as --data.path takes them")
    parser.add_argument("shards", help="folder to write: empty, or of the same command")
    parser.add_class_arguments(PackConfig, skip={"images", "shards"})
    return make(PackConfig, read(parser, arguments, PackConfig), arguments=("images", "shards"))


def parse_replay(arguments: Sequence[str]) -> Replay:
    """`beit-fast replay` with these arguments."""

    def parse_run(verb: str, flags: Sequence[str]) -> Any:
        name, recipe = next(iter(VERBS[verb][0].items()))  # any: the flags say all
        return parse(verb, name, recipe, flags)

    return read_replay(arguments, parse_run)


def _pretrain() -> Run:
    from beit_fast.tasks.pretrain.pipeline import run_pretraining

    return run_pretraining


def _pretokenize() -> Run:
    from beit_fast.tasks.pretrain.pretokenize import run_pretokenize

    return run_pretokenize


def _finetune() -> Run:
    from beit_fast.tasks.finetune.task import run_finetuning

    return run_finetuning


def _segment() -> Run:
    from beit_fast.tasks.segment.task import run_segmentation

    return run_segmentation


def _probe() -> Run:
    from beit_fast.tasks.probe.task import run_probe

    return run_probe


def _tokenizer() -> Run:
    from beit_fast.tasks.pretrain.dvae import run_dvae

    return run_dvae


def _evaluate() -> Run:
    from beit_fast.tasks.evaluate.task import run_evaluation

    return run_evaluation


def _predict() -> Run:
    from beit_fast.tasks.evaluate.predict import run_prediction

    return run_prediction


def _evaluate_segmentation() -> Run:
    from beit_fast.tasks.segment.evaluate import run_segmentation_evaluation

    return run_segmentation_evaluation


def _predict_segmentation() -> Run:
    from beit_fast.tasks.segment.predict import run_segmentation_prediction

    return run_segmentation_prediction


def _replay() -> Run:
    from beit_fast.tasks.replay.task import run_replay

    return run_replay


def _check() -> Run:
    from beit_fast.tasks.check.task import run_check

    return run_check


def _pack() -> Run:
    from beit_fast.tasks.pack.task import run_pack

    return run_pack


def _convert() -> Run:
    from beit_fast.tasks.evaluate.checkpoints import statistics_of, write_image_processor
    from beit_fast.weights.convert import convert

    def run(config: ConvertConfig) -> None:
        chosen = asdict(config)
        chosen["statistics"] = config.statistics or statistics_of(config.source)
        print(convert(**chosen))
        if config.to == "hf" and (file := write_image_processor(config.source, config.target)):
            print(f"{file}: how its images are made")

    return run


def _convert_dalle() -> Run:
    from beit_fast.tokenizer.dalle import convert_dalle

    return lambda config: print(f"wrote {convert_dalle(**asdict(config))}")


# What a verb is: its recipes, or what reads its arguments; and what imports the function it runs.
VERBS: dict[str, tuple[dict[str, Callable[[], Any]], Callable[[], Run]]] = {
    "pretrain": (recipes.PRETRAIN, _pretrain),
    "pretokenize": (recipes.PRETOKENIZE, _pretokenize),
    "finetune": (recipes.FINETUNE, _finetune),
    "segment": (recipes.SEGMENT, _segment),
    "probe": (recipes.PROBE, _probe),
    "tokenizer": (recipes.TOKENIZER, _tokenizer),
}
WITHOUT_RECIPE: dict[str, tuple[Callable[[Sequence[str]], Any], Callable[[], Run]]] = {
    "evaluate": (parse_evaluate, _evaluate),
    "predict": (parse_predict, _predict),
    "evaluate-segmentation": (parse_evaluate_segmentation, _evaluate_segmentation),
    "predict-segmentation": (parse_predict_segmentation, _predict_segmentation),
    "replay": (parse_replay, _replay),
    "check": (parse_check, _check),
    "pack": (parse_pack, _pack),
    "convert": (parse_convert, _convert),
    "convert-dalle": (parse_convert_dalle, _convert_dalle),
}


if __name__ == "__main__":
    sys.exit(main())
