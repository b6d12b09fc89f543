"""Image files: finding the files that a person names, and decoding them ahead of the network."""

import glob
import itertools
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from flax_googlenet.errors import listing
from flax_googlenet.images.preprocessing import INSTALL_HEIF, ImageError, reads_heif

_IMAGE_NAME = re.compile(
    r"\.(apng|avif|bmp|gif|j2k|jfif|jp2|jpe|jpeg|jpg|pbm|pgm|png|pnm|ppm|tga|tif|tiff|webp)\Z", re.IGNORECASE
)
_HEIF_NAME = re.compile(r"\.(heic|heics|heif|heifs|hif)\Z", re.IGNORECASE)
# Pictures that Pillow cannot read: cameras' raw formats, and others in which people keep photographs and drawings.
_OTHER_NAME = re.compile(
    r"\.(3fr|arw|cr2|cr3|crw|dcr|dng|erf|fff|gpr|iiq|kdc|mef|mos|mrw|nef|nrw|orf|pef|raf|raw|rw2|rwl|sr2|srf|srw|x3f"
    r"|dcm|exr|hdr|jxl|jxr|psd|svg|xcf)\Z",
    re.IGNORECASE,
)
# The folders that operating systems and network storage create: macOS, Synology, QNAP, Windows, Linux.
_SYSTEM_FOLDERS = {
    *("__macosx", "@eadir", "#recycle", "#snapshot", "@__thumb", "@recycle", "@recently-snapshot"),
    *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
}

Source = TypeVar("Source")
Fail = Callable[[str], None]
"""Takes the message about something that cannot be read, while the work goes on."""


def find_images(arguments: Sequence[str], fail: Fail, unreadable: Counter[str]) -> Iterator[str]:
    """Yield the paths of the images that the arguments name, while the folders are still being read.

    Args:
        arguments: Files, folders, and globs of files, ``**`` included. A folder stands for all images in it and in the
            folders below it, sorted. Hidden files and folders and links to folders are left out.
        fail: Takes the message about an argument that names no image.
        unreadable: Counts the pictures in these folders whose formats cannot be read, as ``describe_unreadable`` takes
            them.
    """
    for argument in arguments:
        pictures = Counter[str]()
        if os.path.isdir(argument):
            found, nothing = _walk(argument, fail, pictures), "there is no image in this folder"
        elif os.path.lexists(argument):
            found, nothing = iter([argument]), ""
        elif glob.has_magic(argument):
            matches = sorted(glob.iglob(argument, recursive=True))
            found, nothing = (path for path in matches if not os.path.isdir(path)), "no file matches"
        else:
            found, nothing = iter([]), "no such file"
        first = next(found, None)
        if first is None:
            fail(f"{argument}: {nothing}" + (f", but {describe_unreadable(pictures)}" if pictures else ""))
        else:
            yield first
            yield from found
            unreadable.update(pictures)


def is_image(name: str) -> bool:
    """Return whether a file with this name counts as an image in a folder."""
    return bool(_IMAGE_NAME.search(name)) or (bool(_HEIF_NAME.search(name)) and reads_heif())


def is_picture(name: str) -> bool:
    """Return whether a file with this name is a picture, even if its format cannot be read."""
    return any(pattern.search(name) for pattern in (_IMAGE_NAME, _HEIF_NAME, _OTHER_NAME))


def is_hidden(name: str) -> bool:
    """Return whether a file or folder with this name is left out: it starts with a dot, or a system created it."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def describe_unreadable(pictures: Counter[str]) -> str:
    """Return the message about pictures in formats that cannot be read, with the way out.

    Args:
        pictures: How many such pictures there are, by glob: ``{"photos/*.HEIC": 20}``.
    """
    counted = f"{pictures.total()} pictures are in formats" if pictures.total() > 1 else "1 picture is in a format"
    in_heif = [bool(_HEIF_NAME.search(name)) for name in pictures]
    way_out = "convert to JPEG or PNG first"
    if any(in_heif):
        way_out = INSTALL_HEIF if all(in_heif) else f"{INSTALL_HEIF} for HEIC, and convert the others to JPEG or PNG"
    return f"{counted} that cannot be read here ({listing(pictures)}): {way_out}"


def _walk(folder: str, fail: Fail, unreadable: Counter[str]) -> Iterator[str]:
    stack = [(folder, True)]  # (path, whether it is a folder), the next one last
    while stack:
        path, is_folder = stack.pop()
        if not is_folder:
            yield path
            continue
        try:
            with os.scandir(path) as entries:
                below = [
                    (entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries if not is_hidden(entry.name)
                ]
        except OSError as error:
            fail(f"{path}: {error.strerror}")
            continue
        stack += sorted((item for item in below if item[1] or is_image(item[0])), reverse=True)
        others = (name for name, is_folder in below if not is_folder and not is_image(name) and is_picture(name))
        unreadable.update(os.path.join(path, "*" + os.path.splitext(name)[1]) for name in others)


def read_ahead(
    sources: Iterator[Source], read: Callable[[Source], np.ndarray], ahead: int, fail: Fail
) -> Iterator[tuple[Source, np.ndarray]]:
    """Yield each source with the pixels that ``read`` returns for it, in order.

    Threads read up to ``ahead`` images before they are needed, while the network computes.

    Args:
        sources: Paths, or whatever ``read`` takes.
        read: Returns the pixels of an image. If it raises an ImageError, that image is left out.
        ahead: Number of images to read ahead.
        fail: Takes the message of such an ImageError.
    """
    pending: deque[tuple[Source, Future[np.ndarray]]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        while True:
            pending.extend(
                (source, pool.submit(read, source)) for source in itertools.islice(sources, ahead - len(pending))
            )
            if not pending:
                return
            source, future = pending.popleft()
            try:
                yield source, future.result()
            except ImageError as error:
                fail(str(error))
    finally:
        pool.shutdown(cancel_futures=True)


def display_name(path: str) -> str:
    r"""Return a path as text, such that different paths have different texts.

    Bytes that are not UTF-8 are written as ``\xff``. A backslash in a path that could be taken for the start of such an
    escape, or of one that ``printable`` writes, becomes ``\x5c``.
    """
    name = re.sub(rb"\\(?=x[0-9a-f]{2}|u[0-9a-f]{4})", rb"\\x5c", os.fsencode(path))
    return name.decode(errors="backslashreplace")
