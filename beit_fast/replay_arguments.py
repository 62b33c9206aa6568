"""Arguments of `beit-fast replay`: which step of which run, and changes of the run's settings.

The settings are those that the run keeps in its folder, whose verb is known by their names.
"""

import inspect
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from beit_fast.checks import Count
from beit_fast.parsing import make, new_parser, read
from beit_fast.tasks.replay.config import Replay, ReplayConfig
from beit_fast.train.kept_config import CONFIG

# A field that the verb's configuration has, and no verb's before it.
FIELDS = {
    "tokenizer": "dvae",
    "pretrain": "masking",
    "segment": "auxiliary_weight",
    "finetune": "layer_decay",
}


def read_replay(arguments: Sequence[str], parse_run: Callable[[str, Sequence[str]], Any]) -> Replay:
    """A few arguments of its own, and flags of the run's verb: `parse_run(verb, flags)` makes its
    configuration of them. Raises ValueError for a folder without one."""
    parser = new_parser(
        "beit-fast replay",
        usage="beit-fast replay RUN STEP [--json FILE] [--ranks N] [--section.field value ...]",
        description=inspect.getdoc(ReplayConfig),
    )
    parser.add_argument("run", help="folder of the run, with its config.yaml")
    parser.add_argument("step", type=Count, help="as the log counts them, from 1")
    parser.add_class_arguments(ReplayConfig, skip={"run", "step"})
    ours, theirs = _split(arguments, {"--json", "--ranks", "--help", "-h"})
    wanted = make(ReplayConfig, read(parser, ours, ReplayConfig), arguments=("run", "step"))
    file = Path(wanted.run) / CONFIG
    verb = _verb_of(file)
    return Replay(wanted, verb, parse_run(verb, ["--config", str(file), *theirs]))


def _split(arguments: Sequence[str], flags: Collection[str]) -> tuple[list[str], list[str]]:
    """Arguments without a flag and those of `flags`, and all others."""
    ours: list[str] = []
    theirs: list[str] = []
    words = iter(arguments)
    for word in words:
        mine = word.partition("=")[0] in flags or not word.startswith("-")
        (ours if mine else theirs).append(word)
        if word.startswith("--") and "=" not in word and word != "--help":
            (ours if mine else theirs).extend(itertools.islice(words, 1))
    return ours, theirs


def _verb_of(file: Path) -> str:
    """Whose configuration a file is: each verb has fields of its own."""
    if not file.exists():
        raise ValueError(
            f"{file} is not there: no run was started in that folder, or by a version that did not "
            "keep its settings. Write the file with the run's own command, to which --print_config "
            f"> {file} is added"
        )
    sections = set(re.findall(r"^(\w+):", file.read_text("utf-8", "replace"), re.MULTILINE))
    for verb, field in FIELDS.items():
        if field in sections:
            return verb
    raise ValueError(
        f"{file} is no configuration of pretrain, tokenizer, finetune or segment: write it with "
        f"the run's own command, to which --print_config > {file} is added"
    )
