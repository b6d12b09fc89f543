"""Downloads one file: resumed, checked against its hash, and in its place only when it is whole."""

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

from flax_googlenet.errors import printable, url_without_secrets
from flax_googlenet.files import keep_permissions, lock, replace_synced

_CHUNK = 1 << 20  # bytes


class DownloadError(Exception):
    """A download that failed; the message is one line that names the URL, without secrets, and what went wrong."""


class WrongFileError(DownloadError):
    """A download that came to its end, but its hash is not the expected one."""


def name_in_url(url: str) -> str:
    """Returns the last part of a URL's path, which may be empty."""
    return re.split("[?#]", url.partition("://")[2])[0].partition("/")[2].rpartition("/")[2]


def hash_in_name(url_or_path: str) -> str | None:
    """Returns the start of the sha256 in a file's name, as PyTorch's hub has it, or None.

    ``googlenet-1378be20.pth`` -> ``1378be20``: a dash, eight or more digits of a hash, a dot. Decimal digits alone are
    taken for a date, a time or a count of steps: ``model-20240131.pth``. One in 43 real hashes of eight digits looks
    like that, too; such a file is not checked, like any other without a hash in its name. The last group of a UUID is
    no hash either. torch.hub compares a hash only if it is asked to (``check_hash``). Here a hash in the name is always
    compared, because the older of PyTorch's formats has no checksum.
    """
    name = re.split("[?#]", url_or_path)[0].rpartition("/")[2]
    if re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.", name):
        return None
    return next((digits for digits in re.findall(r"-([0-9a-f]{8,64})\.", name) if not digits.isdecimal()), None)


def fetch(
    url: str,
    path: Path,
    *,
    sha256: str | None,
    max_bytes: int,
    timeout: float = 30.0,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
    warn: Callable[[str], object] = warnings.warn,
) -> None:
    """Downloads a file, unless it is there and has the right hash.

    The data goes to ``<name>.partial`` beside the file, which is synced and renamed once it is whole and verified: a
    kill at any moment leaves the old file or the new one. If the hash is known, the next call resumes what is left of
    a broken download; without a hash nothing would tell that the file on the server has changed, so it starts anew.

    Args:
        url: http or https; a user and a password in front of the host are sent to this host alone.
        path: the file to write, in a directory that exists.
        sha256: the first hex digits of the file's digest, in lower case; None if unknown.
        max_bytes: the largest file to accept.
        timeout: seconds without any data after which the download fails.
        on_progress: called at the start of a transfer and whenever data has come, with the bytes that are there and
            the bytes in all, None if the server does not say.
        warn: takes the warning that the file system has no locks: a second download to the same place would spoil both.

    Raises:
        DownloadError: if the file cannot be had, is too large or has the wrong hash; ``path`` is as before then.
        OSError: if the file cannot be written here.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError(f"{url_without_secrets(url)}: only http and https URLs can be downloaded")
    note = ""
    if sha256 and path.exists():
        with open(path, "rb") as cached:
            found = _sha256(cached)
        if found.startswith(sha256):
            return
        note = f"; the file at {path} is damaged: its sha256 is {found}, and it should start with {sha256}"

    beside = path.with_name(f"{path.name}.partial")
    try:
        with open(beside, "a+b") as file:
            _lock(file, beside, warn)
            try:
                _fill(file, sha256 or "", partial(_transfer, file, url, max_bytes, timeout, on_progress))
                file.flush()
                keep_permissions(file.fileno(), path)
                os.fsync(file.fileno())
                replace_synced(beside, path)
            except BaseException:
                if not sha256 or not file.seek(0, os.SEEK_END):  # nothing to resume
                    beside.unlink(missing_ok=True)
                raise
    except DownloadError as error:
        raise type(error)(printable(f"{url_without_secrets(url)}: {error}{note}")) from error


def _sha256(file: BufferedIOBase) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _lock(file: BufferedRandom, path: Path, warn: Callable[[str], object] = warnings.warn) -> None:
    """Lock a partial file: two processes that append to it would make a mixture of both."""
    try:
        lock(file, warn)
        is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())  # or another process has renamed it
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    if not is_ours:
        raise DownloadError(f"another process is downloading it to {path}")


def _fill(file: BufferedIOBase, sha256: str, transfer: Callable[[], bool]) -> None:
    """Makes the file whole and verified; ``sha256`` is empty if it is not known."""
    if not sha256:
        file.truncate(0)
    elif _sha256(file).startswith(sha256):  # the last run ended just before the rename
        return
    is_resumed = transfer()
    if is_resumed and not _sha256(file).startswith(sha256):  # the part that was there is another file's
        file.truncate(0)
        transfer()
    found = _sha256(file)
    if not found.startswith(sha256):
        file.truncate(0)
        raise WrongFileError(f"wrong file: its sha256 is {found}, and it should start with {sha256}")


def _transfer(
    file: BufferedIOBase, url: str, max_bytes: int, timeout: float, on_progress: Callable[[int, int | None], None]
) -> bool:
    """Appends what the file lacks, or writes all of it; returns whether it was the former."""
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
                chunk = response.read1(_CHUNK)  # unlike read, it does not wait for a whole chunk: a stall loses nothing
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
    """The response, and the offset at which its body starts: ``start``, or 0 if the server cannot start there."""
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
    """Return the status in Python's words: the server's may quote the URL, with a signature or a password in it."""
    try:
        words = HTTPStatus(code).phrase
    except ValueError:
        return f"HTTP {code}"
    leads_nowhere = ", which leads in a circle or neither to http nor to https" if 300 <= code < 400 else ""
    return f"HTTP {code} {words}{leads_nowhere}"


def _reason(error: BaseException | str) -> str:
    """Return the reason in our words or the system's: urllib may quote a URL, even a proxy's with its password."""
    if isinstance(error, RemoteDisconnected):
        return "closed without an answer"
    if isinstance(error, OSError):
        proxy = re.match("Tunnel connection failed: ([0-9]{3})", str(error))
        return f"the proxy answers {_http_status(int(proxy[1]))}" if proxy else error.strerror or type(error).__name__
    if isinstance(error, HTTPException) and not isinstance(error, InvalidURL):
        return "what answers is not HTTP"
    return "the URL, one that it redirects to or that of the proxy is not valid"


def _stalled(timeout: float) -> str:
    return f"stalled: no data for {timeout:g} s"
