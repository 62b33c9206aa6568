"""`RUN/config.yaml`: the whole configuration of a run, as `--config` takes it.

A manifest leaves out what may change freely, as where the images are; this file has all of it, for
whoever wants the same run again, and for `beit-fast replay`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from beit_fast.files import replace_file

CONFIG = "config.yaml"


def write_config(output: Path, verb: str, config: Any) -> None:
    """Write the dataclass `config`, of `beit-fast VERB`. Raises OSError."""
    head = f"# beit-fast {verb} RECIPE --config {CONFIG}, with any recipe, is this run.\n"
    text = head + _as_yaml(asdict(config))
    replace_file(output / CONFIG, lambda file: file.write(text.encode()))


def _as_yaml(fields: Mapping[str, Any], indent: str = "") -> str:
    """A field a line, sections indented; values as JSON has them, which is YAML too."""
    lines = ""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            lines += f"{indent}{name}:\n{_as_yaml(value, f'{indent}  ')}"
        else:
            lines += f"{indent}{name}: {json.dumps(value)}\n"
    return lines
