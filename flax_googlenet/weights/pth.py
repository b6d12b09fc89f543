"""Reads state dicts from PyTorch's files without PyTorch: a file is refused, or gives exactly the tensors it stores.

``torch.save`` writes a zip: the pickle ``data.pkl`` refers to storages, which are uncompressed entries. Before PyTorch
1.6 it wrote five pickles and then the storages; such a file has no checksum, so only a hash of the file shows a damaged
weight. A ``.safetensors`` is a JSON header and the tensors.

Files are untrusted. Nothing in them is run (see ``pickles``), and nothing costs more than their bytes: the pickle is
read first, and of the rest only the tensors of the network are kept, while the file is read once from start to end.
"""

import hashlib
import io
import json
import math
import os
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_googlenet.errors import listing, printable
from flax_googlenet.files import open_regular_file
from flax_googlenet.weights.other_formats import folder_advice, refuse_other_files, refuse_other_zips
from flax_googlenet.weights.pickles import (
    MAX_AXES,
    MAX_NAME,
    MAX_PICKLE_BYTES,
    STORAGE_DTYPES,
    Interpreter,
    Placeholder,
    StateDictError,
    Storage,
    Tensor,
    UnusualTensor,
)
from flax_googlenet.weights.state_dicts import find_state_dict
from flax_googlenet.weights.torchvision import PortingError

MAX_BYTES = 2**30  # a training checkpoint in float64 with averaged weights and momentum has 420 MB
_MAX_DIRECTORY_BYTES = 2**22  # of a zip; that of a training checkpoint has 200 kB
_CHUNK = 2**20  # bytes that are read, hashed and checked at once: they stay in a processor's cache

# torch.save's magic number, pickled with one of the protocols 2 to 5; from 4 on, a frame is around it.
_LEGACY = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
_HUGE_PICKLE = f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes, too many for a list of tensors"

_SAFETENSORS_DTYPES = {
    "F64": "Double",
    "F32": "Float",
    "F16": "Half",
    "BF16": "BFloat16",
    "I64": "Long",
    "I32": "Int",
    "I16": "Short",
    "I8": "Char",
    "U8": "Byte",
    "BOOL": "Bool",
}
"""Dtypes in a ``.safetensors`` -> PyTorch's names of their storages."""


class Checkpoint(NamedTuple):
    """A state dict and the file that it comes from."""

    state_dict: dict[str, np.ndarray]
    """torchvision's names, without prefixes -> arrays; bfloat16 is ``ml_dtypes.bfloat16``."""
    sha256: str
    """SHA-256 digest of the file, in hexadecimal digits."""
    notes: list[str]
    """Notes on how the state dict was found and on what was left out, one line each."""


class _Place(NamedTuple):
    """A part of a file."""

    start: int
    size: int
    crc: int | None = None


class _Contents(NamedTuple):
    """The structure of a file, without the values of its tensors."""

    content: Any
    """What the file holds, with ``Tensor`` and ``Placeholder`` objects."""
    places: dict[str, _Place]
    """Places of the storages, by their keys, and of all else that has a checksum."""
    unknown: list[str]
    """Names of classes that do not belong to training checkpoints."""
    is_swapped: bool = False
    """Whether the values have the other byte order than this machine."""


