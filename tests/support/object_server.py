"""A store on loopback: plain HTTP and as much of S3 as reading needs, with faults on request.

    with serving({"images/a.jpg": data}) as server:
        server.url                         http://127.0.0.1:PORT; an object is at URL/KEY
        server.s3()                        environment in which s3://bucket/KEY is the same object
        server.meets("images/a.jpg", "500", "reset")     its next two requests fail so

GET with Range, HEAD and, below /bucket, ListObjectsV2 with pages of `page` keys. It runs in a
thread of its own. In a process of its own, with the files of a folder, for as long as its input is
open:

    python tests/support/object_server.py FOLDER LATENCY
"""

import asyncio
import contextlib
import functools
import hashlib
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

BUCKET = "bucket"
REASONS = {200: "OK", 206: "Partial Content", 302: "Found", 403: "Forbidden", 404: "Not Found"}


class Request(NamedTuple):
    method: str
    key: str  # "?" for a list
    first: int
    count: int  # bytes asked for, -1 for the rest


class ObjectServer:
    """`objects` may change while it runs. What was asked is in `requests`."""

    def __init__(self, objects: dict[str, bytes], *, latency: float = 0.0, page: int = 1000):
        self.objects, self.latency, self.page = objects, latency, page
        self.requests: list[Request] = []
        self.headers: list[dict[str, str]] = []  # of each of them
        self.in_flight = self.most_in_flight = 0
        self._faults: dict[str, deque[str]] = defaultdict(deque)
        self._always: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._open: set[_Connection] = set()
        self._thread = threading.Thread(target=self._serve, name="object server", daemon=True)
        self._thread.start()
        self._ready.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def s3(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "KEYOFTHETEST",
            "AWS_SECRET_ACCESS_KEY": "SECRETOFTHETEST",
            "AWS_REGION": "us-east-1",
        }

    def meets(self, key: str, *faults: str) -> None:
        """Its next requests meet these, in turn: a status ("500"), "reset", "slow" (a byte every
        tenth of a second), "cut" (half of what the header says), "short" (half, and a header that
        says so), "hang", "whole" (the range is not heeded), "changed" (other bytes, once)."""
        self._faults[key].extend(faults)

    def always(self, key: str, fault: str) -> None:
        """As `meets`, from now on; "" for no more."""
        self._always[key] = fault

    def count(self, key: str, method: str = "GET") -> int:
        return Counter((r.method, r.key) for r in self.requests)[method, key]

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _hang_up(self) -> None:
        self._server.close()
        while self._open or len(asyncio.all_tasks()) > 1:  # a task takes a connection
            for connection in self._open:
                connection.transport.abort()
            await asyncio.sleep(0.001)

    def fault(self, key: str) -> str:
        faults = self._faults[key]
        return faults.popleft() if faults else self._always.get(key, "")

    def _serve(self) -> None:
        listening = self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=512)
        self._server = self._loop.run_until_complete(listening)
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()


class _Connection(asyncio.Protocol):
    """Requests of one connection, one after the other."""

    def __init__(self, server: ObjectServer) -> None:
        self._server, self._buffer = server, b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._server._open.add(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._server._open.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
            method, target, _ = first.split(" ")
            server = self._server
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            if server.latency:
                server._loop.call_later(server.latency, self._answer, method, target, headers)
            else:
                self._answer(method, target, headers)

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> None:
        server = self._server
        server.in_flight -= 1
        path, _, query = target.partition("?")
        key = unquote(path).removeprefix("/")
        if "authorization" in headers:  # S3: the first part is the bucket
            key = key.removeprefix(BUCKET).removeprefix("/")
        is_list = "list-type=2" in query
        first, count = _range_of(headers.get("range", ""))
        server.requests.append(Request(method, "?" if is_list else key, first, count))
        server.headers.append(headers)
        fault = server.fault("?" if is_list else key)
        if fault.isdigit():
            self._send(int(fault), b"<Error><Code>Told</Code></Error>")
        elif fault.startswith("to "):
            self._send(302, b"", {"Location": fault[3:]})
        elif fault == "reset":
            self.transport.abort()
        elif fault == "hang":
            return
        elif is_list:
            self._send(200, self._listed(parse_qs(query, keep_blank_values=True)))
        elif key not in server.objects:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._send_object(method, server.objects[key], first, count, fault)

    def _send_object(self, method: str, data: bytes, first: int, count: int, fault: str) -> None:
        tag = {"ETag": _tag(data), "Accept-Ranges": "bytes"}
        tag["Last-Modified"] = "Sat, 01 Jan 2022 00:00:00 GMT"
        part, status = data, 200
        if count and fault != "whole":
            part = data[first:] if count < 0 else data[first : first + count]
            status = 206
            tag["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        if fault == "changed":
            part = bytes(255 - byte for byte in part)
        if method == "HEAD":
            self._send(status, b"", tag, length=len(part))
        elif fault == "cut":
            self._send(status, part[: len(part) // 2], tag, length=len(part))
            self.transport.close()
        elif fault == "short":
            self._send(status, part[: len(part) // 2], tag)
        elif fault == "slow":
            self._send(status, b"", tag, length=len(part))
            self._trickle(part)
        else:
            self._send(status, part, tag)

    def _trickle(self, part: bytes) -> None:
        if part and not self.transport.is_closing():
            self.transport.write(part[:1])
            self._server._loop.call_later(0.1, self._trickle, part[1:])

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int = -1
    ) -> None:
        fields = {"Content-Length": str(len(body) if length < 0 else length), **(headers or {})}
        head = f"HTTP/1.1 {status} {REASONS.get(status, 'Told')}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.transport.write(head.encode() + b"\r\n" + body)

    def _listed(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        delimiter = query.get("delimiter", [""])[0]
        after = query.get("continuation-token", [""])[0]
        keys, folders = [], set()
        for key in sorted(self._server.objects):
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter, 1)[0] + delimiter)
            else:
                keys.append(key)
        entries = sorted([*keys, *folders])
        entries = [entry for entry in entries if entry > after]
        shown, rest = entries[: self._server.page], entries[self._server.page :]
        parts = [
            '<?xml version="1.0" encoding="UTF-8"?>',
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">',
            f"<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>",
        ]
        if rest:
            parts.append(f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>")
        for entry in shown:
            if entry in folders:
                parts.append(f"<CommonPrefixes><Prefix>{escape(entry)}</Prefix></CommonPrefixes>")
                continue
            data = self._server.objects[entry]
            parts.append(
                f"<Contents><Key>{escape(entry)}</Key><Size>{len(data)}</Size>"
                "<LastModified>2022-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{_tag(data)}</ETag></Contents>"
            )
        return "".join([*parts, "</ListBucketResult>"]).encode()


@functools.cache
def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _range_of(said: str) -> tuple[int, int]:
    """First byte and number of bytes of a Range header; no header: count 0."""
    if not said:
        return 0, 0
    first, _, last = said.removeprefix("bytes=").partition("-")
    return int(first), int(last) - int(first) + 1 if last else -1


@contextlib.contextmanager
def serving(objects: dict[str, bytes], **options: float) -> Iterator[ObjectServer]:
    server = ObjectServer(objects, **options)
    try:
        yield server
    finally:
        server.close()


def main() -> None:
    folder, latency = Path(sys.argv[1]), float(sys.argv[2])
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    objects = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    with serving(objects, latency=latency) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
