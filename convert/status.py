"""How the command ends: the exit status, and one message for the person."""

from enum import IntEnum


class Status(IntEnum):
    """Documented in ``port_weights.py --help``."""

    PROVEN = 0
    USAGE = 2
    UNAVAILABLE = 3
    REFUSED = 4
    NOT_PROVEN = 5
    NOT_WRITTEN = 6
    INTERRUPTED = 130


class PortFailureError(Exception):
    """Ends the command with a status; the message is one line that names the file and the way out."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
