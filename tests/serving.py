"""A local server that misbehaves as servers do, for the tests of downloads."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
