"""Image files: found by what a person names, and decoded ahead of the network."""

import glob
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from flax_googlenet.preprocessing import ImageError

IMAGE_NAME = re.compile(
    r"\.(apng|avif|bmp|gif|j2k|jfif|jp2|jpe|jpeg|jpg|pbm|pgm|png|pnm|ppm|tga|tif|tiff|webp)\Z", re.IGNORECASE
)
"""The names that count as images in a folder."""

Source = TypeVar("Source")
Fail = Callable[[str], None]
"""Takes the message about something that cannot be read; the work goes on."""


def find_images(arguments: Sequence[str], fail: Fail) -> Iterator[str]:
    """The images that the arguments name, one by one: no list of all of them is made.

    Args:
        arguments: files; folders, all of whose images count, sorted, those in folders below them included, but not
            hidden ones, nor folders behind links; globs, ``**`` included, which stand for files.
        fail: takes what is not there.
    """
    for argument in arguments:
        if os.path.isdir(argument):
            found, nothing = _walk(argument, fail), "there is no image in this folder"
        elif os.path.lexists(argument):
            found, nothing = iter([argument]), ""
        elif glob.has_magic(argument):
            matches = sorted(glob.iglob(argument, recursive=True))
            found, nothing = (path for path in matches if not os.path.isdir(path)), "no file matches"
        else:
            found, nothing = iter([]), "no such file"
        first = next(found, None)
        if first is None:
            fail(f"{argument}: {nothing}")
        else:
            yield first
            yield from found


def _walk(folder: str, fail: Fail) -> Iterator[str]:
    stack = [(folder, True)]  # (path, whether it is a folder), the next one last
    while stack:
        path, is_folder = stack.pop()
        if not is_folder:
            yield path
            continue
        try:
            with os.scandir(path) as entries:
                below = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries if entry.name[0] != "."]
        except OSError as error:
            fail(f"{path}: {error.strerror}")
            continue
        stack += sorted((item for item in below if item[1] or IMAGE_NAME.search(item[0])), reverse=True)


def read_ahead(
    sources: Iterator[Source], read: Callable[[Source], np.ndarray], ahead: int, fail: Fail
) -> Iterator[tuple[Source, np.ndarray]]:
    """Each source and what ``read`` makes of it, in order.

    Threads read up to ``ahead`` images before they are asked for, while the network computes.

    Args:
        sources: paths, or whatever ``read`` takes.
        read: an image's pixels; where it raises an ImageError, the message goes to ``fail``, and the work goes on.
        ahead: images.
        fail: takes messages.
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
    r"""The path as text: bytes that are no UTF-8 are written as \xff."""
    return os.fsencode(path).decode(errors="backslashreplace")
