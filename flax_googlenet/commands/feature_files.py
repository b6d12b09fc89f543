"""The output file of ``flax-googlenet features``, which survives kills, and which the next run continues.

A ``.npz`` file has the arrays ``features``, float32 [N, C] or, with all positions, [N, H, W, C], ``images``, the N
names, ``weights``, the first digits of the sha256 of the file of weights, and ``stage``. A ``.parquet`` file has the
columns ``image`` and ``features``, a list of fixed size in the order of [H, W, C]. ``weights``, ``stage`` and ``shape``
are in the metadata of its schema. Features of different weights, stages or shapes are never mixed.

While a run lasts, its features wait in ``FILE.part``: first a line of JSON that says what they are, and then for each
batch a line with the names of its images, and its features in binary. A batch that a kill has cut off is computed
again with the same images, so that all features have the bits of a run without a kill. Files are read and written row
by row, so that only the names of the images are all in memory.
"""

import errno
import functools
import itertools
import json
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from flax_googlenet.commands.streaming import (
    DamagedFileError,
    Growing,
    OtherContentsError,
    open_growing,
    open_parquet,
    whole_lines,
)
from flax_googlenet.errors import printable
from flax_googlenet.files import open_atomically

SUFFIXES = (".npz", ".parquet")

_DTYPE = np.dtype("<f4")
_ROW_GROUP = 2**21  # number of values in a row group of a Parquet file: 8 MB

Rows = Iterator[tuple[str, np.ndarray]]
"""The name of each image with its features."""


class Source(NamedTuple):
    """What makes the features of a file different from those of another file."""

    weights: str
    """First digits of the sha256 of the file of weights."""
    stage: str
    """Name of the stage."""
    shape: tuple[int, ...]
    """Shape of the features of one image."""

    def require_same(self, other: "Source") -> None:
        """Raise an OtherContentsError if features from the other source must not be mixed with ours."""
        if other.weights != self.weights:
            raise OtherContentsError("it was made with other weights")
        if other.stage != self.stage:
            raise OtherContentsError(f"it was made with --stage {printable(other.stage)}")
        if other.shape != self.shape:
            raise OtherContentsError(f"it was made {'with' if len(other.shape) > 1 else 'without'} --positions")


class FeatureFile(Growing):
    """The features of an output file, which is open and grows."""

    def __init__(self, file: BinaryIO, *, source: Source, is_npz: bool) -> None:
        super().__init__(file)
        self._source = source
        self._header = f"{json.dumps(source._asdict())}\n".encode()
        self._read_packed, self._write_packed = (_read_npz, _write_npz) if is_npz else (_read_parquet, _write_parquet)

    def append(self, images: list[str], features: np.ndarray) -> None:
        """Write the features [N, ...] of a batch of images, and sync them to the disk.

        Raises:
            CommandError: If they cannot be written. The message names the file.
        """
        header = b"" if os.fstat(self._file.fileno()).st_size else self._header
        self._write(header + f"{json.dumps(images)}\n".encode() + features.astype(_DTYPE, copy=False).tobytes())

    def recover(self) -> None:
        """Count the images of complete batches as done, and remove what a kill has left after the last of them."""
        self._file.seek(0)
        begun = self._file.read(len(self._header))
        if not self._header.startswith(begun):
            self._file.seek(0)
            source = json.loads(next(whole_lines(self._file), b""))
            self._source.require_same(Source(source["weights"], source["stage"], tuple(source["shape"])))
            raise ValueError("it was written by something else")
        end = 0
        if begun == self._header:
            for images, _ in self._batches():
                self._done.update(map(printable, images))
                end = self._file.tell()
        self._file.truncate(end)

    def admit_packed(self, path: Path) -> None:
        """Count the images of the packed file as done."""
        source, images, _ = self._read_packed(path)
        self._source.require_same(source)
        self._done.update(map(printable, images))

    def pack(self, path: Path) -> None:
        """Write the packed file anew, with those features of the growing one that it does not have yet."""
        packed: Rows = iter(())
        images: list[str] = []
        if path.exists():
            _, images, packed = self._read_packed(path)
        known = set(images)
        count = sum(image not in known for batch, _ in self._batches() for image in batch)
        if count == 0 and path.exists():
            return
        new = ((image, row) for image, row in self._rows() if image not in known)
        with open_atomically(path) as file:
            self._write_packed(file, self._source, len(images) + count, itertools.chain(packed, new))

    def _rows(self) -> Rows:
        for images, size in self._batches():
            self._file.seek(-size, os.SEEK_CUR)
            features = np.frombuffer(self._file.read(size), _DTYPE)
            yield from zip(images, features.reshape(-1, *self._source.shape), strict=True)

    def _batches(self) -> Iterator[tuple[list[str], int]]:
        """Yield the images of each complete batch of the growing file, and the number of bytes of its features.

        The position of the file is then the end of the batch.
        """
        bytes_per_image = math.prod(self._source.shape) * _DTYPE.itemsize
        self._file.seek(len(self._header))
        for line in whole_lines(self._file):
            images = json.loads(line)
            size = len(images) * bytes_per_image
            if self._file.seek(size, os.SEEK_CUR) > os.fstat(self._file.fileno()).st_size:
                return
            yield images, size


