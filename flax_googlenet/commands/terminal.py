"""What a command prints: answers on standard output, and messages and progress on standard error."""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_googlenet.commands.status import CommandError, Status, UsageError
from flax_googlenet.errors import listing, printable
from flax_googlenet.files import require_replaceable

if TYPE_CHECKING:  # rich takes time to import
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def prepare_process() -> None:
    """Prepare the process of a command for whatever has started it.

    Standard output escapes the characters that its encoding lacks, as standard error does by itself. If standard output
    is closed, what is written to it is dropped; otherwise the next file to be opened would take its place. A notebook
    sets matplotlib's backend to its own, also for commands after ``!``, and without that module matplotlib cannot be
    imported. The commands only write files, for which the backend ``agg`` is always available.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):  # that of a notebook takes every character
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"


def write_output(text: str) -> None:
    """Write text to standard output at once.

    Raises:
        BrokenPipeError: If nobody reads it any more.
        CommandError: If it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # Python flushes it once more at its end, and would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError(f"cannot write standard output: {error.strerror}") from error


def require_folder_of(output: Path) -> None:
    """Raise a CommandError if the folder of an output does not exist, before the work rather than after it."""
    if not output.parent.is_dir():
        raise CommandError(f"cannot write {output}: there is no folder {output.parent}")


def require_picture(output: Path) -> None:
    """Raise an error if a picture's name does not end in .png, or if it cannot be written because of what is there."""
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: the name of the picture must end in .png")
    require_folder_of(output)
    with writing(output):
        require_replaceable(output)


@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Turn an OSError in the block into a CommandError that names the output."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error


def make_console(**options: Any) -> "Console":
    """Return rich's ``Console`` with these options, which falls silent if nobody reads its file any more."""
    from rich.console import Console

    class PatientConsole(Console):
        def on_broken_pipe(self) -> None:
            """Go on in silence: rich itself would end the process with status 1 in the middle of the work."""
            self.quiet = True
            with suppress(OSError):  # Python flushes the file once more at its end, and would complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    # No emoji: rich would draw one in place of a word between colons, which a file name can have.
    return PatientConsole(highlight=False, emoji=False, **options)


def draws_progress(console: "Console") -> bool:
    """Return whether a console can show a bar or a spinner, whose frames overwrite each other.

    A pipe cannot, although rich takes it for a terminal if FORCE_COLOR or TTY_COMPATIBLE is set. A notebook runs ``!``
    commands on a terminal of their own and shows every frame in its cell; Jupyter sets JPY_PARENT_PID there. The
    spinner also needs Unicode.
    """
    is_notebook = "JPY_PARENT_PID" in os.environ
    return console.file.isatty() and console.is_interactive and console.encoding.startswith("utf") and not is_notebook


class Messages:
    """The messages of a command on standard error, with the number of images that it could not read."""

    def __init__(self) -> None:
        self.console = make_console(stderr=True, soft_wrap=True)
        self.failed = 0

    def note(self, message: str) -> None:
        """Print a message with its control characters escaped, so that it stays on one line."""
        self._print("", message)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self._print("[bold yellow]warning:[/] ", message)

    def warn_of_undrawable_names(self, picture: Path, class_names: Sequence[str]) -> None:
        """Warn that a picture shows numbers in place of class names, if there are any that no font can draw."""
        if class_names:
            self.warn(
                f"{picture} shows numbers for {len(class_names)} class names, which no installed font can draw "
                f"({listing(map(repr, class_names))}): install a font that can, such as Noto Sans CJK"
            )

    def fail(self, message: str, failed: int = 1) -> None:
        """Print an error, and count the images that it is about."""
        self.failed += failed
        self._print("[bold red]error:[/] ", message)

    def _print(self, prefix: str, message: str) -> None:
        from rich.text import Text

        self.console.print(Text.from_markup(prefix).append(printable(message)))

    def spinner(self, text: str) -> AbstractContextManager[object]:
        """Return a spinner with a text for the time of a block; it is not drawn where it cannot be shown."""
        return self.console.status(text) if draws_progress(self.console) else nullcontext()

    def progress(self, *columns: "ProgressColumn", hidden: bool = False) -> "Progress":
        """Return a line of progress, which disappears at its end; it is not drawn where it cannot be shown."""
        from rich.progress import Progress

        return Progress(
            *columns,
            console=self.console,
            transient=True,
            disable=hidden or not draws_progress(self.console),
            redirect_stdout=False,  # it would send the answers to standard error, too
            redirect_stderr=False,
        )

    def download_progress(self) -> "Progress":
        """Return a line of progress with the columns of a download: its name, a bar, the bytes and the time left."""
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

        return self.progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())

    def conclude(self, done: int, seconds: float, skipped: int = 0) -> Status:
        """Print how many images are done, how fast, and how many could not be read; return the status of the command.

        Args:
            done: The number of images.
            seconds: The time that they took.
            skipped: The number of images that an earlier command has done.
        """
        summary = f"{done} image{'' if done == 1 else 's'} in {seconds:.1f} s, {done / seconds:.1f} images/s"
        if skipped:
            summary += f"; {skipped} {'was' if skipped == 1 else 'were'} done before"
        if self.failed:
            summary += f"; [bold red]{self.failed} could not be read[/]"
        self.console.print(summary)
        return Status.SOME_UNREADABLE if self.failed else Status.DONE
