"""Downloads a file: resumes a broken transfer, checks the hash, and puts the file in place only once it is complete."""

import base64
import errno
import hashlib
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, InvalidURL, RemoteDisconnected
from io import BufferedIOBase, BufferedRandom
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import FTPHandler, Request, build_opener

from flax_googlenet.errors import GoogLeNetError, printable, url_without_secrets
from flax_googlenet.files import keep_permissions, lock, replace_synced

_CHUNK = 1 << 20  # bytes


class DownloadError(GoogLeNetError):
    """A failed download; the message is one line that names the file or the URL, without secrets, and the problem."""


class WrongFileError(DownloadError):
    """A complete download whose hash is not the expected one."""


def name_in_url(url: str) -> str:
    """Return the last part of a URL's path, which may be empty."""
    return re.split("[?#]", url.partition("://")[2])[0].partition("/")[2].rpartition("/")[2]


def hash_in_name(url_or_path: str) -> str | None:
    """Return the first digits of the sha256 that a file name contains, as in PyTorch's hub, or None.

    ``googlenet-1378be20.pth`` contains ``1378be20``: a dash, eight or more hexadecimal digits, a dot. Decimal digits
    alone count as a date, a time or a number of steps, as in ``model-20240131.pth``. One in 43 real hashes of eight
    digits looks like that; such a file is not checked, like one without a hash. The last group of a UUID is not a hash
    either. torch.hub checks a hash only on request (``check_hash``). Here it is always checked, because PyTorch's older
    format has no checksum.
    """
    name = re.split("[?#]", url_or_path)[0].rpartition("/")[2]
    if re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.", name):
        return None
    return next((digits for digits in re.findall(r"-([0-9a-f]{8,64})\.", name) if not digits.isdecimal()), None)


