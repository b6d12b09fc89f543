"""Images with labels: a folder of class folders, IDX files, or scikit-learn's digits.

A ``Dataset`` is names and labels; pixels are decoded when they are asked for.
"""

import gzip
import hashlib
import math
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from flax_googlenet.images import find_images
from flax_googlenet.preprocessing import rgb

EXPECTED = (
    "expected a folder of train/ and val/, each of them a folder of class folders; or one of class folders, at least "
    "two (cats/1.jpg, dogs/1.jpg, ...); or one of IDX files (train-images-idx3-ubyte.gz and the three that belong to "
    "it); or digits, for scikit-learn's 1,797 images of handwritten digits"
)

_IDX_NAMES = ("{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz")


class DataError(ValueError):
    """Data that cannot be trained on; the message names the folder or file and what was expected."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, in a fixed order."""

    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, "n"]
    """The place of each image's class in ``class_names``."""
    names: tuple[str, ...]
    """Paths below ``folder``, or what to call the images of an array: ``digits[17]``."""
    folder: str = ""
    pixels: UInt8[np.ndarray, "n h w"] | None = None
    """Grey values, 255 is white, where the images are no files."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The path of an image, or what stands for one."""
        return os.path.join(self.folder, self.names[index])

    def read(self, index: int) -> Image.Image:
        """One image in RGB, upright, of its own size; raises ``flax_googlenet.ImageError``."""
        if self.pixels is None:
            return rgb(self.name(index))
        return Image.fromarray(self.pixels[index]).convert("RGB")

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the classes, names, labels, their order, and the pixels of an array.

        They stay where a folder is moved or copied. The files are not read: one changed in place goes unnoticed.
        """
        digest = hashlib.sha256()
        for text in (*self.class_names, *self.names):
            digest.update(os.fsencode(text) + b"\0")
        digest.update(self.labels.astype("<i4").tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.tobytes())
        return digest.hexdigest()[:16]

    def select(self, indices: np.ndarray) -> "Dataset":
        """The images at ``indices``, of the same classes."""
        return replace(
            self,
            labels=self.labels[indices],
            names=tuple(self.names[i] for i in indices),
            pixels=None if self.pixels is None else self.pixels[indices],
        )


def open_data(data: str, *, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """Finds the images to train on, and those to evaluate on.

    Args:
        data: a folder or ``digits``, as ``EXPECTED`` says; ``./digits`` is a folder of that name. Hidden files and
            folders do not count, nor do files that are not named as images.
        held_out: what fraction of each class to evaluate on, where the data does not say so itself. At least one image
            of a class is held out, and at least one is not; the only image of a class is not.
        seed: of the choice of these.

    Raises:
        DataError: if the data is none of these; if a class is empty, or missing in one of train/ and val/ (the message
            lists all such); if an IDX file is missing or damaged; if nothing would be held out.
    """
    layout = _layout(data)
    if layout == "digits":
        return _hold_out(_digits(), data, held_out, seed)
    if layout == "idx":
        return _idx_files(data)
    if layout == "classes":
        return _hold_out(_class_folders(data), data, held_out, seed)
    val, train = _part(data, "val"), _part(data, "train")
    if train.class_names != val.class_names:
        only = {
            "train": sorted(set(train.class_names) - set(val.class_names)),
            "val": sorted(set(val.class_names) - set(train.class_names)),
        }
        listing = "; ".join(f"only in {part}/: {', '.join(names)}" for part, names in only.items() if names)
        raise DataError(f"{data}: train/ and val/ must have the same classes; {listing}")
    return train, val


def find_data(data: str, *, held_out: float, seed: int, trained_on: str | None) -> tuple[Dataset, str]:
    """Finds the images to evaluate weights on, whatever they were trained on, and says which these are.

    It is ``val/`` or the test files where there are such. Of a whole folder, if it is the one of the training, and of
    ``digits`` it is the part that was held out.

    Args:
        data: as for ``open_data``; ``val/`` needs no ``train/`` beside it.
        held_out, seed: as for ``open_data`` in the training.
        trained_on: the fingerprint of the images that the weights were trained on, if it is known.

    Raises:
        DataError: as ``open_data``.
    """
    layout = _layout(data)
    if layout == "parts":
        return _part(data, "val"), f"of {data} it is val/ that is evaluated"
    if layout == "classes":
        whole = _class_folders(data)
        with suppress(DataError):  # nothing could be held out: no run trained on it
            train, held = _hold_out(whole, data, held_out, seed)
            if train.fingerprint == trained_on:
                return (
                    held,
                    f"the weights were trained on {len(train)} of these images: the other {len(held)} are evaluated",
                )
        if trained_on is None:
            return whole, f"all {len(whole)} images of {data} are evaluated"
        return whole, (
            f"warning: all {len(whole)} images of {data} are evaluated: they are not those that the weights were "
            "trained on, or some have come or gone since, and the figures may be of the training"
        )
    held = open_data(data, held_out=held_out, seed=seed)[1]
    return held, f"of {data} it is the {len(held)} images held out that are evaluated"


def _layout(data: str) -> Literal["digits", "idx", "parts", "classes"]:
    """Which of those that ``EXPECTED`` names; the parts are train/ and val/, one of which may be missing."""
    if data == "digits":
        return "digits"
    if not os.path.isdir(data):
        raise DataError(f"{data}: no such folder; {EXPECTED}")
    if any(os.path.exists(os.path.join(data, name.format("train"))) for name in _IDX_NAMES):
        return "idx"
    parts = [os.path.join(data, part) for part in ("train", "val")]
    # A folder train/ of images may be a class of that name.
    return "parts" if any(os.path.isdir(part) and _subfolders(part) for part in parts) else "classes"


def _part(data: str, part: str) -> Dataset:
    folder = os.path.join(data, part)
    if not os.path.isdir(folder):
        raise DataError(f"{data} has class folders in train/ or val/, and no folder {part}/; {EXPECTED}")
    return _class_folders(folder)


def _hold_out(dataset: Dataset, data: str, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """The images to train on, and those to evaluate on; ``data`` is for the messages."""
    if not 0 < fraction < 1:
        raise DataError(f"the fraction to hold out of {data} must be between 0 and 1, not {fraction}")
    rng = np.random.default_rng(seed)
    held = np.zeros(len(dataset), bool)
    for label in range(len(dataset.class_names)):
        members = rng.permutation(np.flatnonzero(dataset.labels == label))
        held[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    if not held.any():
        raise DataError(f"{data}: no class has a second image to hold out for evaluation")
    return dataset.select(np.flatnonzero(~held)), dataset.select(np.flatnonzero(held))


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error


def _class_folders(folder: str) -> Dataset:
    """All images of the class folders in one folder; raises a DataError as ``open_data`` does."""
    class_names = _subfolders(folder)
    problems: list[str] = []
    paths = [list(find_images([os.path.join(folder, name)], problems.append)) for name in class_names]
    if len(class_names) < 2:
        raise DataError(f"{folder} has {len(class_names)} class folders; {EXPECTED}")
    if problems:
        raise DataError("each class needs images that can be read:\n  " + "\n  ".join(problems))
    return Dataset(
        class_names=tuple(class_names),
        labels=np.repeat(np.arange(len(paths), dtype=np.int32), [len(of_one) for of_one in paths]),
        names=tuple(os.path.relpath(path, folder) for of_one in paths for path in of_one),
        folder=folder,
    )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # takes a second, in each worker process too

    digits = load_digits()
    return Dataset(
        class_names=tuple(map(str, range(10))),
        labels=digits.target.astype(np.int32),
        names=tuple(f"digits[{i}]" for i in range(len(digits.target))),
        pixels=np.rint(digits.images * (255 / 16)).astype(np.uint8),
    )


def _idx_files(folder: str) -> tuple[Dataset, Dataset]:
    train, held = _idx_part(folder, "train"), _idx_part(folder, "t10k")
    if held.labels.max() > train.labels.max():
        raise DataError(
            f"{folder}: the labels for training go up to {train.labels.max()}, the others to {held.labels.max()}"
        )
    class_names = tuple(str(label) for label in range(train.labels.max() + 1))
    return replace(train, class_names=class_names), replace(held, class_names=class_names)


def _idx_part(folder: str, part: str) -> Dataset:
    images, labels = (os.path.join(folder, name.format(part)) for name in _IDX_NAMES)
    pixels, targets = _read_idx(images, 3), _read_idx(labels, 1)
    if len(pixels) != len(targets):
        raise DataError(f"{images} has {len(pixels)} images, and {labels} has {len(targets)} labels: they are no pair")
    if pixels.size == 0:
        raise DataError(f"{images} has no pixels: its shape is {list(pixels.shape)}")
    name = os.path.basename(images).removesuffix(".gz")
    names = tuple(f"{name}[{i}]" for i in range(len(targets)))
    return Dataset((), targets.astype(np.int32), names, folder, pixels)


def _read_idx(path: str, ndim: int) -> UInt8[np.ndarray, "..."]:
    """Two zero bytes, 8 for uint8, the number of dimensions, each one's length as big-endian uint32, the values."""
    try:
        with gzip.open(path) as file:
            contents = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is missing or damaged ({error}): all four IDX files are needed") from error
    start = 4 + 4 * ndim
    if contents[:4] != bytes([0, 0, 8, ndim]) or len(contents) < start:
        raise DataError(f"{path} is no IDX file of bytes in {ndim} dimensions: it begins with {contents[:4].hex(' ')}")
    shape = np.frombuffer(contents[4:start], ">u4").tolist()
    if len(contents) - start != math.prod(shape):
        raise DataError(f"{path} should have {math.prod(shape)} values, for {shape}, and has {len(contents) - start}")
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)
