"""How large an image may be, how long its files may take, and where copies of them are kept."""

from dataclasses import dataclass

from beit_fast.checks import Given, Natural, Positive, Seconds, check_fields

MAX_PIXELS = 64_000_000  # in one file; a larger one is refused from its header, undecoded


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How files are read: fields of whatever reads many, see reading.py."""

    read_timeout: Seconds = 60.0  # a file that takes longer, all tries together, is a broken one
    read_retries: Natural = 2  # so often what fails for a passing reason is tried again
    # Folder for what is kept of shards and stores; "": indices beside shards on disk, the rest in
    # the user's cache folder.
    cache: Given = ""
    cache_size: Positive = 64.0  # GiB of shards copied from a store

    def __post_init__(self) -> None:
        check_fields(self)


READS = ReadConfig()  # where there is no setting for it
