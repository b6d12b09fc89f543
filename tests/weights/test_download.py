"""The download, from a real local server that misbehaves in all the ways that servers do."""

import base64
import fcntl
import hashlib
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from serving import Answer, Server, complete, half, rest, send, serve, unsized

from flax_googlenet.weights import download
from flax_googlenet.weights.download import DownloadError, fetch, hash_in_name

CONTENT = random.Random(0).randbytes(3 * 2**20 + 17)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2
OTHER = bytes(HALF)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(CONTENT) as server:
        yield server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pth"


@pytest.fixture
def partial(path: Path) -> Path:
    return path.with_name("model.pth.partial")


@pytest.fixture
def closed_url(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}/model.pth"


def get(url: str, path: Path, sha256: str | None = SHA256, max_bytes: int = 10**7, **options: Any) -> None:
    fetch(url, path, sha256=sha256, max_bytes=max_bytes, **options)


def failure(url: str, path: Path, *args: Any, shown: str | None = None, **options: Any) -> str:
    """Return the message without the URL at its start, which is shown as ``shown``."""
    with pytest.raises(DownloadError) as caught:
        get(url, path, *args, **options)
    message = str(caught.value)
    assert message.startswith(f"{shown or url}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{shown or url}: ")


@pytest.mark.parametrize("answer", [rest, unsized])
@pytest.mark.parametrize("sha256", [SHA256, SHA256[:8], None], ids=["hash", "prefix", "unknown"])
def test_a_file_arrives_whole_and_nothing_else_is_left(
    server: Server, path: Path, sha256: str | None, answer: Answer
) -> None:
    server.answer = answer
    get(server.url, path, sha256)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert server.ranges == [None]


