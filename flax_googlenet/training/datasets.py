"""A set of images with labels, and the two sources that keep their pixels in arrays: IDX files and digits."""

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.images.preprocessing import CROP, RESIZE, Reduction, rgb


class DataError(GoogLeNetError, ValueError):
    """Data that cannot be used; the message names the folder or file and says what was expected."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, in a fixed order. An image is decoded when it is read."""

    class_names: tuple[str, ...]
    """Names of the classes."""
    labels: Int32[np.ndarray, "n"]
    """Index of each image's class in ``class_names``."""
    names: tuple[str, ...]
    """Path of each image relative to ``folder``, or a name such as ``digits[17]`` if ``pixels`` has the images."""
    folder: str = ""
    """Folder of the images."""
    pixels: UInt8[np.ndarray, "n h w"] | None = None
    """Grey values of the images, where 255 is white. None if the images are files."""
    notes: tuple[str, ...] = ()
    """Messages for the user about how the images were found."""
    unreadable: int = 0
    """Number of pictures that were left out because their formats cannot be read."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path of an image, or its name if it is not a file."""
        return os.path.join(self.folder, self.names[index])

    def read(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Return an image in RGB and upright, or raise a ``flax_googlenet.ImageError``.

        ``reduction`` chooses the size in which a JPEG file is decoded, as for ``rgb``.
        """
        if self.pixels is None:
            return rgb(self.name(index), reduction)
        return Image.fromarray(self.pixels[index]).convert("RGB")

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the class names, image names, labels, their order, and ``pixels``.

        A folder keeps its fingerprint when it is moved or copied. Files are not read, so one that is changed in place
        goes unnoticed.
        """
        digest = hashlib.sha256()
        for text in (*map(str.encode, self.class_names), *map(os.fsencode, self.names)):
            digest.update(text + b"\0")
        digest.update(self.labels.astype("<i4").tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.tobytes())
        return digest.hexdigest()[:16]

    def select(self, indices: np.ndarray) -> "Dataset":
        """Return the images at ``indices``, with the same classes."""
        return replace(
            self,
            labels=self.labels[indices],
            names=tuple(self.names[i] for i in indices),
            pixels=None if self.pixels is None else self.pixels[indices],
        )


def read_digits() -> Dataset:
    """Return scikit-learn's 1,797 images of handwritten digits, 8 x 8 pixels each."""
    from sklearn.datasets import load_digits  # takes a second, in each worker process too

    digits = load_digits()
    return Dataset(
        class_names=tuple(map(str, range(10))),
        labels=digits.target.astype(np.int32),
        names=tuple(f"digits[{i}]" for i in range(len(digits.target))),
        pixels=np.rint(digits.images * (255 / 16)).astype(np.uint8),
    )


def has_idx_files(folder: str) -> bool:
    """Return whether a folder has the training images or labels of a data set in IDX files, such as MNIST."""
    return any(map(os.path.exists, _idx_paths(folder, "train")))


def read_idx_files(folder: str) -> tuple[Dataset, Dataset]:
    """Return the training images and the test images of a data set in IDX files; their classes are numbers.

    Each image gets a black border: 28 x 28 pixels become 32 x 32. Images of such data sets fill their frame, and the
    centre crop of an evaluation takes 7/8 of the height and width, which is then the complete original.

    Raises:
        DataError: If one of the four files is missing or damaged, or if they do not belong together.
    """
    train, test = (_read_idx_part(folder, part) for part in ("train", "t10k"))
    if len(test.class_names) > len(train.class_names):
        highest, highest_in_training = test.class_names[-1], train.class_names[-1]
        raise DataError(
            f"{folder}: the test labels go up to {highest}, but the training labels only to {highest_in_training}"
        )
    return train, replace(test, class_names=train.class_names)


def _idx_paths(folder: str, part: str) -> tuple[str, str]:
    """Return the paths of the images and of the labels of a part."""
    images, labels = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
    return os.path.join(folder, images), os.path.join(folder, labels)


def _read_idx_part(folder: str, part: str) -> Dataset:
    images_path, labels_path = _idx_paths(folder, part)
    pixels, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1).astype(np.int32)
    if len(pixels) != len(labels):
        raise DataError(
            f"{images_path} has {len(pixels)} images, but {labels_path} has {len(labels)} labels: they do not belong "
            "together"
        )
    if pixels.size == 0:
        raise DataError(f"{images_path} has no pixels: its shape is {list(pixels.shape)}")
    class_names = tuple(map(str, range(labels.max() + 1)))
    names = tuple(f"{part}-images-idx3-ubyte[{i}]" for i in range(len(labels)))
    borders = [round(size * (RESIZE / CROP - 1) / 2) for size in pixels.shape[1:]]
    bordered = np.pad(pixels, [(0, 0), *((border, border) for border in borders)])
    return Dataset(class_names, labels, names, folder, bordered)


def _read_idx(path: str, ndim: int) -> UInt8[np.ndarray, "..."]:
    """Read one IDX file of bytes.

    Its header has two zero bytes, 8 for uint8, the number of dimensions, and the size of each dimension as a big-endian
    uint32; the values follow.
    """
    try:
        with gzip.open(path) as file:
            contents = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is missing or damaged ({error}): all four IDX files are needed") from error
    start = 4 + 4 * ndim
    if contents[:4] != bytes([0, 0, 8, ndim]) or len(contents) < start:
        raise DataError(
            f"{path} is not an IDX file of bytes in {ndim} dimensions: it begins with {contents[:4].hex(' ')}"
        )
    shape = np.frombuffer(contents[4:start], ">u4").tolist()
    if len(contents) - start != math.prod(shape):
        raise DataError(f"{path} has {len(contents) - start} values, but its shape {shape} needs {math.prod(shape)}")
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)
