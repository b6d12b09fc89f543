"""Files that other processes may have made or be writing: bounded reading, locks, and atomic writing."""

import errno
import fcntl
import io
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

_HOUR = 3600  # seconds
_ACL = "system.posix_acl_access"  # the access control list of a file, as Linux names it
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""The errors of file systems without locks: NFS without its lock daemon, some in user space, Lustre without flock."""


def cache_folder() -> Path | None:
    """Return the folder for what this library keeps between runs, or None if the user has no home.

    It is that of the environment variable ``FLAX_GOOGLENET_CACHE``, or ``flax-googlenet`` in the user's cache folder.
    """
    if folder := os.environ.get("FLAX_GOOGLENET_CACHE"):
        return Path(os.path.expanduser(folder)).absolute()  # no shell expands ~ in what Python or Docker sets
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches, "flax-googlenet") if os.path.isabs(caches) else None


def lock(file: IO[Any], warn: Callable[[str], object] = warnings.warn, *, wait: bool = False) -> None:
    """Lock an open file until it is closed or its process ends, even by a kill.

    On a file system without locks, the work goes on unprotected after a warning.

    Args:
        file: The file.
        warn: Takes the warning, which names the file.
        wait: Whether to wait for another process that has locked the file.

    Raises:
        BlockingIOError: If another process has locked the file, and ``wait`` is false.
        OSError: If it cannot be locked for any other reason. The exception has the name of the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, file.name) from error
        warn(f"{file.name} is on a file system without locks: start no second run that writes there")


def read_regular_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a file that anybody may have made or replaced.

    Raises:
        OSError: If there is no such file, or if it has more than ``max_bytes`` or is a folder, a pipe or a device.
            Nothing is read from it, and a pipe does not make this function wait.
    """
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            reason = f"it has {size:,} bytes, and at most {max_bytes:,} are read"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        return file.read(size)


def open_regular_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading, without waiting for the other end of a pipe.

    Raises:
        OSError: If there is no such file, or if it is a folder, a pipe or a device.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return file


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file as ``open_atomically`` does, which also raises the same errors."""
    with open_atomically(path) as file:
        file.write(data)


@contextmanager
def open_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file under a temporary name, and after the block sync and rename it: a kill leaves the old or the new one.

    The new file has the permissions of the old one. Temporary files that killed processes have left beside it are
    removed once they are an hour old.

    Raises:
        OSError: If the file cannot be written. After this or any other exception in the block, the old file is
            untouched, and nothing is left beside it.
    """
    require_replaceable(Path(path))
    target = Path(os.path.realpath(path))  # a link stays a link, and leads to the new contents
    _remove_leftovers(target)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    # Nobody else can read it until it has the permissions of the file that it replaces.
    mode = 0o600 if target.exists() else 0o666
    try:
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            with suppress(OSError):
                lock(file, warn=_ignore)  # so that other processes do not take it for a leftover
            yield file
            file.flush()
            keep_permissions(file.fileno(), target)
            os.fsync(file.fileno())
        replace_synced(beside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise


def require_replaceable(path: Path) -> None:
    """Raise a FileExistsError if the path is a device, pipe or folder, which ``write_atomically`` must not replace."""
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it exists and is not a regular file", str(path))


def keep_permissions(descriptor: int, replaced: Path) -> None:
    """Give an open file the owner, mode and access control list of the file that it replaces, if there is one.

    What this user may not change stays as it is: only root can give a file to another user.
    """
    with suppress(FileNotFoundError):
        status = replaced.stat()
        with suppress(OSError):
            os.fchown(descriptor, status.st_uid, status.st_gid)
        with suppress(OSError):
            os.fchmod(descriptor, status.st_mode & 0o777)
        with suppress(OSError, AttributeError):  # a file without a list raises, too, and macOS has no such function
            os.setxattr(descriptor, _ACL, os.getxattr(replaced, _ACL))


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary files of killed writes to ``target`` that are older than an hour."""
    is_leftover = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp").fullmatch
    with suppress(OSError):  # a folder can be writable without being readable
        for name in filter(is_leftover, os.listdir(target.parent)):
            path = target.with_name(name)
            with suppress(OSError):  # for example because a process that was suspended for long still writes it
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > _HOUR:
                    with open(path, "r+b") as file:
                        lock(file, warn=_ignore)
                        path.unlink()


def _ignore(message: str) -> None:
    """Drop the warning about a file system without locks, where a lock is only a precaution."""


def replace_synced(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, in the same directory, and wait until the new name is on the disk."""
    os.replace(source, target)
    sync(target.parent)  # the rename reaches the disk with its directory


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
