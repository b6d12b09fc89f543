"""Ctrl-C and SIGTERM as a wish to stop soon, which the run looks for between two steps."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from flax_googlenet.commands.status import Status

_SAID = b"stopping after this step; Ctrl-C again ends at once\n"


class StopSignals:
    """In its ``with`` block the first Ctrl-C and any SIGTERM only set ``status``; a second Ctrl-C acts as before.

    Args:
        patience: The number of seconds that a wait for input may go on after a signal.
    """

    status: Status | None = None
    """With which the command is to end, or None to go on."""

    def __init__(self, patience: float = 0.0) -> None:
        self._patience, self._since = patience, 0.0

    def end_wait(self) -> bool:
        """Return whether a signal came, and a wait for input must end."""
        return self.status is not None and time.monotonic() - self._since >= self._patience

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:  # as for a job in the background of a script
                signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.status is None:
            self._since = time.monotonic()
        self.status = Status.TERMINATED if number == signal.SIGTERM else Status.INTERRUPTED
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
            # Over the line of progress, which is drawn anew below. A print could wait for a lock that is held here.
            with suppress(OSError):  # nobody reads standard error any more
                os.write(2, b"\r\x1b[2K" + _SAID if os.isatty(2) else _SAID)
