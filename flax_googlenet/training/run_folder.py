"""One run at a time in a run's folder."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flax_googlenet.errors import GoogLeNetError, printable
from flax_googlenet.files import lock


class WorkdirInUseError(GoogLeNetError, RuntimeError):
    """Another run has claimed the folder; the message names its process."""


@contextmanager
def claim(workdir: str | os.PathLike[str], warn: Callable[[str], object] = warnings.warn) -> Iterator[None]:
    """Holds ``workdir``, which is made if it is not there, for this run alone until the block ends.

    The claim is the kernel's lock on ``workdir/.lock``, not the file itself: it ends with the process, killed or not.

    Args:
        workdir: the folder of the run.
        warn: takes the warning that its file system has no locks, and the claim keeps nobody out.

    Raises:
        WorkdirInUseError: if another run has it.
        OSError: if the folder cannot be made.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:  # not "w": the holder's line is read below
        try:
            lock(file, warn)
        except BlockingIOError:
            file.seek(0)
            holder = printable(file.read().strip()) or "another process"
            raise WorkdirInUseError(
                f"{folder} is in use by {holder}: wait for it to end, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
        file.truncate(0)
