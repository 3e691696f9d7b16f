"""A real S3 endpoint over HTTP on loopback, and a proxy before it that puts faults in between."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pyarrow import fs

from tests.support.wait import until

USER, PASSWORD = "AKIAUSER", "very/secret+word"
_ENCODED = "very%2Fsecret%2Bword"
_EMPTY_LISTING = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<Name>bucket</Name><Prefix/><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys>"
    b"<IsTruncated>false</IsTruncated></ListBucketResult>"
)


class Fault(StrEnum):
    """What happens to a request on its way."""

    CUT = "cut"  # the connection ends in the middle of its body
    FAILED = "failed"  # status 500
    CHANGED = "changed"  # one bit of its body is another
    LATE = "late"  # the listing is as before everything was put


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked."""

    method: str
    path: str

    @property
    def puts(self) -> bool:
        """Whether it puts data."""
        return self.method == "PUT"

    @property
    def lists(self) -> bool:
        return self.method == "GET" and "list-type" in self.path


class Proxy:
    """Hands requests on to `port`; what `fault` returns for one happens to it."""

    def __init__(self, port: int) -> None:
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.seen: list[Request] = []
        self._upstream = port
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client has had enough
                    self.close_connection = True

            def __getattr__(self, name: str) -> Callable[[], None]:
                if name.startswith("do_"):
                    return lambda: proxy._pass_on(self)
                raise AttributeError(name)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(handler.command, handler.path)
        self.seen.append(request)
        fault = self.fault(request)
        if fault is Fault.CUT:
            handler.rfile.read(100)
            handler.close_connection = True
            return
        body = _body(handler)
        match fault:
            case Fault.FAILED:
                _answer(handler, 500, {}, b"")
            case Fault.LATE:
                _answer(handler, 200, {"Content-Type": "application/xml"}, _EMPTY_LISTING)
            case Fault.CHANGED:
                middle = len(body) // 2
                changed = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
                self._ask(handler, changed)
            case _:
                self._ask(handler, body)

    def _ask(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", self._upstream)) as upstream:
            headers = {key: value for key, value in handler.headers.items() if _goes_on(key)}
            upstream.request(handler.command, handler.path, body or None, headers)
            answer = upstream.getresponse()
            kept = {key: value for key, value in answer.getheaders() if _goes_on(key)}
            content = answer.read()
            if handler.command == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length", "0")
            _answer(handler, answer.status, kept, content)


def _goes_on(header: str) -> bool:
    return header.lower() not in ("expect", "transfer-encoding", "connection", "content-length")


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    chunks = []
    while length := int(handler.rfile.readline().split(b";")[0], 16):
        chunks.append(handler.rfile.read(length))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(chunks)


def _answer(
    handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes
) -> None:
    handler.send_response_only(status)
    for key, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(key, value)
    handler.end_headers()
    handler.wfile.write(content)


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """An endpoint with one bucket, and the proxy before it."""

    proxy: Proxy
    port: int

    def url(self, prefix: str, port: int | None = None) -> str:
        """Of a place in the bucket, with credentials; through the proxy unless `port` is given."""
        endpoint = f"http://127.0.0.1:{port or self.proxy.port}"
        return (
            f"s3://{USER}:{_ENCODED}@bucket/{prefix}?endpoint_override={endpoint}&region=us-east-1"
        )

    def direct(self) -> Any:
        """A file system that meets no faults."""
        return _file_system(self.port)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """moto's server, as a process of its own that ends with the block."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        port = _port_of(server)
        _file_system(port, "&allow_bucket_creation=true").create_dir("bucket")
        with closing(Proxy(port)) as proxy:
            yield ObjectStore(proxy, port)
    finally:
        server.kill()
        server.communicate()


def _port_of(server: subprocess.Popen[str]) -> int:
    """Where it listens, which it says on standard error; the rest of that is thrown away."""
    assert server.stderr is not None
    lines = server.stderr
    found: list[int] = []

    def watch() -> None:
        for line in lines:
            if "Running on http://" in line:
                found.append(int(line.strip().rpartition(":")[2]))

    threading.Thread(target=watch, daemon=True).start()
    until(lambda: bool(found) or server.poll() is not None, 30, "the object store listens")
    assert found, f"moto's server ended: {server.returncode}"
    return found[0]


def _file_system(port: int, more: str = "") -> Any:
    endpoint = f"endpoint_override=http://127.0.0.1:{port}&region=us-east-1{more}"
    return fs.FileSystem.from_uri(f"s3://{USER}:{_ENCODED}@bucket?{endpoint}")[0]