def read_state_dict(path: str | os.PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
    """Read the state dict of a GoogLeNet from a file of PyTorch's, without PyTorch.

    The file is a ``.pth``, ``.pt``, ``.ckpt`` or ``.bin`` from ``torch.save``, in its present or its older format, or a
    ``.safetensors`` with PyTorch's names. It can be a training checkpoint that contains the state dict; a prefix of all
    names, such as ``module.``, is removed. Nothing in the file is run. What was left out, and which other networks the
    file has, is said in a ``UserWarning``.

    Args:
        path: File to read. Its contents tell its format, not its name.
        key: Which of several networks in the file to take: the keys that lead to it, joined by dots, such as
            ``"model_ema"``. None takes the first network that is not a moving average of another one.

    Returns:
        torchvision's names -> arrays in the dtypes of the file, for ``from_torchvision``. bfloat16 is
        ``ml_dtypes.bfloat16``.

    Raises:
        StateDictError: If the file is damaged, is of another kind, or does not hold a state dict of plain tensors; also
            for a folder.
        OSError: If the file cannot be read.

    Example::

        variables = flax_googlenet.from_torchvision(flax_googlenet.read_state_dict("checkpoint.pth"))
    """
    state_dict, notes = _read(path, key, lambda part: None)
    for note in notes:
        warnings.warn(f"{os.fspath(path)}: {note}", stacklevel=2)
    return state_dict


def read(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Read a state dict like ``read_state_dict``, and return the notes and the digest of the file with it.

    The digest is that of the very bytes that the arrays come from. It takes two fifths of the time.
    """
    digest = hashlib.sha256()
    state_dict, notes = _read(path, key, digest.update)
    return Checkpoint(state_dict, digest.hexdigest(), notes)


def _read(
    path: str | os.PathLike[str], key: str | None, hash_part: Callable[[memoryview], object]
) -> tuple[dict[str, np.ndarray], list[str]]:
    try:
        with open_regular_file(path) as file:
            contents = _structure(file, Path(path).suffix)
            state_dict, notes = _find(contents, key)
            tensors = {name: _checked(name, value, contents.places) for name, value in state_dict.items()}
            storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
            values = _read_places(file, contents.places, storages, hash_part)
    except IsADirectoryError as error:
        raise StateDictError(f"cannot read {os.fspath(path)}: {error.strerror}{folder_advice(Path(path))}") from error
    except StateDictError as error:
        raise StateDictError(f"{os.fspath(path)}: {printable(str(error))}") from error
    if contents.is_swapped:
        for storage in storages.values():
            _swap_bytes(values[storage.key], storage.dtype)
    arrays = {name: _array(tensor, values[tensor.storage.key]) for name, tensor in tensors.items()}
    return arrays, list(map(printable, notes))


def _structure(file: io.BufferedReader, suffix: str) -> _Contents:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise StateDictError("the file is empty")
    if size > MAX_BYTES:
        raise StateDictError(f"the file has {size:,} bytes, and no GoogLeNet has more than {MAX_BYTES:,}")
    head = file.read(512)
    header_size = int.from_bytes(head[:8], "little")
    refuse_other_files(head)
    try:
        if head.startswith(b"PK\x03\x04"):
            return _open_zip(file, size)
        if _LEGACY.match(head):
            return _open_legacy(file, size)
        if (head[8:9] == b"{" and 8 + header_size <= size) or suffix == ".safetensors":
            return _open_safetensors(file, size, header_size)
    except (StateDictError, OSError):
        raise
    except Exception as error:  # damaged or hostile bytes can cause almost any exception in zipfile, pickle and JSON
        raise StateDictError(f"the file is damaged or cut off ({_first_line(error)})") from error
    if head.startswith(b"\x80"):
        raise StateDictError(
            "this is a pickle, not a file from torch.save; if it is the data.pkl of an unpacked .pth, "
            "give the .pth itself, or pack its folder again: zip -0 -r FILE.pth FOLDER"
        )
    raise StateDictError("this is neither a file from torch.save nor a .safetensors, or its first bytes are damaged")


class _DirectoryReader:
    """Reads a file for ``zipfile``, which would read a directory of any size, and make an object of each entry."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(_MAX_DIRECTORY_BYTES + 1 if size < 0 else min(size, _MAX_DIRECTORY_BYTES + 1))
        if len(data) > _MAX_DIRECTORY_BYTES:
            raise StateDictError(f"the directory of the zip has more than {_MAX_DIRECTORY_BYTES:,} bytes")
        return data


def _open_zip(file: io.BufferedReader, file_size: int) -> _Contents:
    entries = zipfile.ZipFile(_DirectoryReader(file)).infolist()
    names = [entry.filename for entry in entries]
    refuse_other_zips(names)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise StateDictError("the zip has compressed entries, which torch.save never writes: a zip bomb?")
    if any(entry.header_offset < 0 for entry in entries):
        raise StateDictError("the zip is damaged or cut off (its directory is not where it says)")
    if sum(entry.file_size for entry in entries) > file_size:
        raise StateDictError("the entries of the zip claim more bytes than the file has: a zip bomb?")
    if len(set(names)) < len(names):
        raise StateDictError("the zip has two entries with the same name")
    roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise StateDictError("the zip has no data.pkl: it is not from torch.save, or is damaged")
    root = roots[0]
    places = {}
    for entry in entries:
        file.seek(entry.header_offset)
        magic, name_size, extra_size = struct.unpack("<4s22xHH", file.read(30))
        if magic != b"PK\x03\x04":
            raise StateDictError("the zip is damaged or cut off (an entry is not where its directory says)")
        start = entry.header_offset + 30 + name_size + extra_size
        places[entry.filename.removeprefix(f"{root}data/")] = _Place(start, entry.file_size, entry.CRC)
    if places[f"{root}data.pkl"].size > MAX_PICKLE_BYTES:
        raise StateDictError(_HUGE_PICKLE)
    byte_order = _entry(file, places[f"{root}byteorder"]) if f"{root}byteorder" in places else b"little"
    if byte_order not in (b"little", b"big"):
        raise StateDictError("its byteorder is neither little nor big")
    interpreter = Interpreter()
    content = interpreter.load(io.BytesIO(_entry(file, places[f"{root}data.pkl"])))
    return _Contents(content, places, list(interpreter.unknown), byte_order.decode() != sys.byteorder)


def _entry(file: io.BufferedReader, place: _Place) -> bytes:
    file.seek(place.start)
    data = file.read(min(place.size, MAX_PICKLE_BYTES))
    if zlib.crc32(data) != place.crc:
        raise StateDictError("the zip is damaged or cut off (the checksum of its pickle is wrong)")
    return data


def _open_legacy(file: io.BufferedReader, file_size: int) -> _Contents:
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE_BYTES + 1))
    interpreter = Interpreter()
    try:
        # Magic number, protocol, system, content, keys of the storages. The values are little-endian on every machine.
        _, version, _, content, keys = (interpreter.load(stream) for _ in range(5))
    except Exception as error:
        if stream.tell() > MAX_PICKLE_BYTES and not isinstance(error, StateDictError):
            raise StateDictError(_HUGE_PICKLE) from error
        raise
    if version != 1001 or not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise StateDictError("the file is damaged or cut off (one of its five pickles is of another kind)")
    position, places = stream.tell(), {}
    for key in keys:
        storage = interpreter.storages[key]
        file.seek(position)
        if int.from_bytes(file.read(8), "little") != storage.length:
            raise StateDictError("the file is damaged or cut off (a storage has another size than its tensors say)")
        places[key] = _Place(position + 8, storage.size)
        position += 8 + storage.size
        if position > file_size:
            raise StateDictError("the file is damaged or cut off (its last storages are not complete)")
    return _Contents(content, places, list(interpreter.unknown), sys.byteorder == "big")