def fetch(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    sha1: str = "",
    max_bytes: int,
    timeout: float = 30.0,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
    warn: Callable[[str], object] = warnings.warn,
) -> None:
    """Download a file, unless it already exists with the right hash.

    The data goes to ``<name>.partial`` beside the file, which is synced and renamed once it is complete and verified: a
    kill at any moment leaves the old file or the new one. If the hash is known, the next call resumes a broken
    download. Without a hash it starts again, because the file on the server may have changed.

    Args:
        url: URL with http or https. A user and a password in front of the host are sent to this host only.
        path: File to write, in a directory that exists.
        sha256: First hexadecimal digits of the file's SHA-256 digest, in lower case; None if unknown.
        sha1: Its SHA-1 digest, for a file that was published with nothing better; empty if unknown.
        max_bytes: Size of the largest file to accept.
        timeout: Seconds without any data after which the download fails.
        on_progress: Called at the start of a transfer and after each block of data with the number of bytes received
            and the total, which is None if the server does not send it.
        warn: Called with a message if the file system has no locks, where nothing prevents a second download to
            ``path``.

    Raises:
        DownloadError: If the download fails, or the file is too large or has the wrong hash; ``path`` is unchanged.
        OSError: If the file cannot be written.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError(f"{url_without_secrets(url)}: only http and https URLs can be downloaded")
    note = ""
    algorithm, digest = ("sha1", sha1) if sha1 else ("sha256", sha256 or "")
    if digest and path.exists():
        with open(path, "rb") as cached:
            found = _digest(cached, algorithm)
        if found.startswith(digest):
            return
        note = f"; the file at {path} is damaged: its {algorithm} is {found}, and it should start with {digest}"

    beside = path.with_name(f"{path.name}.partial")
    try:
        with open(beside, "a+b") as file:
            _lock(file, beside, warn)
            try:
                _fill(file, algorithm, digest, partial(_transfer, file, url, max_bytes, timeout, on_progress))
                file.flush()
                keep_permissions(file.fileno(), path)
                os.fsync(file.fileno())
                replace_synced(beside, path)
            except BaseException:
                if not digest or not file.seek(0, os.SEEK_END):  # nothing to resume
                    beside.unlink(missing_ok=True)
                raise
    except DownloadError as error:
        raise type(error)(printable(f"{url_without_secrets(url)}: {error}{note}")) from error


def _digest(file: BufferedIOBase, algorithm: str) -> str:
    file.seek(0)
    return hashlib.file_digest(file, algorithm).hexdigest()


def _lock(file: BufferedRandom, path: Path, warn: Callable[[str], object] = warnings.warn) -> None:
    """Lock a partial file, because two processes that append to it would corrupt it."""
    try:
        lock(file, warn)
        is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())  # False if another process has renamed it
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    if not is_ours:
        raise DownloadError(f"another process is downloading it to {path}")


def _fill(file: BufferedIOBase, algorithm: str, digest: str, transfer: Callable[[], bool]) -> None:
    """Complete and verify the file; ``digest`` is empty if it is unknown."""
    if not digest:
        file.truncate(0)
    elif _digest(file, algorithm).startswith(digest):  # the previous process ended just before the rename
        return
    is_resumed = transfer()
    if is_resumed and not _digest(file, algorithm).startswith(digest):  # the part that existed belongs to another file
        file.truncate(0)
        transfer()
    found = _digest(file, algorithm)
    if not found.startswith(digest):
        file.truncate(0)
        raise WrongFileError(f"wrong file: its {algorithm} is {found}, and it should start with {digest}")


def _transfer(
    file: BufferedIOBase, url: str, max_bytes: int, timeout: float, on_progress: Callable[[int, int | None], None]
) -> bool:
    """Append the missing part to the file, or write all of it; return whether a part was appended."""
    response, start = _open(url, file.seek(0, os.SEEK_END), timeout)
    with response:
        file.truncate(start)
        done, total = start, None if response.length is None else start + response.length
        on_progress(done, total)
        while done != total:
            if max(done, total or 0) > max_bytes:
                file.truncate(0)
                raise DownloadError(f"too large: {total or f'over {done}'} bytes, and at most {max_bytes} are accepted")
            so_far = f"{done} of {total or 'an unknown number of'} bytes"
            try:
                chunk = response.read1(_CHUNK)  # unlike read, it returns what has arrived, so a stall loses nothing
            except (OSError, HTTPException) as error:
                problem = _stalled(timeout) if isinstance(error, TimeoutError) else "cut off"
                raise DownloadError(f"{problem} after {so_far}") from error
            if not chunk:
                if total is not None:
                    raise DownloadError(f"cut off after {so_far}")
                break
            file.write(chunk)
            done += len(chunk)
            on_progress(done, total)
    return start > 0


class _NoFTP(FTPHandler):
    def ftp_open(self, req: Request) -> NoReturn:
        raise URLError(OSError(errno.EPROTONOSUPPORT, "redirected to ftp"))


def _open(url: str, start: int, timeout: float) -> tuple[HTTPResponse, int]:
    """Return the response and the offset of its body: ``start``, or 0 if the server cannot start there."""
    try:
        response = build_opener(_NoFTP).open(_request(url, start), timeout=timeout)
        if response.status == HTTPStatus.OK:
            return response, 0
        if start and response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            return response, start
        raise HTTPError(url, response.status, response.reason, response.headers, response)
    except HTTPError as error:
        error.close()
        if start and error.code in (HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
            return _open(url, 0, timeout)
        raise DownloadError(_http_status(error.code)) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            raise DownloadError(_stalled(timeout)) from error
        raise DownloadError(f"no connection: {_reason(reason)}") from error


def _request(url: str, start: int) -> Request:
    parts = urlsplit(url)
    user, separator, host = parts.netloc.rpartition("@")
    headers = {"User-Agent": "flax-googlenet"} | ({"Range": f"bytes={start}-"} if start else {})
    request = Request(parts._replace(netloc=host).geturl() if separator else url, headers=headers)  # noqa: S310  # see fetch
    if separator:
        name, _, password = user.partition(":")
        credentials = f"{unquote(name)}:{unquote(password)}".encode()
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(credentials).decode()}")
    return request


def _http_status(code: int) -> str:
    """Return a status in Python's words, because the server's may quote a URL with a signature or a password."""
    try:
        words = HTTPStatus(code).phrase
    except ValueError:
        return f"HTTP {code}"
    leads_nowhere = ", which leads in a circle or to a URL without http or https" if 300 <= code < 400 else ""
    return f"HTTP {code} {words}{leads_nowhere}"


def _reason(error: BaseException | str) -> str:
    """Return the reason in words of this module or the system: urllib may quote a URL, or a proxy's password."""
    if isinstance(error, RemoteDisconnected):
        return "the server closed it without an answer"
    if isinstance(error, OSError):
        proxy = re.match("Tunnel connection failed: ([0-9]{3})", str(error))
        return f"the proxy answers {_http_status(int(proxy[1]))}" if proxy else error.strerror or type(error).__name__
    if isinstance(error, HTTPException) and not isinstance(error, InvalidURL):
        return "the answer is not HTTP"
    return "the URL, a URL that it redirects to or the URL of the proxy is not valid"


def _stalled(timeout: float) -> str:
    return f"stalled: no data for {timeout:g} s"