def open_features(
    path: Path, source: Source, warn: Callable[[str], object] = warnings.warn
) -> AbstractContextManager[FeatureFile]:
    """Open or create an output file as ``open_growing`` does, which also raises the same errors.

    Args:
        path: The file, whose name ends in one of ``SUFFIXES``. It must hold nothing but features from this source.
        source: What makes the features.
        warn: Takes the warning that the file system has no locks.
    """
    make = functools.partial(FeatureFile, source=source, is_npz=path.suffix.lower() == ".npz")
    return open_growing(path, make, is_packed=True, warn=warn)


def _read_npz(path: Path) -> tuple[Source, list[str], Rows]:
    """Return the source of the features of a file, the names of its images, and an iterator that reads the rows."""
    with _open_zip(path) as archive:
        weights, stage, images = (
            npy.read_array(archive.open(f"{name}.npy")) for name in ("weights", "stage", "images")
        )
        with archive.open("features.npy") as member:
            count, *shape = _read_npy_header(member)
    if images.shape != (count,):
        raise ValueError(f"it has {count} features for {images.shape} images")
    images = images.tolist()

    def rows() -> Rows:
        with _open_zip(path) as archive, archive.open("features.npy") as member:
            _read_npy_header(member)
            for image in images:
                row = member.read(math.prod(shape) * _DTYPE.itemsize)
                yield image, np.frombuffer(row, _DTYPE).reshape(shape)

    return Source(str(weights), str(stage), tuple(shape)), images, rows()


def _read_npy_header(file: IO[bytes]) -> tuple[int, ...]:
    """Return the shape of the array whose values follow in the file."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError("it is of another version")
    shape, is_fortran, dtype = npy.read_array_header_1_0(file)
    if is_fortran or dtype != _DTYPE:
        raise ValueError("it has values of another kind")
    return shape


def _write_npz(file: BinaryIO, source: Source, count: int, rows: Rows) -> None:
    """Write rows, of which there are ``count``, and what made them."""
    images = []
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": _DTYPE.str, "fortran_order": False, "shape": (count, *source.shape)}
            npy.write_array_header_1_0(member, header)
            for image, row in rows:
                images.append(image)
                member.write(row.tobytes())
        arrays = {"images": np.array(images, np.str_), "weights": source.weights, "stage": source.stage}
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, np.asarray(array))


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file for reading; in the block, damage is a DamagedFileError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the error of seek for a wrong offset
            raise
        raise DamagedFileError("it is damaged") from error


def _read_parquet(path: Path) -> tuple[Source, list[str], Rows]:
    """Return the same as ``_read_npz``. The features are read group by group."""
    with open_parquet(path) as file:
        schema = file.schema_arrow
        weights, stage, shape = ((schema.metadata or {})[key].decode() for key in (b"weights", b"stage", b"shape"))
        source = Source(weights, stage, tuple(json.loads(shape)))
        if not schema.equals(_parquet_schema(source)):
            raise ValueError("it has other columns")
        images = file.read(["image"])["image"].to_pylist()

    def rows() -> Rows:
        with open_parquet(path) as file:
            for number in range(file.num_row_groups):  # iter_batches would keep many groups in memory
                group = file.read_row_group(number)
                features = group["features"].combine_chunks().flatten().to_numpy()
                yield from zip(group["image"].to_pylist(), features.reshape(-1, *source.shape), strict=True)

    return source, images, rows()


def _write_parquet(file: BinaryIO, source: Source, count: int, rows: Rows) -> None:
    """Do the same as ``_write_npz``. The rows are written in groups, which are all that is in memory."""
    import pyarrow
    from pyarrow import parquet

    schema, size = _parquet_schema(source), math.prod(source.shape)
    with parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for group in iter(lambda: list(itertools.islice(rows, max(1, _ROW_GROUP // size))), []):
            values = pyarrow.array(np.concatenate([row.ravel() for _, row in group]))
            features = pyarrow.FixedSizeListArray.from_arrays(values, size)
            writer.write_table(pyarrow.table([[image for image, _ in group], features], schema))


def _parquet_schema(source: Source) -> Any:
    import pyarrow

    features = pyarrow.list_(pyarrow.float32(), math.prod(source.shape))
    metadata = {"weights": source.weights, "stage": source.stage, "shape": json.dumps(source.shape)}
    return pyarrow.schema({"image": pyarrow.string(), "features": features}, metadata)
