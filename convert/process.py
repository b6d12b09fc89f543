"""How the process ends: its exit statuses, the errors behind them, and Ctrl-C.

KeyboardInterrupt alone does not end the process reliably: raised in the callback that JAX gives to the garbage
collector it is lost, and raised during an import it can turn into an ImportError. So Ctrl-C ends the process on the
spot, and raises KeyboardInterrupt only where there is something to clean up.
"""

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any, NoReturn

from flax_googlenet.errors import GoogLeNetError


class Status(IntEnum):
    """Exit statuses, which ``port_weights.py --help`` explains."""

    PROVEN = 0
    USAGE = 2
    UNAVAILABLE = 3
    REFUSED = 4
    NOT_PROVEN = 5
    NOT_WRITTEN = 6
    CRASHED = 70
    INTERRUPTED = 130


STATUSES = {
    "UsageError": Status.USAGE,
    "CommandError": Status.NOT_WRITTEN,
    "BackendError": Status.UNAVAILABLE,
    "DownloadError": Status.UNAVAILABLE,
    "InputError": Status.UNAVAILABLE,
    "GoogLeNetError": Status.REFUSED,  # all others: CheckpointError, PortingError and StateDictError
}
"""Name of an exception -> exit status; the nearest base class counts. Importing the classes would start PyTorch."""

Result = tuple[Status, dict[str, Any]]
"""The exit status, and what ``--json`` prints besides it; the entry "error" is the message of a failure."""


class InputError(GoogLeNetError):
    """A file, a package or a device that the command needs is not available."""


@contextmanager
def ends_on_ctrl_c(as_json: bool) -> Iterator[None]:
    """Make Ctrl-C end the process at once, with one line on standard error, and with one JSON object if asked for."""

    def end() -> NoReturn:
        try:
            # Written past sys.stderr, which may be in the middle of a line. The spinner's thread can write no more.
            stderr = os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            erase_spinner = b"\r\x1b[2K\x1b[?25h" if os.isatty(stderr) else b""
            os.write(stderr, erase_spinner + b"interrupted: no output is half-written\n")
            if as_json:
                os.write(1, json.dumps({"status": Status.INTERRUPTED, "error": "interrupted"}).encode() + b"\n")
        finally:
            os._exit(Status.INTERRUPTED)

    try:
        with _handled_by(lambda signum, frame: end()):
            yield
    except KeyboardInterrupt:
        end()


@contextmanager
def cleans_up() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt; for code inside ``ends_on_ctrl_c`` that has something to clean up."""
    gc.disable()  # JAX's callback would swallow the exception
    try:
        with _handled_by(signal.default_int_handler):
            yield
    finally:
        gc.enable()


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a shell script starts its background jobs with SIGINT ignored
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
