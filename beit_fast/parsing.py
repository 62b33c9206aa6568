"""Arguments of the command line -> a configuration, and one line where they make none.

jsonargparse reads flags, files and defaults, and writes the help. Errors are worded here: the flag
as it is typed, what came, what is allowed.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

from beit_fast.checks import FieldError, allowed, hints
from beit_fast.files import naming
from beit_fast.flags import flags_of

# What YAML may unfold to, far more than any configuration has: a few lines of aliases of aliases
# are billions of values, and what is nested deeper than Python calls itself cannot be walked.
MOST_VALUES, DEEPEST = 10_000, 32


class _Unbounded(Exception):
    """No error of YAML's, which jsonargparse would take for a value that is plain text."""


def _load_yaml(text: str) -> Any:
    """jsonargparse's own reading, of what has a bound. Raises _Unbounded."""
    _check_bounds(text)
    return _unchecked(text)


def _check_bounds(text: str) -> None:
    """Raise _Unbounded for what unfolds beyond reason, found in time linear in the text."""
    open_: list[list[Any]] = []
    done: dict[str, tuple[float, float]] = {}
    # [anchor, values, levels] of collections; (values, levels) by anchor
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            anchor, values, levels = getattr(event, "anchor", None), 1, 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_.append([anchor, 1, 1])
                if anchor is not None:
                    done[anchor] = math.inf, math.inf  # while it is open it would hold itself
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, values, levels = open_.pop()
            elif isinstance(event, yaml.AliasEvent):
                values, levels = done.get(anchor, (1, 1))  # that of none is YAML's error
            elif isinstance(event, yaml.ScalarEvent):
                if "*" in event.value and event.value != text:
                    _check_bounds(event.value)  # may be read again, for the value of its field
            else:
                continue
            if anchor is not None:
                done[anchor] = values, levels
            if open_:
                open_[-1][1] += values
                open_[-1][2] = max(open_[-1][2], levels + 1)
            if values > MOST_VALUES or max(levels, len(open_)) > DEEPEST:
                raise _Unbounded(
                    f"its YAML has more than {MOST_VALUES} values or {DEEPEST} levels, what its "
                    "aliases (*name) repeat counted: write out what is needed"
                )
    except yaml.YAMLError:
        pass  # said by whoever reads it


_unchecked = get_loader("yaml")
_MODE = "bounded yaml"  # of our parsers: those of others read as they did
set_loader(_MODE, _load_yaml, exceptions=(yaml.YAMLError,))


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the lines of a description: a command in it is there to be pasted."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def new_parser(command: str, **options: Any) -> ArgumentParser:
    """jsonargparse's, for `read`. A flag is never guessed from its first letters."""
    return ArgumentParser(
        prog=command,
        parser_mode=_MODE,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        **options,
    )


def add_removed(parser: ArgumentParser, config_type: type) -> None:
    """Take fields that a section had once, `REMOVED`, where they say what holds now: files of
    earlier versions are read. Neither --help nor --print_config has them."""
    unseen = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for path, value in _removed(config_type).items():
        parser.add_argument(f"--{path}", type=Literal[value], **unseen)


def _removed(config_type: type, section: str = "") -> dict[str, Any]:
    """Dotted names of fields that are gone, with what holds now."""
    gone = getattr(config_type, "REMOVED", {})
    found = {section + name: value for name, value in gone.items()}
    for name, hint in hints(config_type).items():
        if (inner := section_type(hint)) is not None:
            found |= _removed(inner, f"{section}{name}.")
    return found


