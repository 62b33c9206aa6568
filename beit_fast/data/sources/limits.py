"""How large an image may be, and how long its files may take."""

from dataclasses import dataclass

from beit_fast.checks import Natural, Seconds, check_fields

MAX_PIXELS = 64_000_000  # in one file; a larger one is refused from its header, undecoded


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How long files may take: fields of whatever reads many, see reading.py."""

    read_timeout: Seconds = 60.0  # a file that takes longer, all tries together, is a broken one
    read_retries: Natural = 2  # so often what fails for a passing reason is tried again

    def __post_init__(self) -> None:
        check_fields(self)


READS = ReadConfig()  # where there is no setting for it
