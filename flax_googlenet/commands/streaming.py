"""Images that stream through a network into an output file, which survives kills, and which the next run continues.

The file is written and synced batch by batch. A kill can cut off what was written last; the next run removes what is
left of it. Files that cannot grow, such as those of Parquet, are packed when the run ends. Until then their contents
wait in ``FILE.part``.
"""

import functools
import itertools
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from flax_googlenet.commands.status import CommandError, Status
from flax_googlenet.commands.terminal import Messages, writing
from flax_googlenet.errors import install_advice, printable
from flax_googlenet.files import lock, require_replaceable

if TYPE_CHECKING:
    import numpy as np

_MAX_LINE_BYTES = 2**26  # a row of all 21,841 classes of ImageNet has a few million

R = TypeVar("R")


class ImageStream:
    """The images that a command line names: found and decoded while a network computes others."""

    def __init__(self, arguments: Sequence[str], messages: Messages) -> None:
        from flax_googlenet.images.files import find_images

        self._messages, self._unreadable = messages, Counter[str]()
        self._done, self._seconds = 0, 0.0
        found = find_images(arguments, messages.fail, self._unreadable)
        first = list(itertools.islice(found, 1))
        self.is_empty = not first
        """Whether no image was found, which is then a message on standard error."""
        self._paths = itertools.chain(first, found)

    def compute(
        self,
        send: Callable[["np.ndarray"], R],
        take: Callable[[list[str], R], None],
        *,
        image_size: int,
        batch_size: int,
        claim: Callable[[str], bool] | None = None,
        hidden: bool = False,
    ) -> None:
        """Compute the images batch by batch, and show how many are done.

        Args:
            send: Starts to compute the pixels of a batch, float32 [N, H, W, 3], as a ``Predictor`` does.
            take: Takes the names of the images of a batch, and what ``send`` returned for it.
            image_size: Height and width of an image.
            batch_size: Number of images in a batch.
            claim: Returns whether to compute an image, from its name. By default all are computed.
            hidden: Whether to show nothing.
        """
        import numpy as np
        from rich.progress import SpinnerColumn, TextColumn

        from flax_googlenet.images.files import display_name, read_ahead
        from flax_googlenet.images.preprocessing import preprocess
        from flax_googlenet.inference.predictor import sent_ahead

        start = time.perf_counter()
        columns = SpinnerColumn(), TextColumn("{task.completed} images, {task.fields[rate]:.1f} images/s")
        with self._messages.progress(*columns, hidden=hidden) as progress:
            task = progress.add_task("", total=None, rate=0.0)
            paths = (path for path in self._paths if claim is None or claim(display_name(path)))
            read = functools.partial(preprocess, size=image_size)
            pixels_by_path = read_ahead(paths, read, 2 * batch_size, self._messages.fail)
            batches = iter(lambda: list(itertools.islice(pixels_by_path, batch_size)), [])

            def send_batch(batch: list[tuple[str, np.ndarray]]) -> R:
                return send(np.stack([pixels for _, pixels in batch]))

            for batch, result in sent_ahead(send_batch, batches):
                take([display_name(path) for path, _ in batch], result)
                self._done += len(batch)
                progress.update(task, completed=self._done, rate=self._done / (time.perf_counter() - start))
        self._seconds = time.perf_counter() - start

    def conclude(self, skipped: int = 0) -> Status:
        """Print how many images are done and how many were ``skipped``, and return the status of the command."""
        from flax_googlenet.images.files import describe_unreadable

        if self._unreadable:
            self._messages.fail(describe_unreadable(self._unreadable), self._unreadable.total())
        return self._messages.conclude(self._done, self._seconds, skipped)


class OtherContentsError(Exception):
    """An existing file holds what must not be mixed with the results of this run; the message says why."""


class DamagedFileError(ValueError):
    """An existing file is damaged."""