def read(
    parser: ArgumentParser, arguments: Sequence[str], config_type: type | None = None
) -> dict[str, Any]:
    """The values of all arguments; those of `config_type` are its fields.

    Exits with 2 and one line on stderr where they are wrong.
    """
    kept, nulls = _without_nulls(arguments, config_type)
    try:
        for flag, value in _pairs(arguments, config_type):
            if "\0" in value or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
                raise ValueError(f"{flag} is {value!r:.80}: give the path of a file on a disk")
        chosen = parser.parse_args([argument.translate(_SHOWN) for argument in kept])
        for path in nulls:
            _set_null(chosen, path)
        return _as_typed(dict(vars(chosen)))
    except BrokenPipeError:  # of --print_config
        raise
    except OSError as error:
        if error.filename is None:  # no file of ours, so what --help and --print_config write to
            with naming("standard output"):
                raise
        raise
    except (argparse.ArgumentError, ValueError, TypeError, _Unbounded) as error:
        line = _as_typed(_explain(str(error), parser, config_type))
        typed = any(name.split("=")[0] in arguments for name in re.findall(r"--[\w.]+", line))
        if not typed and (files := _files(arguments, config_type)):
            line = f"{', '.join(files)}: {line}"  # of a file of fields
        elif isinstance(error, _Unbounded):
            line = f"{_unbounded_flag(arguments)}: {line}"
        print(f"beit-fast: {line}; `{parser.prog} --help` has the flags", file=sys.stderr)
        raise SystemExit(2) from error


# Bytes of names that are not UTF-8, which YAML refuses, and what stands for them in the parser.
_SHOWN = {0xDC80 + byte: 0x10FF80 + byte for byte in range(128)}
_TYPED = {shown: typed for typed, shown in _SHOWN.items()}


def _as_typed(value: Any) -> Any:
    """A value of the parser with the bytes of names as they were given."""
    if isinstance(value, str):
        return value.translate(_TYPED)
    if isinstance(value, Namespace):
        return _as_typed(dict(vars(value)))
    if isinstance(value, dict):
        return {name: _as_typed(inner) for name, inner in value.items()}
    return type(value)(map(_as_typed, value)) if isinstance(value, list | tuple) else value


def _without_nulls(
    arguments: Sequence[str], config_type: type | None
) -> tuple[list[str], list[str]]:
    """The arguments without `--section.field null` of sections that may be null themselves, and the
    dotted fields of those: jsonargparse would make a text of such a null."""
    kept, nulls = [], []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not _may_be_null(name, config_type):
            kept.append(word)
            continue
        value = value if equals else next(words, None)
        nulls = [path for path in nulls if path != name]  # the last one counts
        if value == "null":
            nulls.append(name)
        else:
            kept += [word] if equals or value is None else [word, value]
    return kept, nulls


def _may_be_null(path: str, config_type: type | None) -> bool:
    """Whether null may be in the field at a dotted path, below a section that may be null."""
    section, _, name = path.rpartition(".")
    outer = section.partition(".")[0]
    optional = outer and type(None) in get_args(_hint(outer, config_type))
    return bool(optional and name and type(None) in get_args(_hint(path, config_type)))


def _set_null(values: Namespace, path: str) -> None:
    """Raises ValueError where the section is null itself."""
    *sections, name = path.split(".")
    inner: Any = values
    for section in sections:
        inner = inner[section] if inner is not None else None
    if inner is None:
        raise ValueError(f"--{path} is null and so is {'.'.join(sections)}: leave one of them out")
    inner[name] = None


def _files(arguments: Sequence[str], config_type: type | None) -> list[str]:
    """The flags whose values are files of fields, with them."""
    pairs = _pairs(arguments, config_type)
    return [f"{name} {file}" for name, file in pairs if os.path.exists(file)]


def _pairs(arguments: Sequence[str], config_type: type | None) -> list[tuple[str, str]]:
    """The flags whose values may be files of fields, with their values."""
    words = [word for a in arguments for word in (a.split("=", 1) if a[:2] == "--" else [a])]
    return [
        (name, value)
        for name, value in itertools.pairwise(words)
        if (name == "--config" or section_type(_hint(name[2:], config_type)) is not None)
        and name[:2] == "--"
    ]


def _unbounded_flag(arguments: Sequence[str]) -> str:
    """The flag whose value unfolds beyond reason; the value's beginning where it has none."""
    for argument, after in itertools.zip_longest(arguments, arguments[1:]):
        flag, _, value = argument.partition("=")
        value = value or after or argument
        try:
            _check_bounds(value)
        except _Unbounded:
            return flag[:80]
    return "a value"


