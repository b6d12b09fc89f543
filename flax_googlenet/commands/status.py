"""How a command ends: its exit status, and the message of an error."""

import os
import re
import sys
from collections.abc import Mapping
from enum import IntEnum

from flax_googlenet.errors import GoogLeNetError, printable, url_without_secrets


class Status(IntEnum):
    """The exit statuses, as the ``--help`` of each subcommand documents them."""

    DONE = 0
    SOME_UNREADABLE = 1
    USAGE = 2
    NOT_DONE = 3
    GAVE_UP = 4  # a training that stopped itself
    CRASHED = 70  # an error that nobody expected: EX_SOFTWARE of sysexits.h
    INTERRUPTED = 130  # 128 and the number of the signal, as shells report it: SIGINT
    CLOSED_PIPE = 141  # SIGPIPE
    TERMINATED = 143  # SIGTERM


class CommandError(GoogLeNetError):
    """A command cannot do its work, for a reason that only the command line knows, such as a missing package."""


class UsageError(CommandError):
    """The command line is wrong."""


class CrashError(CommandError):
    """A command met an error that nobody expected; the message is that of ``describe_crash``."""


STATUSES = {
    "UsageError": Status.USAGE,
    "ExportError": Status.USAGE,
    "TrainingStopped": Status.GAVE_UP,
    "CrashError": Status.CRASHED,
    "BrokenPipeError": Status.CLOSED_PIPE,
    "OSError": Status.NOT_DONE,
    "GoogLeNetError": Status.NOT_DONE,
}
"""The status with which each class of exceptions ends a command; an exception of any other class is a crash.

The classes stand here by their names: to import them would take the time, and the optional packages, of all wings.
"""


def exit_status(error: Exception, statuses: Mapping[str, int] = STATUSES) -> int:
    """Return the status with which an exception ends a command: that of its nearest base class in the table."""
    names = (base.__name__ for base in type(error).__mro__)
    return next((statuses[name] for name in names if name in statuses), Status.CRASHED)


def describe_crash(error: Exception, folder: str | os.PathLike[str] | None = None) -> str:
    """Write the traceback of an unexpected error to a new file, and return the message that names the file.

    Args:
        error: The error that no code has turned into a message of its own.
        folder: The folder of the file. By default that of the system for temporary files.
    """
    import platform  # imported late: every command imports this module before it handles Ctrl-C
    import tempfile
    import traceback
    from importlib.metadata import distributions

    packages = ("flax-googlenet", "jax", "jaxlib", "flax", "numpy")
    versions = ", ".join(f"{found.name} {found.version}" for found in distributions() if found.name in packages)
    arguments = [url_without_secrets(argument) if "://" in argument else argument for argument in sys.argv]
    report = (
        f"{arguments}\nPython {platform.python_version()} on {platform.platform()}, {versions}\n\n"
        f"{_without_secrets(''.join(traceback.format_exception(error)))}"
    )
    reason = _without_secrets(f"unexpected {''.join(traceback.format_exception_only(error)).splitlines()[0]}")
    try:
        number, path = tempfile.mkstemp(".txt", "flax-googlenet-crash-", folder)
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(report)
    except OSError:  # no such folder, or a full disk
        sys.stderr.write(report)
        return printable(f"{reason}; please report it with the traceback above")
    return printable(f"{reason}; the traceback is in {path}, please report it with that file")


def _without_secrets(text: str) -> str:
    """Return the text with ``url_without_secrets`` applied to each URL in it."""
    return re.sub(r"\w[\w+.-]*://[^\s'\"<>]*", lambda url: url_without_secrets(url[0]), text)
