"""How long a read may take, beside how long a run may stand still."""

from dataclasses import replace
from typing import TypeVar

from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.flags import flag
from beit_fast.train.config import RunConfig

Data = TypeVar("Data", bound=ReadConfig)


def within(run: RunConfig, data: Data) -> Data:
    """`data` with a limit that the run outlasts, so that a file that hangs is replaced before.

    A run that may stand still for no longer than the default limit gets one of half that time:
    whoever sets the one need not know of the other. Raises ValueError where a longer one was given.
    """
    if data.read_timeout < run.timeout:
        return data
    if data.read_timeout <= READS.read_timeout:
        return replace(data, read_timeout=run.timeout / 2)
    raise ValueError(
        f"{flag('data.read_timeout')} is {data.read_timeout:g} s and {flag('run.timeout')} "
        f"{run.timeout:g} s: a file that hangs would end the run before it is replaced; pass "
        f"a {flag('data.read_timeout')} below {run.timeout:g}, or a larger {flag('run.timeout')}"
    )
