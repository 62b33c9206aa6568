"""What a launcher says of the processes that it started: torchrun's environment variables."""

import os
from dataclasses import dataclass

HOW = (
    "start it with torchrun (torchrun --nproc_per_node=2 --no-python beit-fast ...), which sets "
    "them all, or unset WORLD_SIZE, RANK and LOCAL_RANK to run one process alone"
)


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together; the defaults are one alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""  # of the store that all see, HOST:PORT; "" of one process

    @property
    def says_who(self) -> str:
        """Before a message of this rank alone."""
        return f"rank {self.rank} of {self.size}: " if self.size > 1 else ""


def read_launch() -> Launch:
    """The variables, looked at. Raises ValueError for some that are missing or contradict."""
    size, rank, local_rank = (_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if size is None and rank:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is not set: {HOW}")
    if size is None or size == 1:
        if rank:
            raise ValueError(f"RANK is {rank} and WORLD_SIZE is {size}: ranks count from 0; {HOW}")
        return Launch(local_rank=local_rank or 0)
    if size < 1:
        raise ValueError(f"WORLD_SIZE is {size}: {HOW}")
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size} and {', '.join(missing)} not set: {HOW}")
    if rank >= size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {size}: ranks count from 0; {HOW}")
    port = _number("MASTER_PORT")
    return Launch(rank, size, local_rank or 0, f"{os.environ['MASTER_ADDR']}:{port}")


def launched_rank() -> Launch:
    """As `read_launch`; variables that it refuses are those of one process. For messages."""
    try:
        return read_launch()
    except ValueError:
        return Launch()


def has_agent_store() -> bool:
    """Whether the launcher itself answers at the address, before any rank has come that far."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def slurm_job() -> str | None:
    """The number of the job of SLURM's that this process is of."""
    return os.environ.get("SLURM_JOB_ID") or None


def error_file() -> str | None:
    """Where torch's launcher looks for what ended a process."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE") or None


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name} is {text!r}, which is no number from 0 on: {HOW}")
    return int(text)