class Growing(ABC):
    """An output file, which is open and grows, and the images that it has."""

    def __init__(self, file: BinaryIO) -> None:
        self.skipped = 0
        """The number of images that ``claim`` refused."""
        self._done: set[str] = set()
        self._file = file

    def claim(self, image: str) -> bool:
        """Return whether an image is still to be computed, because the file does not have it and no call named it."""
        name = printable(image)  # as a .csv file writes it
        is_new = name not in self._done
        self._done.add(name)
        self.skipped += not is_new
        return is_new

    @abstractmethod
    def recover(self) -> None:
        """Count the images of the growing file as done, and remove what a kill has left at its end.

        Raises:
            OtherContentsError, ValueError, KeyError, TypeError, RecursionError: If the file holds anything else.
        """

    @abstractmethod
    def admit_packed(self, path: Path) -> None:
        """Count the images of the packed file as done; raise the same errors as ``recover``, or an OSError."""

    @abstractmethod
    def pack(self, path: Path) -> None:
        """Add the contents of the growing file to the packed one, except those that a killed run has added before.

        Raises:
            OSError: If the file cannot be written.
            DamagedFileError: If it cannot be read.
        """

    def _write(self, data: bytes) -> None:
        """Append to the growing file, and wait until the disk has it.

        Raises:
            CommandError: If it cannot be written. The message names the file.
        """
        with writing(self._file.name):
            while data:  # a disk that is nearly full takes only a part
                data = data[os.write(self._file.fileno(), data) :]
            os.fsync(self._file.fileno())


G = TypeVar("G", bound=Growing)


@contextmanager
def open_growing(
    path: Path,
    make: Callable[[BinaryIO], G],
    *,
    is_packed: bool,
    warn: Callable[[str], object] = warnings.warn,
) -> Iterator[G]:
    """Open or create an output file, and lock it against other runs.

    Args:
        path: The file.
        make: Returns the object for the block, from the open file that grows.
        is_packed: Whether the file is written at the end of the block, from a growing one beside it.
        warn: Takes the warning that the file system has no locks.

    Raises:
        CommandError: If the file holds anything else than what is to be added to it, or another run is writing it.
        OSError: If it cannot be written.
    """
    growing = path.with_name(f"{path.name}.part") if is_packed else path
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        message = f"a .parquet file needs PyArrow: {install_advice('parquet')}; or name a file of another kind"
        raise CommandError(message)
    for file_to_write in (path, growing):
        with writing(file_to_write):
            require_replaceable(file_to_write)
    with writing(growing):
        file = growing.open("a+b")
    with file:
        output, continued = make(file), growing
        try:
            lock(file, warn)
            output.recover()
            if is_packed and path.exists():
                continued = path
                output.admit_packed(path)
        except BlockingIOError as error:
            raise CommandError(f"another run is writing {growing}: wait for it") from error
        except (OtherContentsError, ValueError, KeyError, TypeError, RecursionError) as error:
            if is_packed and growing.stat().st_size == 0:
                growing.unlink()
            # The other exceptions are those of readers that meet a damaged file, or one that another program wrote.
            reason = str(error) if isinstance(error, OtherContentsError) else "it holds something else"
            message = f"{continued} cannot be continued ({reason}): name another --output, or move it away"
            raise CommandError(message) from error
        yield output
        if is_packed:
            try:
                output.pack(path)
            except (OSError, DamagedFileError) as error:
                problem = error.strerror if isinstance(error, OSError) else f"{error}, so move it away"
                message = f"cannot write {path}: {problem}; its rows are in {growing} for the next run"
                raise CommandError(message) from error
            growing.unlink()


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield each complete line of a growing file, whose position is then the end of that line."""
    while (line := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
        yield line
    if len(line) == _MAX_LINE_BYTES:
        raise ValueError(f"it has a line of {_MAX_LINE_BYTES} bytes or more")


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file as PyArrow's ``ParquetFile``.

    Raises:
        DamagedFileError: In place of the errors of PyArrow in the block.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:  # PyArrow's OSErrors about damage have no number
        if getattr(error, "errno", None):
            raise
        raise DamagedFileError("it is damaged") from error
