"""Local servers: one that misbehaves as servers do, for the tests of downloads, and an object store."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Answer = Callable[["Handler"], object]


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def complete(handler: "Handler") -> None:
    content = handler.server.content
    send(handler, 200, content, {"Content-Length": str(len(content))})


def rest(handler: "Handler") -> None:
    """Answer a request for a range as a good server does."""
    content = handler.server.content
    match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if match is None:
        complete(handler)
    elif (start := int(match[1])) >= len(content):
        send(handler, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
    else:
        content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
        length = len(content) - start
        send(handler, 206, content[start:], {"Content-Length": str(length), "Content-Range": content_range})


def half(handler: "Handler") -> None:
    content = handler.server.content
    send(handler, 200, content[: len(content) // 2], {"Content-Length": str(len(content))})


def unsized(handler: "Handler") -> None:
    send(handler, 200, handler.server.content, {})


class Server(ThreadingHTTPServer):
    """A server that sends a chosen answer, and records the Range header of every request."""

    daemon_threads = False  # so that closing waits for them and leaves no socket open

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/model.pth"
        self.content = content
        self.answer: Answer = rest
        self.ranges: list[str | None] = []
        self.is_over = threading.Event()

    def stall(self, handler: "Handler") -> None:
        half(handler)
        self.is_over.wait()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client has closed the connection
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.answer(self)

    do_CONNECT = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def serve(content: bytes) -> Iterator[Server]:
    """Serve a file for the time of a block."""
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.is_over.set()
            server.shutdown()
            thread.join()


class ObjectStoreHandler(BaseHTTPRequestHandler):
    """What reading needs of the protocol of Amazon's S3: objects, and the list of a bucket. It checks no signature."""

    protocol_version = "HTTP/1.1"
    bucket: str
    objects: dict[str, bytes]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, bucket, key = (unquote(url.path) + "/").split("/", 2)
        content, status, headers = self.objects.get(key.rstrip("/")), 200, {"ETag": '"1"'}
        if bucket == self.bucket and "list-type=2" in url.query:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            keys = [key for key in self.objects if key.startswith(prefix)]
            sizes = [(escape(key), len(self.objects[key])) for key in keys]
            entries = "".join(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in sizes)
            content = f"<ListBucketResult><KeyCount>{len(keys)}</KeyCount>{entries}</ListBucketResult>".encode()
            headers["Content-Type"] = "application/xml"
        elif content is None:
            status, content = 404, b"<Error><Code>NoSuchKey</Code></Error>" if self.command == "GET" else b""
        elif match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            headers["Content-Range"] = f"bytes {match[1]}-{match[2]}/{len(content)}"
            status, content = 206, content[int(match[1]) : int(match[2]) + 1]
        send(self, status, b"" if self.command == "HEAD" else content, headers | {"Content-Length": str(len(content))})

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def serve_objects(bucket: str, objects: dict[str, bytes]) -> Iterator[str]:
    """Serve objects, by key, for the time of a block; yield the query with which PyArrow's ``s3://`` URLs find them."""
    handler = type("Handler", (ObjectStoreHandler,), {"bucket": bucket, "objects": objects})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
        finally:
            server.shutdown()
            thread.join()