def _open_safetensors(file: io.BufferedReader, file_size: int, header_size: int) -> _Contents:
    if header_size > MAX_PICKLE_BYTES:
        raise StateDictError(f"the file is damaged or cut off (its header has {header_size:,} bytes)")
    file.seek(8)
    header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    if any(name.startswith("params/") for name in header):
        raise StateDictError(
            "this is already a file of flax_googlenet, which flax_googlenet.load reads; in the repository, "
            "python convert/port_weights.py FILE --to-torchvision FILE.pth converts it back"
        )
    content: dict[str, Tensor | UnusualTensor] = {}
    places = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        numbers_are_right = all(type(number) is int and number >= 0 for number in (start, stop, *shape))
        is_inside = numbers_are_right and start <= stop <= file_size - 8 - header_size
        if not is_inside or len(shape) > MAX_AXES or len(name) > MAX_NAME:
            raise StateDictError("the file is damaged or cut off (its header has an impossible tensor)")
        places[name] = _Place(8 + header_size + start, stop - start)
        kind = f"torch.{_SAFETENSORS_DTYPES.get(entry['dtype'])}Storage"
        if kind not in STORAGE_DTYPES:
            content[name] = UnusualTensor(f"of the dtype {entry['dtype'][:20]}", shape)
            continue
        storage = Storage(name, STORAGE_DTYPES[kind], math.prod(shape))
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        content[name] = Tensor(storage, storage.dtype, 0, shape, strides)
    return _Contents(content, places, [], sys.byteorder == "big")


