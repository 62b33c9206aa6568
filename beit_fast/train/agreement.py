"""What ranks must have alike before they start: code, versions, settings, data, checkpoint."""

import dataclasses
import hashlib
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import beit_fast

SHOWN = 5  # fields in a message

# Of the settings, what may rightly differ from node to node: where files lie. What lies there is
# compared, by its weights, classes or number. The folder of the run is looked at (start.py).
BY_NODE = frozenset(
    {
        *("run.output", "output", "data.path", "data.test", "data.masks", "data.test_masks"),
        *("data.classes_file", "init", "tokenizer", "token_cache", "data.num_threads"),
    }
)
STAGE = "tokenizer_training."


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings, a dataclass or a mapping, as one name each: "run.steps"."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def settings_of_all(settings: Any) -> dict[str, Any]:
    """Those that every rank must have alike, by name; habits are among them, for ranks that log or
    save at other steps wait for each other."""
    found = flat(settings)
    return {k: v for k, v in found.items() if k.removeprefix(STAGE) not in BY_NODE}


def code_digest() -> str:
    """Of the package's source files and their names, 16 digits."""
    digest = hashlib.sha256()
    kernels = importlib.util.find_spec("beit_fast.kernels").submodule_search_locations
    for root in [*beit_fast.__path__, *kernels]:
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def names(ranks: Sequence[int]) -> str:
    """Ranks as a message has them: "rank 3", "ranks 0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    said = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(said)}"


def compare(all_fields: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError that names each field that differs between ranks, who has what, and of long
    lists where."""
    fields = sorted(set(itertools.chain.from_iterable(all_fields)))
    said = [words for name in fields if (words := _difference(name, all_fields))]
    if not said:
        return
    more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    raise ValueError(
        f"the ranks of this run do not start alike: {'; '.join(said[:SHOWN])}{more}. Give every "
        "node the same version, files and command"
    )


def _difference(name: str, all_fields: Sequence[Mapping[str, Any]]) -> str:
    values = [fields.get(name, "nothing") for fields in all_fields]
    groups: list[tuple[Any, list[int]]] = []
    for rank, value in enumerate(values):
        for known, ranks in groups:
            if known == value and type(known) is type(value):
                ranks.append(rank)
                break
        else:
            groups.append((value, [rank]))
    if len(groups) == 1:
        return ""
    shown = [(_shown(value, groups[0][0]), ranks) for value, ranks in groups]
    has = [f"{value} on {names(ranks)}" for value, ranks in shown[:4]]
    return f"{name} is {', '.join(has)}"


def _shown(value: Any, first: Any) -> str:
    if isinstance(value, list) and isinstance(first, list) and max(len(value), len(first)) > 8:
        pairs = enumerate(itertools.zip_longest(value, first, fillvalue="absent"))
        place = next((i for i, (a, b) in pairs if a != b), None)
        if place is None:
            return f"a list of {len(value)}"
        here = value[place] if place < len(value) else "absent"
        return f"a list of {len(value)} with {here!r} at {place}"
    return repr(value)[:80]
