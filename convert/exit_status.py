"""How the command ends: the exit status, and one message for the person."""

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from flax_googlenet.errors import printable


class Status(IntEnum):
    """Documented in ``port_weights.py --help``."""

    PROVEN = 0
    USAGE = 2
    UNAVAILABLE = 3
    REFUSED = 4
    NOT_PROVEN = 5
    NOT_WRITTEN = 6
    CRASHED = 70
    INTERRUPTED = 130


class PortFailureError(Exception):
    """Ends the command with a status; the message is one line that names the file and the way out.

    ``facts`` is what ``--json`` prints beside them.
    """

    def __init__(self, status: Status, message: str, facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(printable(message))  # it may quote a file or a server
        self.status = status
        self.facts = facts