def test_progress_goes_from_nothing_up_to_the_total(server: Server, path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    get(server.url, path, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, len(CONTENT))
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert calls == sorted(calls)
    assert len(calls) >= 4


def test_progress_has_no_total_if_the_server_does_not_say(server: Server, path: Path) -> None:
    server.answer = unsized
    calls: list[tuple[int, int | None]] = []
    get(server.url, path, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, None)
    assert calls[-1] == (len(CONTENT), None)


def test_a_cut_off_download_is_resumed(server: Server, path: Path, partial: Path) -> None:
    server.answer = half
    assert failure(server.url, path) == f"cut off after {HALF} of {len(CONTENT)} bytes"
    assert not path.exists()
    assert partial.read_bytes() == CONTENT[:HALF]

    server.answer = rest
    calls: list[tuple[int, int | None]] = []
    get(server.url, path, on_progress=lambda done, total: calls.append((done, total)))
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert calls[0] == (HALF, len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert not partial.exists()


def test_a_cut_off_download_without_a_known_hash_starts_again(server: Server, path: Path, partial: Path) -> None:
    server.answer = half
    failure(server.url, path, None)
    assert not partial.exists()

    partial.write_bytes(OTHER)  # left by a killed process
    server.answer = rest
    get(server.url, path, None)
    assert server.ranges == [None, None]
    assert path.read_bytes() == CONTENT


def test_a_chunked_download_that_is_cut_off_is_noticed(server: Server, path: Path) -> None:
    server.answer = lambda handler: send(handler, 200, b"5\r\nhello\r\n", {"Transfer-Encoding": "chunked"})
    assert failure(server.url, path, None) == "cut off after 5 of an unknown number of bytes"
    assert not path.exists()


def test_a_connection_that_is_closed_without_an_answer_is_an_error(server: Server, path: Path) -> None:
    server.answer = lambda handler: None
    assert failure(server.url, path) == "no connection: the server closed it without an answer"


def test_a_stalled_download_ends_and_is_resumed(server: Server, path: Path) -> None:
    server.answer = server.stall
    message = failure(server.url, path, timeout=0.5)
    assert message == f"stalled: no data for 0.5 s after {HALF} of {len(CONTENT)} bytes"
    assert not path.exists()

    server.answer = rest
    get(server.url, path)
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert path.read_bytes() == CONTENT


def test_a_server_that_never_answers_ends_too(server: Server, path: Path) -> None:
    server.answer = lambda handler: server.is_over.wait()
    assert failure(server.url, path, timeout=0.5) == "stalled: no data for 0.5 s"
    assert list(path.parent.iterdir()) == []


def test_an_interrupted_download_is_resumed(server: Server, path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done > HALF:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server.url, path, on_progress=interrupt)
    assert not path.exists()
    get(server.url, path)
    assert server.ranges[1] is not None
    assert path.read_bytes() == CONTENT


def test_a_killed_download_leaves_the_old_file_and_is_resumed(server: Server, path: Path, partial: Path) -> None:
    path.write_bytes(OTHER)
    server.answer = server.stall
    program = f"""
import sys
from pathlib import Path
from flax_googlenet.weights.download import fetch
report = lambda done, total: print(done, flush=True)
fetch({server.url!r}, Path({str(path)!r}), sha256={SHA256!r}, max_bytes=10**7, on_progress=report)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert f"{HALF}\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == OTHER
    # The last bytes may still have been in the buffer of the process.
    assert partial.stat().st_size > 0
    assert CONTENT.startswith(partial.read_bytes())

    server.answer = rest
    size = partial.stat().st_size
    get(server.url, path)
    assert server.ranges == [None, f"bytes={size}-"]
    assert path.read_bytes() == CONTENT


def test_a_download_that_was_killed_just_before_the_rename_needs_no_network(
    closed_url: str, path: Path, partial: Path
) -> None:
    partial.write_bytes(CONTENT)
    get(closed_url, path)
    assert path.read_bytes() == CONTENT
    assert not partial.exists()


def test_a_stale_partial_file_is_noticed_by_the_hash(server: Server, path: Path, partial: Path) -> None:
    partial.write_bytes(OTHER)
    get(server.url, path)
    assert server.ranges == [f"bytes={HALF}-", None]
    assert path.read_bytes() == CONTENT
    assert not partial.exists()


def test_a_partial_file_longer_than_the_file_starts_again(server: Server, path: Path, partial: Path) -> None:
    partial.write_bytes(CONTENT + b"more")
    get(server.url, path)
    assert server.ranges == [f"bytes={len(CONTENT) + 4}-", None]  # the server answers 416 first
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT[:HALF], OTHER, CONTENT + b"more"], ids=["start", "other", "longer"])
def test_from_a_server_that_ignores_the_range_all_is_taken(
    server: Server, path: Path, partial: Path, left: bytes
) -> None:
    partial.write_bytes(left)
    server.answer = complete
    get(server.url, path)
    assert server.ranges == [f"bytes={len(left)}-"]
    assert path.read_bytes() == CONTENT


def test_a_range_that_starts_elsewhere_is_not_taken(server: Server, path: Path, partial: Path) -> None:
    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        if "Range" in handler.headers:
            content_range = f"bytes 1-{len(CONTENT) - 1}/{len(CONTENT)}"
            length = len(CONTENT) - 1
            send(handler, 206, CONTENT[1:], {"Content-Length": str(length), "Content-Range": content_range})
        else:
            complete(handler)

    partial.write_bytes(CONTENT[:HALF])
    server.answer = elsewhere
    calls: list[int] = []
    get(server.url, path, on_progress=lambda done, _: calls.append(done))
    assert calls[0] == 0  # it did not accept the wrong range, only to find a wrong hash in the end
    assert server.ranges == [f"bytes={HALF}-", None]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("left", "requests"), [(b"", [None]), (OTHER, [f"bytes={HALF}-", None])], ids=["nothing", "other"]
)
def test_a_wrong_hash_is_an_error_and_nothing_is_kept(
    server: Server, path: Path, partial: Path, left: bytes, requests: list[str | None]
) -> None:
    partial.write_bytes(left)
    message = failure(server.url, path, "1378be20")
    assert message == f"wrong file: its sha256 is {SHA256}, and it should start with 1378be20"
    assert server.ranges == requests
    assert list(path.parent.iterdir()) == []


def test_a_range_without_a_request_for_it_is_refused(server: Server, path: Path) -> None:
    server.answer = lambda handler: send(handler, 206, b"hello", {"Content-Range": f"bytes 0-4/{len(CONTENT)}"})
    assert failure(server.url, path, None) == "HTTP 206 Partial Content"
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "HTTP 404 Not Found"),
        (503, "HTTP 503 Service Unavailable"),
        (204, "HTTP 204 No Content"),
        (206, "HTTP 206 Partial Content"),
        (416, "HTTP 416 Requested Range Not Satisfiable"),
        (599, "HTTP 599"),  # a status without a name
    ],
)
def test_an_http_status_is_an_error(server: Server, path: Path, status: int, message: str) -> None:
    server.answer = lambda handler: send(handler, status, b"", {"Content-Length": "0"})
    assert failure(server.url, path) == message
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.0 404 \x1b[2JGone, /model.pth?key=secret\r\n\r\n", "HTTP 404 Not Found"),
        (b"hello\x1b[2J, /model.pth?key=secret\r\n", "no connection: the answer is not HTTP"),
    ],
)
def test_a_message_quotes_nothing_from_the_server(server: Server, path: Path, answer: bytes, message: str) -> None:
    server.answer = lambda handler: handler.wfile.write(answer)
    assert failure(server.url, path) == message


NOWHERE = "HTTP 302 Found, which leads in a circle or to a URL without http or https"


def test_a_redirect_to_itself_is_an_error(server: Server, path: Path) -> None:
    server.answer = lambda handler: send(handler, 302, b"", {"Location": handler.path})
    assert failure(server.url, path) == NOWHERE


def test_an_error_of_the_server_keeps_the_partial_file(server: Server, path: Path, partial: Path) -> None:
    partial.write_bytes(CONTENT[:HALF])
    server.answer = lambda handler: send(handler, 503, b"", {})
    failure(server.url, path)
    assert partial.read_bytes() == CONTENT[:HALF]


def test_a_redirect_is_followed_and_the_range_with_it(server: Server, path: Path, partial: Path) -> None:
    def redirect(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/model.pth":
            send(handler, 302, b"", {"Location": "/elsewhere.pth"})
        else:
            rest(handler)

    partial.write_bytes(CONTENT[:HALF])
    server.answer = redirect
    get(server.url, path)
    assert server.ranges == [f"bytes={HALF}-"] * 2
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file:///etc/hostname?key=secret", NOWHERE),
        ("ftp://user:secret@127.0.0.1/a", "no connection: redirected to ftp"),
        (
            "http://user:secret@127.0.0.1/a",
            "no connection: the URL, a URL that it redirects to or the URL of the proxy is",
        ),
        ("http://127.0.0.1:secret/a", "no connection: the URL, a URL that it redirects to or the URL of the proxy is"),
    ],
)
def test_a_redirect_leads_to_http_only(server: Server, path: Path, target: str, message: str) -> None:
    server.answer = lambda handler: send(handler, 302, b"", {"Location": target})
    assert failure(server.url, path, None).startswith(message)
    assert list(path.parent.iterdir()) == []


def test_a_password_is_sent_to_its_host_alone_and_never_shown(server: Server, path: Path) -> None:
    sent: list[str | None] = []

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        sent.append(handler.headers.get("Authorization"))
        if handler.path.startswith("/model.pth"):
            send(handler, 302, b"", {"Location": "/elsewhere.pth?key=secret"})
        else:
            send(handler, 403, b"", {})

    server.answer = redirect
    url = server.url.replace("//", "//me%40home:sec%2Fret@") + "?key=secret#secret"
    assert failure(url, path, shown=server.url) == "HTTP 403 Forbidden"
    assert sent == [f"Basic {base64.b64encode(b'me@home:sec/ret').decode()}", None]
    server.answer = rest
    get(url, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ("http://user:secret@127.0.0.1:9", "no connection: Connection refused"),
        (
            "http://user:secret@127.0.0.1:secret",
            "no connection: the URL, a URL that it redirects to or the URL of the proxy is",
        ),
        ("http:secret", "no connection: the URL, a URL that it redirects to or the URL of the proxy is"),
    ],
)
def test_the_password_of_a_proxy_is_never_shown(
    proxy: str, message: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert failure("http://127.0.0.2/model.pth", path).startswith(message)


def test_a_proxy_that_refuses_is_reported_with_its_status(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = lambda handler: handler.wfile.write(b"HTTP/1.0 407 who are you, secret?\r\n\r\n")
    monkeypatch.setenv("https_proxy", server.url.replace("//", "//user:secret@"))
    message = failure("https://127.0.0.2/model.pth", path)
    assert message == "no connection: the proxy answers HTTP 407 Proxy Authentication Required"


def test_a_file_that_exists_with_the_right_hash_needs_no_request(server: Server, path: Path) -> None:
    path.write_bytes(CONTENT)
    get(server.url, path, SHA256[:8])
    assert server.ranges == []


def test_a_damaged_file_is_downloaded_again(server: Server, path: Path) -> None:
    path.write_bytes(b"\0" + CONTENT[1:])
    path.chmod(0o600)
    get(server.url, path)
    assert server.ranges == [None]
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_without_a_known_hash_is_downloaded_again(server: Server, path: Path) -> None:
    path.write_bytes(OTHER)
    get(server.url, path, None)
    assert server.ranges == [None]
    assert path.read_bytes() == CONTENT


def test_a_damaged_file_is_kept_and_named_if_the_server_is_down(closed_url: str, path: Path) -> None:
    path.write_bytes(OTHER)
    found = hashlib.sha256(OTHER).hexdigest()
    damage = f"the file at {path} is damaged: its sha256 is {found}, and it should start with {SHA256}"
    assert failure(closed_url, path) == f"no connection: Connection refused; {damage}"
    assert path.read_bytes() == OTHER


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["hash", "unknown"])
def test_a_file_whose_announced_size_is_too_large_is_refused(server: Server, path: Path, sha256: str | None) -> None:
    seen: list[int] = []
    message = failure(server.url, path, sha256, max_bytes=1000, on_progress=lambda done, _: seen.append(done))
    assert message == f"too large: {len(CONTENT)} bytes, and at most 1000 are accepted"
    assert seen == [0]
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["hash", "unknown"])
def test_a_file_that_becomes_too_large_is_refused(server: Server, path: Path, sha256: str | None) -> None:
    server.answer = unsized
    message = failure(server.url, path, sha256, max_bytes=1000)
    assert re.fullmatch(r"too large: over \d+ bytes, and at most 1000 are accepted", message)
    assert list(path.parent.iterdir()) == []


def test_a_file_of_just_the_largest_size_is_accepted(server: Server, path: Path) -> None:
    get(server.url, path, max_bytes=len(CONTENT))
    assert path.read_bytes() == CONTENT


def test_a_refused_connection_is_an_error(closed_url: str, path: Path) -> None:
    assert failure(closed_url, path) == "no connection: Connection refused"
    assert list(path.parent.iterdir()) == []


def test_a_partial_file_survives_a_refused_connection(closed_url: str, path: Path, partial: Path) -> None:
    partial.write_bytes(CONTENT[:HALF])
    failure(closed_url, path)
    assert partial.read_bytes() == CONTENT[:HALF]


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a.pth", "data:,a", "model.pth", ""])
def test_only_http_and_https_are_taken(url: str, path: Path) -> None:
    path.write_bytes(CONTENT)
    assert failure(url, path) == "only http and https URLs can be downloaded"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://", "http://"),
        ("http://[::1/a", "http://..."),
        ("http://127.0.0.1:x/a", "http://..."),
        ("http://127.0.0.1:1/é", "http://127.0.0.1:1/é"),
        ("http:// /", "http://..."),
        ("http://user:sec/ret@127.0.0.1/a", "http://..."),
        ("http://user:1/secret@127.0.0.1/a", "http://..."),
        ("http://user:1?secret@127.0.0.1/a", "http://..."),
    ],
)
def test_an_invalid_url_is_an_error(url: str, shown: str, path: Path) -> None:
    assert failure(url, path, shown=shown).startswith("no connection: ")


def test_two_processes_do_not_write_the_same_file(server: Server, path: Path, partial: Path) -> None:
    with open(partial, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for sha256 in (SHA256, None):
            assert failure(server.url, path, sha256) == f"another process is downloading it to {partial}"
        assert partial.exists()
    get(server.url, path)
    assert path.read_bytes() == CONTENT


def test_a_partial_file_that_another_process_has_just_renamed_is_not_written(path: Path, partial: Path) -> None:
    with open(partial, "a+b") as file:
        partial.rename(path)
        with pytest.raises(DownloadError, match="another process"):
            download._lock(file, partial)


def test_a_folder_that_cannot_be_written_is_an_os_error(server: Server, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        get(server.url, path / "missing" / "model.pth")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("googlenet-1378be20.pth", "1378be20"),
        ("https://download.pytorch.org/models/googlenet-1378be20.pth", "1378be20"),
        ("https://localhost/googlenet-1378be20.pth?download=1", "1378be20"),
        (f"model-{SHA256}.safetensors", SHA256),
        ("model-20240131-1378be20.pth", "1378be20"),
        ("model-20240131.pth", None),  # a date, a time, seconds since 1970, a number of steps
        ("model-20240131.of-1378be20.pth", "1378be20"),
        ("model-20240131123456.pth", None),
        ("model-1706659200.pth", None),
        ("model-00100000.pth", None),
        ("model-550e8400-e29b-41d4-a716-44665544a000.pth", None),
        ("https://localhost/v-0123456789abcdef.x/model.pth", None),
        ("https://localhost/model.pth?v=a-0123456789abcdef.x", None),
        ("googlenet.pth", None),
        ("googlenet-1378be2.pth", None),
        ("googlenet-1378BE20.pth", None),
        ("googlenet-1378be20", None),
    ],
)
def test_the_hash_is_read_from_the_name(name: str, found: str | None) -> None:
    assert hash_in_name(name) == found
