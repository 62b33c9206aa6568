"""Errors of a run that cannot go on: what to catch, without importing whatever raises it."""

import re

# torch's words: a GPU's error has a type of its own, a CPU's and a size beyond 64 bits have none.
_OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|Storage size calculation"
)


class RunError(RuntimeError):
    """A run ends early, and no fault of the program's is the cause. Its message says what to do."""


class ToldElsewhere(RunError):
    """A run ends because of another rank, and that one says why: print nothing for this one."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch found no memory, of a CPU or a GPU. A RunError says so itself."""
    if isinstance(error, MemoryError):
        return True
    of_torch = isinstance(error, RuntimeError) and not isinstance(error, RunError)
    return of_torch and bool(_OUT_OF_MEMORY.search(str(error)))
