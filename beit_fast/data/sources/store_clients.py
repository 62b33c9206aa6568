"""Clients of object stores: obstore's, and of fsspec for the schemes that it lacks."""

import contextlib
import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

from beit_fast.checks import SECRET, has_secret
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.sources.places import scheme_of
from beit_fast.data.sources.store_errors import as_os_error, scrub

HTTP = ("http", "https")
OBSTORE = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", *HTTP)
# Through fsspec, each with a package of its own. What reads files of this machine or runs
# commands is not among them.
FSSPEC = ("hf", "hdfs", "webhdfs", "sftp", "smb", "ftp", "oss")
_TRIES_OF_CLIENT = 3  # of a request that a server refuses for the moment, within its time
_LISTINGS = 32  # at once
_TAGS = ("ETag", "etag", "blob_id", "oid", "checksum", "mtime", "LastModified", "modified")


class Listed(NamedTuple):
    name: str  # relative to the place
    size: int  # bytes
    tag: str  # "" in a list


class Client(Protocol):
    """All methods may be called from several threads, and raise OSError as `Storage` says."""

    def read(self, name: str, first: int, count: int, most: int) -> bytes:
        """Those bytes, perhaps fewer; count -1: all, OSError (EFBIG) for more than `most`."""
        ...

    def state(self, name: str) -> Listed: ...

    def listed(self) -> Iterator[list[Listed]]:
        """All objects of the place, in no order. Raises OSError (EOPNOTSUPP) where there is no
        list."""
        ...


def open_client(url: str, reads: ReadConfig) -> Client:
    """Of the place that `url` names, without credentials in it.

    Raises ValueError for one with credentials, a scheme that is not read, what is not installed,
    and what the client says of its environment.
    """
    if has_secret(url):
        raise ValueError(f"the {scheme_of(url)}:// URL {SECRET}")
    scheme = scheme_of(url)
    if scheme in OBSTORE:
        return _Obstore(url, scheme, reads)
    if scheme in FSSPEC:
        return _Fsspec(url, scheme)
    raise ValueError(
        f"{url}: images are not read from {scheme}://: give a path, or a URL of "
        f"{', '.join(f'{name}://' for name in OBSTORE + FSSPEC)}"
    )


def request_limit(reads: ReadConfig) -> float:
    """Seconds that one request may take, and after which none is repeated. A client's tries end
    within twice that, half of the time that a read has."""
    return reads.read_timeout / 4


class _Obstore:
    """Threads that wait in it hold no lock of the interpreter."""

    def __init__(self, url: str, scheme: str, reads: ReadConfig) -> None:
        try:
            import obstore
            from obstore.store import HTTPStore, from_url
        except ImportError as error:
            raise ValueError(_missing(url, "obstore")) from error
        self._obstore, self._lists, self._url = obstore, scheme not in HTTP, url
        limit = timedelta(seconds=request_limit(reads))
        client = {"timeout": limit, "connect_timeout": min(limit, timedelta(seconds=5))}
        if scheme == "http" or _has_plain_endpoint():
            client["allow_http"] = True
        backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2)}
        retry = {
            "max_retries": _TRIES_OF_CLIENT - 1,
            "retry_timeout": limit,
            "backoff": backoff | {"base": 2},
        }
        # Not from_url for http: of some hosts it makes a client that signs what it asks.
        make = from_url if self._lists else HTTPStore
        try:
            self._store = make(url, client_options=client, retry_config=retry)
        except Exception as error:
            raise ValueError(_not_opened(url, error)) from None  # its text may hold secrets

    def read(self, name: str, first: int, count: int, most: int) -> bytes:
        with _errors(self._url, name):
            if count >= 0:
                part = self._obstore.get_range(self._store, name, start=first, length=count)
                return part.to_bytes()
            whole = self._obstore.get(self._store, name)
            _refuse_large(whole.meta["size"], most)
            return whole.bytes().to_bytes()

    def state(self, name: str) -> Listed:
        with _errors(self._url, name):
            return _listed(self._obstore.head(self._store, name))

    def listed(self) -> Iterator[list[Listed]]:
        if not self._lists:
            raise OSError(errno.EOPNOTSUPP, "a web server lists no files", self._url)
        with _errors(self._url, ""):
            top = self._obstore.list_with_delimiter(self._store)
        yield [_brief(meta) for meta in top["objects"]]
        # A page of a list tells where the next begins: what is below each folder comes at once.
        with ThreadPoolExecutor(_LISTINGS, thread_name_prefix="beit_fast list") as pool:
            yield from pool.map(self._below, top["common_prefixes"])

    def _below(self, prefix: str) -> list[Listed]:
        with _errors(self._url, ""):
            pages = self._obstore.list(self._store, prefix=prefix)
            return [_brief(meta) for page in pages for meta in page]


class _Fsspec:
    def __init__(self, url: str, scheme: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ValueError(_missing(url, "fsspec")) from error
        try:
            self._files, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise ValueError(
                f"{url} needs one more package ({scrub(str(error))}): install it"
            ) from None
        except Exception as error:
            raise ValueError(_not_opened(url, error)) from None
        self._url = url
        # Else the hub's client reads five megabytes for each part.
        self._options = {"cache_type": "none"} if scheme == "hf" else {}

    def read(self, name: str, first: int, count: int, most: int) -> bytes:
        with _errors(self._url, name):
            if count < 0:
                _refuse_large(self._files.size(self._path(name)) or 0, most)
            end = None if count < 0 else first + count
            return self._files.cat_file(self._path(name), start=first, end=end, **self._options)

    def state(self, name: str) -> Listed:
        with _errors(self._url, name):
            return Listed(name, *_of_info(self._files.info(self._path(name))))

    def listed(self) -> Iterator[list[Listed]]:
        with _errors(self._url, ""):
            found = self._files.find(self._root, detail=True)
        start = len(self._root.rstrip("/")) + 1
        yield [Listed(path[start:], info["size"] or 0, "") for path, info in found.items()]

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


@contextlib.contextmanager
def _errors(url: str, name: str) -> Iterator[None]:
    """Those of a client become OSErrors of the object."""
    try:
        yield
    except Exception as error:
        raise as_os_error(error, f"{url}/{name}" if name else url) from None  # see store_errors


def _has_plain_endpoint() -> bool:
    """Whether the environment names a store without TLS, as one's own often is."""
    names = ("AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    given = (value for name, value in os.environ.items() if name.startswith(names))
    return any(value.startswith("http://") for value in given)


def _refuse_large(size: int, most: int) -> None:
    if size > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def _listed(meta: dict[str, Any]) -> Listed:
    tag = meta["e_tag"] or meta["version"] or str(meta["last_modified"])
    return Listed(meta["path"], meta["size"], tag)


def _brief(meta: dict[str, Any]) -> Listed:
    """Without its tag: of millions, no more than is wanted."""
    return Listed(meta["path"], meta["size"], "")


def _of_info(info: dict[str, Any]) -> tuple[int, str]:
    tag = next((str(info[name]) for name in _TAGS if info.get(name) is not None), "")
    return info["size"] or 0, tag


def _missing(url: str, package: str) -> str:
    return f'{url} is read with {package}: pip install "beit_fast[cloud]", or give a folder on disk'


def _not_opened(url: str, error: Exception) -> str:
    return (
        f"{url} cannot be opened ({scrub(str(error))}): correct it, or the variables of the "
        "environment that the store's client reads"
    )