def _find(contents: _Contents, key: str | None) -> tuple[dict[str, Any], list[str]]:
    content = contents.content
    try:
        found = find_state_dict(content, key)
    except PortingError as error:
        objects = content.values() if isinstance(content, Mapping) and key is None else [content]
        needed = [value.name for value in objects if isinstance(value, Placeholder)]
        needed.sort(key=lambda name: name not in contents.unknown)  # a model rather than the arguments beside it
        raise StateDictError(_asks_for(needed[0]) if needed else str(error)) from error
    notes = found.notes
    if contents.unknown:
        notes = [*notes, f"left out objects of other classes, and ran nothing: {listing(contents.unknown, 3)}"]
    return found.state_dict, notes


def _asks_for(name: str) -> str:
    return f"it needs {name}, and only plain tensors are loaded: save model.state_dict() instead"


def _checked(name: str, tensor: Any, places: Mapping[str, _Place]) -> Tensor:
    """Return a value of the state dict if it is a tensor whose values are all in the file, or raise StateDictError."""
    if isinstance(tensor, Placeholder):
        raise StateDictError(_asks_for(tensor.name))
    if isinstance(tensor, UnusualTensor):
        raise StateDictError(f"{name} is not a plain tensor: it is {tensor.problem}")
    if not isinstance(tensor, Tensor):
        raise StateDictError(f"{name} is not a plain tensor")
    storage, size = tensor.storage, math.prod(tensor.shape) * tensor.dtype.itemsize
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
    stop = storage.length if storage.stop is None else storage.stop
    if (
        min(tensor.offset, *tensor.shape, *tensor.strides, 0) < 0
        # A view that repeats its storage can claim any size, and its first copy would fill the memory.
        or size > storage.size
        or math.prod(max(length, 1) for length in tensor.shape) > 2**60  # NumPy has no larger arrays, even empty ones
        or (size and tensor.first_byte + (last + 1) * tensor.dtype.itemsize > stop * storage.dtype.itemsize)
        or storage.key not in places
        or places[storage.key].size != storage.size
    ):
        raise StateDictError(f"{name} claims {str(tensor.shape)[:80]}, more than the bytes stored for it")
    return tensor


def _read_places(
    file: io.BufferedReader,
    places: Mapping[str, _Place],
    wanted: Collection[str],
    hash_part: Callable[[memoryview], object],
) -> dict[str, np.ndarray]:
    """Read a file once from start to end, and return the bytes at the wanted places.

    Raises:
        StateDictError: If places overlap or are not in the file, or if a checksum is wrong.
    """
    scratch = memoryview(bytearray(_CHUNK))

    def read_into(target: memoryview | None, size: int, expected_crc: int | None = None) -> None:
        crc = 0
        for start in range(0, size, _CHUNK):
            count = min(_CHUNK, size - start)
            part = scratch[:count] if target is None else target[start : start + count]
            if file.readinto(part) != count:
                raise StateDictError("the file is damaged or cut off (it ends too early)")
            hash_part(part)
            if expected_crc is not None:
                crc = zlib.crc32(part, crc)
        if expected_crc is not None and crc != expected_crc:
            raise StateDictError("the zip is damaged or cut off (a checksum is wrong)")

    file.seek(0)
    position = 0
    values: dict[str, np.ndarray] = {}
    for key, place in sorted(places.items(), key=lambda item: item[1]):
        if place.start < position:
            raise StateDictError("the file is damaged or cut off (two of its parts are in one place)")
        read_into(None, place.start - position)
        if key in wanted:
            values[key] = np.empty(place.size, np.uint8)
        read_into(values[key].data if key in wanted else None, place.size, place.crc)
        position = place.start + place.size
    while rest := file.read(_CHUNK):
        hash_part(memoryview(rest))
    return values


def _swap_bytes(values: np.ndarray, dtype: np.dtype[Any]) -> None:
    size = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    values.view(f"u{size}").byteswap(inplace=True)


def _array(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    # The stride of an axis of length 1 has no meaning, and can be any number.
    axes = zip(tensor.shape, tensor.strides, strict=True)
    strides = [stride * tensor.dtype.itemsize if length > 1 else 0 for length, stride in axes]
    return np.ndarray(tensor.shape, tensor.dtype, values, tensor.first_byte, strides)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
