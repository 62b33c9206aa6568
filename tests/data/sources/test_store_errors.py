"""What clients say becomes an errno, and none of their secrets a message."""

import errno

import pytest

from beit_fast.data.sources.reading import PASSING
from beit_fast.data.sources.store_errors import as_os_error, scrub


class GenericError(Exception):
    """As obstore's is called."""


SECRETS = ("AKIAEXAMPLE", "c2lnbmF0dXJl", "hunter2")
TEXT = (
    "Error performing GET https://hunter2@a.blob.net/x?sig=c2lnbmF0dXJl in 1ms - Server returned "
    "non-2xx status code: {}: <Error><Code>{}</Code><Key>AKIAEXAMPLE</Key></Error>"
)


@pytest.mark.parametrize(
    ("error", "number", "passes", "said"),
    [
        (GenericError(TEXT.format(503, "SlowDown")), errno.EAGAIN, True, "answers 503 SlowDown"),
        (GenericError(TEXT.format(429, "x")), errno.EAGAIN, True, "answers 429 x"),
        (GenericError(TEXT.format(400, "Bad")), errno.EINVAL, False, "answers 400 Bad"),
        (GenericError("sending\nkind: Timeout, AKIAEXAMPLE"), errno.ETIMEDOUT, True, "timed out"),
        (GenericError("x dns error AKIAEXAMPLE"), errno.EHOSTUNREACH, True, "name is not known"),
        (GenericError("Connection refused hunter2"), errno.ECONNREFUSED, True, "refused"),
        (GenericError("kind: Interrupted c2lnbmF0dXJl"), errno.ECONNRESET, True, "broke"),
        (
            GenericError("GET http://169.254.169.254/x - status code: 403"),
            errno.EACCES,
            False,
            "no credentials",
        ),
        (GenericError("something AKIAEXAMPLE"), errno.EIO, True, r"client failed \(GenericErr"),
        (GenericError(TEXT.format(403, "Denied")), errno.EACCES, False, "403 Denied: credentials"),
        (GenericError(TEXT.format(404, "NoSuchBucket")), errno.ENOENT, False, "NoSuchBucket"),
        (FileNotFoundError("AKIAEXAMPLE"), errno.ENOENT, False, "No such file"),
        (PermissionError("AKIAEXAMPLE"), errno.EACCES, False, "environment of the store's"),
        (TimeoutError("hunter2"), errno.ETIMEDOUT, True, "timed out"),
        (ConnectionResetError(errno.ECONNRESET, "hunter2"), errno.ECONNRESET, True, "by peer"),
    ],
    ids=[
        *("503", "429", "400", "timeout", "dns", "refused", "cut", "metadata", "unknown"),
        *("403", "404", "missing", "denied", "timeout too", "reset"),
    ],
)
def test_an_error_has_the_errno_of_its_kind_and_no_secret(error, number, passes, said):
    ours = as_os_error(error, "s3://b/a.jpg")
    assert (ours.errno, ours.filename) == (number, "s3://b/a.jpg")
    assert (number in PASSING) == passes
    with pytest.raises(OSError, match=said):
        raise ours
    assert not any(secret in str(ours) for secret in SECRETS)


def test_a_message_loses_passwords_queries_and_what_the_environment_keeps(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", "sv=1&sig=a+b/c")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrX/UtnF")
    text = (
        "no https://user:pw@host/x?sig=zzz) of wJalrX/UtnF wJalrX%2FUtnF sv=1&sig=a+b/c\nsecond: pw"
    )
    assert scrub(text) == "no https://host/x) of *** *** ***"
