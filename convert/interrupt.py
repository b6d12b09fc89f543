"""Ctrl-C: the process ends with status 130, quietly, whatever code is running.

KeyboardInterrupt alone does not see to that: raised in the callback that JAX gives to the garbage collector it is
lost, and raised in an import it can come out as an ImportError. So the process ends on the spot, and KeyboardInterrupt
is left to the moments when there is something to clean up.
"""

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from exit_status import Status

_Handler = Callable[[int, FrameType | None], None]


@contextmanager
def ends_the_process(as_json: bool) -> Iterator[None]:
    """In the block Ctrl-C ends the process at once, with one line on standard error and, for machines, one object."""

    def end() -> NoReturn:
        try:
            # Not by sys.stderr, which may be in the middle of a line; and the thread of the spinner writes no more.
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
    """In the block, inside one of ``ends_the_process``, Ctrl-C raises KeyboardInterrupt."""
    gc.disable()  # else JAX's callback could run
    try:
        with _handled_by(signal.default_int_handler):
            yield
    finally:
        gc.enable()


@contextmanager
def _handled_by(handler: _Handler) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as for a job in the background of a script
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
