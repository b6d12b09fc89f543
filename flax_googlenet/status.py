"""How a command ends: the exit status, and one message for the person."""

import os
import sys
from enum import IntEnum


class Status(IntEnum):
    """Documented in the ``--help`` of each subcommand."""

    DONE = 0
    SOME_UNREADABLE = 1
    USAGE = 2
    NOT_DONE = 3
    GAVE_UP = 4  # a training that stopped itself
    CRASHED = 70  # an error that nobody expected: EX_SOFTWARE of sysexits.h
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


def describe_crash(error: Exception, folder: str | os.PathLike[str] | None = None) -> str:
    """Write the traceback of an unexpected error to a new file, and return the message that names the file.

    Args:
        error: The error that no code has turned into a message of its own.
        folder: Where to write. By default the system's folder for temporary files.
    """
    import platform  # these here: every command imports this module before it hears Ctrl-C
    import tempfile
    import traceback
    from importlib.metadata import distributions

    packages = ("flax-googlenet", "jax", "jaxlib", "flax", "numpy")
    versions = ", ".join(f"{found.name} {found.version}" for found in distributions() if found.name in packages)
    report = (
        f"{sys.argv}\nPython {platform.python_version()} on {platform.platform()}, {versions}\n\n"
        f"{''.join(traceback.format_exception(error))}"
    )
    reason = f"unexpected {''.join(traceback.format_exception_only(error)).splitlines()[0]}"
    try:
        number, path = tempfile.mkstemp(".txt", "flax-googlenet-crash-", folder)
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(report)
    except OSError:  # no folder, or a full disk
        sys.stderr.write(report)
        return printable(f"{reason}; please report it with the traceback above")
    return printable(f"{reason}; the traceback is in {path}, please report it with that file")
