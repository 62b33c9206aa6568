"""Where is kept what is made of shards and stores, so that it need not be made again."""

import errno
import hashlib
import os
from pathlib import Path

HIDDEN = ".beit_fast"  # beside shards on disk


def user_cache() -> Path:
    """The user's own folder for such things, as the XDG base directories say where. Raises OSError
    for a user who has none, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beit_fast"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder", "~") from error


def kept_folder(place: str, cache: str, kind: str) -> Path:
    """Of one place, a folder or a URL without credentials, below `cache` or the user's folder.

    kind: of what is kept, "indices" or the like. Raises OSError as `user_cache` does.
    """
    root = Path(cache) if cache else user_cache()
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    return root / kind / f"{os.path.basename(place.rstrip('/'))[:40]}-{digest}"
