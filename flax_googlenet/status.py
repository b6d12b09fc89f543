"""How a command ends: the exit status, and one message for the person."""

from enum import IntEnum


class Status(IntEnum):
    """Documented in the ``--help`` of each subcommand."""

    DONE = 0
    SOME_UNREADABLE = 1
    USAGE = 2
    NOT_DONE = 3
    GAVE_UP = 4  # a training that stopped itself
    INTERRUPTED = 130  # 128 and the number of the signal, as a shell says it: SIGINT
    CLOSED_PIPE = 141  # SIGPIPE
    TERMINATED = 143  # SIGTERM


class CommandError(Exception):
    """Ends the command with a status; the message, put on one line, names the file and the way out."""

    def __init__(self, status: Status, message: object) -> None:
        super().__init__(printable(" ".join(str(message).split())))
        self.status = status


def printable(text: str) -> str:
    """The text, which may quote a file, on one line and without escape sequences for the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
