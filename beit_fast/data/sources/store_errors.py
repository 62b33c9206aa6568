"""What clients of stores say, as OSErrors; nothing secret is passed on.

A client's message may hold what it was given: a signature in a query, a key that a store sends back
in its answer. So a message is made anew from the few things that are known to be harmless: the
status, the code of the answer, and the kind of the failure.
"""

import errno
import os
import re
from urllib.parse import quote

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")
_KIND = re.compile(r"kind: ([A-Z][A-Za-z]+)")
# What asks for credentials where the environment has none: the addresses of clouds' machines.
_METADATA = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "metadata/identity")
_SECRET_NAMES = re.compile(r"KEY|SECRET|TOKEN|PASSW|SAS|SIGNATURE|CREDENTIAL|CONNECTION", re.I)
_CREDENTIALS = "credentials come from the environment of the store's client"


def as_os_error(error: Exception, name: str) -> OSError:
    """What went wrong with the object `name`, with an errno of `reading.PASSING` where it may pass.

    error: of obstore or fsspec.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, os.strerror(error.errno), name)
    number, said = _meaning(error)
    return OSError(number, said, name)


def scrub(text: str) -> str:
    """The first line of a message without passwords, queries and secrets of the environment."""
    text = next(iter(text.splitlines()), "")[:500]
    for variable, value in os.environ.items():
        if len(value) > 3 and _SECRET_NAMES.search(variable):
            text = text.replace(value, "***").replace(quote(value, safe=""), "***")
    text = re.sub(r"(://)[^/\s@]*@", r"\1", text)
    return re.sub(r"\?[^\s,;)\"']*", "", text)[:200]


def _meaning(error: Exception) -> tuple[int, str]:
    """An errno and words for it."""
    kind, text = type(error).__name__, str(error)
    status = match[1] if (match := _STATUS.search(text)) else ""
    answer = f"the store answers {status}" + (f" {m[1]}" if (m := _CODE.search(text)) else "")
    if any(address in text for address in _METADATA):
        return errno.EACCES, f"no credentials were found: {_CREDENTIALS}"
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError":
        return errno.ENOENT, os.strerror(errno.ENOENT)
    if isinstance(error, PermissionError) or status in ("401", "403"):
        return errno.EACCES, f"{answer if status else 'the store refuses'}: {_CREDENTIALS}"
    if kind == "NotSupportedError":
        return errno.EOPNOTSUPP, "the server sends no parts of files (it heeds no Range)"
    if kind == "InvalidPathError":
        return errno.EINVAL, "its name, or another one there, is none that a path can have"
    if status == "404":  # of a bucket
        return errno.ENOENT, answer
    if status:
        passes = status in ("408", "425", "429") or status.startswith("5")
        return errno.EAGAIN if passes else errno.EINVAL, answer
    if isinstance(error, TimeoutError) or "Timeout" in _KIND.findall(text) or "timed out" in text:
        return errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)
    if "builder error" in text:
        return errno.EINVAL, "the URL is none that the client asks, perhaps for want of TLS"
    if "dns error" in text:
        return errno.EHOSTUNREACH, "the host's name is not known"
    if "onnection refused" in text or "ConnectionRefused" in text:
        return errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)
    if any(word in text for word in ("Interrupted", "IncompleteBody", "error sending request")):
        return errno.ECONNRESET, "the connection broke"
    return errno.EIO, f"the store's client failed ({kind})"
