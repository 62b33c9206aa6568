"""Errors of a run that cannot go on: what to catch, without importing whatever raises it."""


class RunError(RuntimeError):
    """A run ends early, and no fault of the program's is the cause. Its message says what to do."""


class ToldElsewhere(RunError):
    """A run ends because of another rank, and that one says why: print nothing for this one."""
