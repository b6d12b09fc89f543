"""Files that anybody may have made or may be writing: bounded reading, locks, and writing that a kill cannot halve."""

import errno
import fcntl
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_HOUR = 3600  # seconds
_ACL = "system.posix_acl_access"  # Linux's name of a file's access control list
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


def read_regular_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Reads a file that anybody may have made or replaced.

    Raises:
        OSError: if there is no such file, or if it has more than ``max_bytes`` or is a folder, a pipe or a device.
            A pipe is not waited for, and nothing is read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        if status.st_size > max_bytes:
            reason = f"it has {status.st_size:,} bytes, and at most {max_bytes:,} are read"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        return file.read(status.st_size)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file beside its place, syncs it and renames it: afterwards the old file is there or the new one, whole.

    The new file has the permissions of the old one. Temporary files that killed processes have left beside it are
    removed once they are an hour old.

    Raises:
        OSError: if it cannot be written; the old file is untouched then, and nothing is left beside it.
    """
    require_replaceable(Path(path))
    target = Path(os.path.realpath(path))  # a link stays a link, to the new contents
    _remove_leftovers(target)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    # Until it has the permissions of the file that it replaces, nobody else reads it.
    mode = 0o600 if target.exists() else 0o666
    try:
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            with suppress(OSError):
                lock(file, warn=_say_nothing)  # by which others see that this is no leftover
            file.write(data)
            file.flush()
            keep_permissions(file.fileno(), target)
            os.fsync(file.fileno())
        replace_synced(beside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise


def require_replaceable(path: Path) -> None:
    """Raises a FileExistsError if a device, pipe or folder is there, which ``write_atomically`` must not replace."""
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is there already and not a regular file", str(path))


def keep_permissions(descriptor: int, replaced: Path) -> None:
    """Gives an open file the owner, mode and access control list of the one that it replaces, if there is one.

    What may not be changed stays as it is: only root can give a file to another user.
    """
    with suppress(FileNotFoundError):
        status = replaced.stat()
        with suppress(OSError):
            os.fchown(descriptor, status.st_uid, status.st_gid)
        with suppress(OSError):
            os.fchmod(descriptor, status.st_mode & 0o777)
        with suppress(OSError, AttributeError):  # a file without a list raises as well, and macOS has no such function
            os.setxattr(descriptor, _ACL, os.getxattr(replaced, _ACL))


def _remove_leftovers(target: Path) -> None:
    """Removes the temporary files of killed writes to ``target`` that are older than an hour."""
    is_leftover = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp").fullmatch
    with suppress(OSError):  # a folder that can be written need not be readable
        for name in filter(is_leftover, os.listdir(target.parent)):
            path = target.with_name(name)
            with suppress(OSError):  # among others: a process is still writing it, however long it was suspended
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > _HOUR:
                    with open(path, "r+b") as file:
                        lock(file, warn=_say_nothing)
                        path.unlink()


def _say_nothing(message: str) -> None:
    """Drops the warning about a file system without locks, where a lock is only a precaution."""


def replace_synced(source: Path, target: Path) -> None:
    """Renames ``source`` to ``target``, in the same directory, and waits until the disk has it."""
    os.replace(source, target)
    directory = os.open(target.parent, os.O_RDONLY)  # the rename itself reaches the disk with its directory
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
