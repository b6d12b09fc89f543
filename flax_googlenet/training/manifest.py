"""A folder's list of checksums, by which a change to any of its files shows, in as little as one bit.

The list is what the command ``sha256sum`` prints; ``sha256sum --check manifest.sha256`` in the folder checks it.
"""

import hashlib
import os
from pathlib import Path

from flax_googlenet.files import read_regular_file

_NAME = "manifest.sha256"
_MAX_BYTES = 2**30


def seal(folder: Path) -> None:
    """Writes the list of all files in the folder and below, and waits until the disk has them and the list."""
    (folder / _NAME).write_bytes(_listing(folder))
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def damage(folder: Path) -> str | None:
    """Which files are not as they were when the folder was sealed: changed, missing, added or unreadable; or None."""
    try:
        stored, computed = read_regular_file(folder / _NAME, _MAX_BYTES), _listing(folder)
    except OSError as error:
        return str(error)
    if stored == computed:
        return None
    lines = set(stored.splitlines()) ^ set(computed.splitlines())
    names = sorted({line[66:].decode(errors="replace") for line in lines})
    return f"not as {_NAME} has it: {', '.join(names)}"


def _listing(folder: Path) -> bytes:
    """A line of sha256, two spaces and name for each file but the list itself, ordered by name."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / _NAME:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return os.fsencode("".join(lines))  # a name may be of any bytes