def _explain(message: str, parser: ArgumentParser, config_type: type | None) -> str:
    """One line for what jsonargparse says in many, with whole configurations in them."""
    keys = dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message))  # each once
    path = ".".join(key for key in keys if key != "config")
    if unknown := _foreign(message, path):
        return _unknown(unknown, parser, config_type)
    came = re.search(r"(?:Got value|Given value|path string): (.*)", message)
    came = came or re.search(r"Unable to load config '(.*)'", message)
    if (hint := _hint(path, config_type)) is not None:
        value = f" is {came[1][:80]}" if came else ""
        return f"--{path}{value}: give {allowed(hint)}"
    line = re.sub(r'^Parser key "([^"]+)":', r"--\1:", " ".join(message.split()))
    line = re.sub(
        r": Expected a typing\.Literal\[(.+?)\]. Got value: (.*)", r" is \2: give \1", line
    )
    line = re.sub(r"^argument (--\S+)", r"\1", line)
    return line[:200]


def _foreign(message: str, path: str) -> str | None:
    """The argument that there is no field for, if it is that what `message` says."""
    if unknown := re.match(r"unrecognized arguments: (\S+)", message):
        return unknown[1]
    section = f"{path}." if path else ""
    if group := re.search(r"Group '(.+?)' does not accept option '(.+?)'", message):
        return f"--{section}{group[1]}.{group[2]}"
    if option := re.search(r"Option '(.+?)' is not accepted", message):
        return f"--{section}{option[1]}"
    nested = re.search(r"NestedArg\(key='([^']+)'", message)
    return f"--{path}.{nested[1]}" if nested and not path.endswith(nested[1]) else None


def _unknown(argument: str, parser: ArgumentParser, config_type: type | None) -> str:
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        hint = "; put a pattern of file names in quotes" if "/" in name or "." in name else ""
        return f"{name!r} is the value of no --flag{hint}"
    known = [option for action in parser._actions for option in action.option_strings]
    known += [] if config_type is None else [f"--{path}" for path in paths(config_type)]
    near = difflib.get_close_matches(name, known, 1)
    return f"there is no flag {name}" + (f", did you mean {near[0]}?" if near else "")


def _hint(path: str, config_type: type | None) -> Any:
    """Type of the field at a dotted path; None where there is none."""
    hint = None
    for name in path.split("."):
        if config_type is None or name not in hints(config_type):
            return None
        hint = hints(config_type)[name]
        config_type = section_type(hint)
    return hint


def section_type(hint: Any) -> type | None:
    """The dataclass that a field's type is, or may be besides null."""
    options = (hint, *get_args(hint))
    return next((t for t in options if isinstance(t, type) and dataclasses.is_dataclass(t)), None)


def paths(config_type: type, section: str = "") -> list[str]:
    """Dotted names of all fields that are no sections."""
    found = []
    for name, hint in hints(config_type).items():
        inner = section_type(hint)
        found += [section + name] if inner is None else paths(inner, f"{section}{name}.")
    return found


def make(
    config_type: type, values: Mapping[str, Any], section: str = "", arguments: Sequence[str] = ()
) -> Any:
    """A configuration of plain values, its sections being mappings.

    Raises ValueError that names the flag as it is typed; `arguments` are the fields that have no
    flag but are named by their place.
    """
    fields = {}
    for name, value in values.items():
        if name in getattr(config_type, "REMOVED", {}):
            continue
        inner = section_type(hints(config_type)[name])
        if inner is not None and value is not None:
            if not isinstance(value, Mapping):
                raise ValueError(f"--{section}{name} is {value!r}: give its fields, one below it")
            if any(section_type(hint) for hint in hints(inner).values()):  # a task of its own
                with flags_of(name):
                    fields[name] = make(inner, value, f"{section}{name}.")
            else:
                fields[name] = make(inner, value, f"{section}{name}.")
        else:
            fields[name] = value
    try:
        return config_type(**fields)
    except FieldError as error:
        where = error.field.upper() if error.field in arguments else f"--{section}{error.field}"
        raise ValueError(f"{where} {error.problem}") from error
