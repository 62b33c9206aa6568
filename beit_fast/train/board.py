"""What ranks tell each other beside the process group: through the launcher's store.

It goes on where collectives do not: a rank that hangs or has failed is asked for nothing.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from beit_fast.errors import RunError
from beit_fast.flags import flag
from beit_fast.train.agreement import names
from beit_fast.train.launch import Launch

START = "beit_fast/start"
RESTART = "TORCHELASTIC_RESTART_COUNT"


class StartError(RunError):
    """Not all ranks came together."""


class Board:
    """A store that holds a value of each rank under each of `KINDS`.

    Every method raises RuntimeError of torch's where the store does not answer.
    """

    KINDS = ("note", "failure", "parts")

    def __init__(self, store: dist.Store, launch: Launch) -> None:
        self._store, self.rank, self.size = store, launch.rank, launch.size
        self.address = launch.address

    def clone(self) -> "Board":
        """The same board over a connection of its own: for another thread."""
        return Board(self._store.clone(), Launch(self.rank, self.size, address=self.address))

    def prepare(self) -> None:
        """Empty values of this rank, so that reading never waits."""
        for kind in self.KINDS:
            self._store.set(f"{kind}/{self.rank}", "null")

    def write(self, kind: str, value: Any) -> None:
        self._store.set(f"{kind}/{self.rank}", json.dumps(value))

    def read(self, kind: str) -> list[Any]:
        """Of every rank, None where it has said nothing."""
        found = self._store.multi_get([f"{kind}/{rank}" for rank in range(self.size)])
        return [json.loads(value) for value in found]

    def claim(self, name: str) -> bool:
        """Whether this rank is the first to ask for it."""
        return claim(self._store, name, self.rank)


def agent_store() -> dist.Store | None:
    """The launcher's own store, before ranks have met; None where it does not answer."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=5)))
    except (RuntimeError, ValueError):
        return None
    return dist.PrefixStore(f"beit_fast/arguments {os.environ.get(RESTART, '0')}", store)


def claim(store: dist.Store, name: str, rank: int) -> bool:
    """Whether `rank` is the first that asks the store for `name`."""
    mine = f"{rank} {os.urandom(8).hex()}"
    return store.compare_set(f"claim/{name}", "", mine).decode() == mine


def meet(launch: Launch, timeout: float) -> dist.Store:
    """A store that holds nothing yet, once all ranks of this start have come to it.

    The launcher's store outlives a restart (`--max-restarts`) and still has the addresses of the
    processes that are gone: torch 2.11 hands them to the new ones. So rank 0 gives each start a
    name, and its ranks write below that. TORCHELASTIC_RESTART_COUNT is no such name: it is a count
    of each node's launcher, and they may differ.

    Raises StartError that names the ranks that have not come within `timeout` seconds.
    """
    limit = timedelta(seconds=timeout)
    until = time.monotonic() + timeout
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        if launch.rank == 0 and isinstance(error, dist.DistStoreError):
            raise StartError(
                f"not all {launch.size} ranks have come to {launch.address} within {timeout:g} s: "
                f"{_see()}"
            ) from error
        raise StartError(
            f"no store answers at {launch.address} (MASTER_ADDR:MASTER_PORT) within {timeout:g} s "
            f"({_first_line(error)}): see that rank 0 runs there and that its port is open to all "
            f"nodes, or wait longer ({flag('run.startup_timeout')})"
        ) from error
    if launch.rank == 0:
        name = os.urandom(8).hex()
        own = dist.PrefixStore(f"beit_fast/{name}", store)
        Board(own, launch).prepare()
        store.set(START, name)
        others = [f"here/{rank}" for rank in range(1, launch.size)]
        _wait(own, others, until, launch, timeout)
        own.set("all", "")
        return own
    joined: dict[str, dist.Store] = {}
    while True:
        if store.check([START]):
            name = store.get(START).decode()
            if name not in joined:
                own = dist.PrefixStore(f"beit_fast/{name}", store)
                # Another process was this rank: the name is of a start before this one.
                joined[name] = own if own.add(f"came/{launch.rank}", 1) == 1 else None
                if joined[name] is not None:
                    Board(own, launch).prepare()
                    own.set(f"here/{launch.rank}", "")
            if joined[name] is not None and joined[name].check(["all"]):
                return joined[name]
        if time.monotonic() > until:
            missing = "rank 0 has" if not joined else "some ranks have"
            raise StartError(f"{missing} not come within {timeout:g} s: {_see()}")
        time.sleep(0.05)


def _wait(
    store: dist.Store, keys: Iterable[str], until: float, launch: Launch, timeout: float
) -> None:
    missing = [key for key in keys if not store.check([key])]
    while missing:
        if time.monotonic() > until:
            ranks = [int(key.removeprefix("here/")) for key in missing]
            raise StartError(
                f"of {launch.size} ranks, {names(ranks)} {'has' if len(ranks) == 1 else 'have'} "
                f"not come within {timeout:g} s: {_see()}"
            )
        time.sleep(0.02)
        missing = [key for key in missing if not store.check([key])]


def digest_of(fields: Mapping[str, Any]) -> str:
    """Of plain data, in any order of its names."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _see() -> str:
    return (
        "see that every node was started with the same number of processes, or wait longer "
        f"({flag('run.startup_timeout')})"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
