"""How long a read may take, beside how long a run may stand still."""

from beit_fast.data.sources.limits import ReadConfig
from beit_fast.flags import flag
from beit_fast.train.config import RunConfig


def check_reads(data: ReadConfig, run: RunConfig) -> None:
    """Raise ValueError where the run would be over before a file that hangs is given up."""
    if data.read_timeout >= run.timeout:
        raise ValueError(
            f"{flag('data.read_timeout')} is {data.read_timeout:g} s and {flag('run.timeout')} "
            f"{run.timeout:g} s: a file that hangs would end the run before it is replaced; pass "
            f"a {flag('data.read_timeout')} below {run.timeout:g}, or a larger "
            f"{flag('run.timeout')}"
        )
