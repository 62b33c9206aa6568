"""Names of classes, and their ids and colours, from a small file.

    text   one name a line, in the order of their ids from 0; empty lines at the end do not count
    JSON   ["road", "car"]
           [{"name": "road", "color": [128, 64, 128], "id": 7}, ...]
           {"classes": either of these}

"color" is [red, green, blue] of 0 ... 255 or "#804080", "id" the number that the masks have for the
class: the place in the list, from 0, where none is given. Both are given for every class or for
none. A file whose name ends in .json is JSON, every other one text.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from beit_fast.data.sources.masks import MAX_CLASSES, MAX_ID

Colour = tuple[int, int, int]
_MAX_BYTES = 2**24  # of the file: no list of names is that long
_FIELDS = {"name", "color", "id"}


class Classes(NamedTuple):
    """In the order of their labels."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...] | None
    ids: tuple[int, ...] | None  # in the masks; None: nothing is said of them


def numbered_classes(count: int) -> Classes:
    """Classes that have no names."""
    return Classes(tuple(f"class {label}" for label in range(count)), None, None)


def read_classes(path: str | Path) -> Classes:
    """The classes of a file, sorted by id. Raises ValueError that names file and entry."""
    path = Path(path)
    if not path.is_file():
        lies = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"the file of class names {path} {lies}: check the path")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES} bytes: give a list of class names")
    return parse_classes(str(path), path.read_bytes())


def parse_classes(path: str, content: bytes) -> Classes:
    """`read_classes` of a file that was read already, wherever it lies; `path` is to show."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as that") from error
    if path.lower().endswith(".json"):
        entries = _entries(path, text)
    else:
        if text.lstrip().startswith(("[", "{")):
            raise ValueError(f"{path} holds JSON: give it a name that ends in .json")
        entries = [{"name": line.strip()} for line in text.rstrip().split("\n")] if text else []
    if not 1 <= len(entries) <= MAX_CLASSES:
        raise ValueError(f"{path} names {len(entries)} classes: give 1 to {MAX_CLASSES}")
    return _classes(path, entries)


def _entries(path: str, text: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}): repair it") from error
    if isinstance(content, dict):
        content = content.get("classes")
    if not isinstance(content, list):
        raise ValueError(
            f'{path} holds no list of classes: write ["road", "car"], or {{"classes": [...]}}'
        )
    return [{"name": entry} if isinstance(entry, str) else entry for entry in content]


def _classes(path: str, entries: list[Any]) -> Classes:
    for number, entry in enumerate(entries):
        if problem := _problem(entry):
            raise ValueError(f"{path}, class {number}: {problem}")
    for field in ("color", "id"):
        without = [entry["name"] for entry in entries if field not in entry]
        if 0 < len(without) < len(entries):
            raise ValueError(
                f"{path}: {without[0]!r} has no {field!r} and others have: give every class one, "
                "or none"
            )
    if "id" in entries[0]:
        entries = sorted(entries, key=lambda entry: entry["id"])
    for field in ("name", "id"):
        values = [entry[field] for entry in entries if field in entry]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(
                f"{path}: two classes have the {field} {twice[0]!r}: give each its own"
            )
    return Classes(
        tuple(entry["name"] for entry in entries),
        tuple(_colour(entry["color"]) for entry in entries) if "color" in entries[0] else None,
        tuple(entry["id"] for entry in entries) if "id" in entries[0] else None,
    )


def _problem(entry: Any) -> str:
    """What is wrong with it; "" for nothing."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return f'{entry!r:.80} is no class: write "road", or {{"name": "road"}}'
    if not entry["name"].strip() or not entry["name"].isprintable():
        return "its name is empty or has characters that cannot be shown: give it a name"
    if unknown := sorted(entry.keys() - _FIELDS):
        return f"{unknown[0]!r} is no field of a class: it has {', '.join(sorted(_FIELDS))}"
    if "color" in entry and _colour(entry["color"]) is None:
        return (
            f"the color {entry['color']!r:.80} is none: write [red, green, blue] of 0 to 255, or "
            '"#804080"'
        )
    number = entry.get("id", 0)
    if type(number) is not int or not 0 <= number <= MAX_ID:
        return f"the id {number!r:.80} is no whole number of 0 to {MAX_ID}: write what masks have"
    return ""


def _colour(value: Any) -> Colour | None:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return tuple(bytes.fromhex(value[1:]))
    is_triple = isinstance(value, list) and len(value) == 3
    if is_triple and all(type(level) is int and 0 <= level <= 255 for level in value):
        return tuple(value)
    return None
