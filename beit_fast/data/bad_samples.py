"""The files that cannot be used: named once, counted, and at some number too many."""

import logging
import threading

from beit_fast.data.sources.folder import Source, damage_of
from beit_fast.errors import RunError
from beit_fast.flags import flag

logger = logging.getLogger("beit_fast.data")

_TOLERATED, _TOLERATED_SHARE = 10, 0.1  # bad files of a small data set, see Loader


class BadDataError(RunError):
    """More files cannot be used than the run allows."""


class BadSamples:
    """The files that cannot be used, shared by the threads that read them; `outcome` says in the
    log what becomes of one, `setting` is the share's. How many are borne: see `Loader`."""

    def __init__(
        self,
        source: Source,
        max_share: float,
        outcome: str = "the next image takes its place",
        setting: str = "data.max_bad_share",
    ):
        self._source, self._max_share, self._outcome = source, max_share, outcome
        self._flag = flag(setting)  # threads meet the bad files
        self._allowed = num_bad_borne(len(source), max_share)
        self._reasons: dict[int, tuple[str, str]] = {}  # name and reason; of damage below 0
        self._verdict = ""  # what to say of the file that was one too many
        self._lock = threading.Lock()
        for number, (name, why) in enumerate(damage_of(source).items(), 1):
            self._add(-number, name, why, "what is left of it is used")

    def by_name(self) -> dict[str, str]:
        with self._lock:
            return dict(said for _, said in sorted(self._reasons.items()))

    def knows(self, index: int) -> bool:
        """Whether the file was met before. Raises BadDataError if it was and there are too many:
        else a batch could pass because another thread had met its bad files first."""
        with self._lock:
            if index not in self._reasons:
                return False
            if self._verdict:
                raise BadDataError(self._verdict)
            return True

    def add(self, index: int, error: Exception) -> None:
        """Raises BadDataError once there are more than allowed."""
        reason = " ".join(str(error).split())
        self._add(index, self._source.name(index), reason, self._outcome, error)

    def _add(
        self, index: int, name: str, reason: str, outcome: str, error: Exception | None = None
    ) -> None:
        with self._lock:
            if index not in self._reasons:
                self._reasons[index] = name, reason
                logger.warning("cannot use %s (%s): %s", name, reason, outcome)
            count = len(self._reasons)
            if count > self._allowed and not self._verdict:
                self._verdict = (
                    f"cannot use {name} ({reason}): {count} of {len(self._source)} files are bad "
                    f"and {self._flag} {self._max_share:g} allows {self._allowed}; repair or "
                    f"remove them or raise {self._flag} (the log beit_fast.data names them all)"
                )
            if self._verdict:
                raise BadDataError(self._verdict) from error


def num_bad_borne(num_images: int, max_share: float) -> int:
    """How many files of a data set may be bad, see `Loader`."""
    small = min(_TOLERATED, int(_TOLERATED_SHARE * num_images)) if max_share else 0
    return max(int(max_share * num_images), small)
