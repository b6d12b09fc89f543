"""How a command ends, with an exit status and one message for the person, and what it may print."""

import io
import os
import re
import sys
from contextlib import suppress
from enum import IntEnum
from typing import TYPE_CHECKING

from flax_googlenet.errors import printable, url_without_secrets

if TYPE_CHECKING:
    from rich.console import Console  # takes time to import


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


def prepare_process() -> None:
    """Prepares the process of a command for whatever has started it.

    Standard output escapes the characters that its encoding lacks, as standard error does by itself. If it is closed,
    what is written to it is dropped; without this, the next file to be opened would take its place. A notebook sets
    matplotlib's backend to its own, also for commands after ``!``, and without that module matplotlib cannot be
    imported. The commands only write files, for which the backend ``agg`` is always there.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's takes every character
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"


def write_output(text: str) -> None:
    """Writes to standard output at once.

    Raises:
        BrokenPipeError: if nobody reads it any more.
        CommandError: NOT_DONE if it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # Python flushes it once more at its end, and would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError(Status.NOT_DONE, f"cannot write standard output: {error.strerror}") from error


def message_console() -> "Console":
    """Return a console on standard error that falls silent if nobody reads it any more."""
    from rich.console import Console

    class MessageConsole(Console):
        def on_broken_pipe(self) -> None:
            """Go on in silence: rich itself would end the process with status 1 in the middle of the work."""
            self.quiet = True
            with suppress(OSError):  # Python flushes standard error once more at its end, and would complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    # No emoji: rich would draw one in place of a word between colons, as a file name may have it.
    return MessageConsole(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def draws_progress(console: "Console") -> bool:
    """Returns whether a console can show a bar or a spinner, whose frames overwrite each other.

    A pipe cannot, although rich takes it for a terminal if FORCE_COLOR or TTY_COMPATIBLE is set. A notebook runs ``!``
    commands on a terminal of their own and shows every frame in its cell; Jupyter sets JPY_PARENT_PID there. The
    spinner also needs Unicode.
    """
    is_notebook = "JPY_PARENT_PID" in os.environ
    return console.file.isatty() and console.is_interactive and console.encoding.startswith("utf") and not is_notebook


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
    except OSError:  # no folder, or a full disk
        sys.stderr.write(report)
        return printable(f"{reason}; please report it with the traceback above")
    return printable(f"{reason}; the traceback is in {path}, please report it with that file")


def _without_secrets(text: str) -> str:
    """Return the text with ``url_without_secrets`` applied to each URL in it."""
    return re.sub(r"\w[\w+.-]*://[^\s'\"<>]*", lambda url: url_without_secrets(url[0]), text)
