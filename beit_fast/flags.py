"""How the command line calls a setting, for messages that say which to change.

    f"pass {flag('run.cuda_graph')} false"      --run.cuda_graph

A task that another one runs first has its settings below a section of the other's:

    with flags_of("tokenizer_training"):        --tokenizer_training.run.cuda_graph
"""

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar

_stage: ContextVar[tuple[str, frozenset[str]]] = ContextVar("stage", default=("", frozenset()))


def flag(name: str) -> str:
    """The flag of the setting `name`, "run.output", of the task that is running.

    One in capitals, "SHARDS", has no flag and is called by its place. Threads do not know of
    `flags_of`: make what they say before they start.
    """
    if name.isupper():
        return name
    section, outer = _stage.get()
    return f"--{name}" if name in outer else f"--{section}{name}"


@contextlib.contextmanager
def flags_of(section: str, outer: Collection[str] = ()) -> Iterator[None]:
    """Inside, settings are those of `section`, but for `outer`, which are taken from outside it."""
    token = _stage.set((f"{_stage.get()[0]}{section}.", frozenset(outer)))
    try:
        yield
    except Exception as error:
        error.section = section_of(error) or _stage.get()[0]
        raise
    finally:
        _stage.reset(token)


def section_of(error: Exception) -> str:
    """Of the task that an error comes from, "tokenizer_training."; "" of the outermost."""
    return getattr(error, "section", "")
