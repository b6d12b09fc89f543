"""Locks files, so that one process at a time writes to each."""

import errno
import fcntl
import warnings
from collections.abc import Callable
from typing import IO, Any

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""The errors of file systems without locks: NFS without its lock daemon, some in user space, Lustre without flock."""


def lock(file: IO[Any], warn: Callable[[str], object] = warnings.warn) -> None:
    """Locks an open file until it is closed or its process ends, even by a kill.

    On a file system without locks a warning says so, and the work goes on without this protection.

    Args:
        file: the file; its name is in the messages.
        warn: takes the warning.

    Raises:
        BlockingIOError: if another process has locked the file.
        OSError: if it cannot be locked for any other reason; it has the name of the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, file.name) from error
        warn(f"{file.name} is on a file system without locks: start no second run that writes there")
