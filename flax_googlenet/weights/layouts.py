"""Finds what a PyTorch file holds and where the values of its tensors are, without reading the values.

``torch.save`` writes a zip: the pickle ``data.pkl`` refers to storages, which are uncompressed entries. Before PyTorch
1.6 it wrote five pickles and then the storages; such a file has no checksum, so only a hash of the file shows a damaged
weight. A ``.safetensors`` is a JSON header and the tensors.
"""

import io
import json
import math
import os
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from flax_googlenet.weights.other_formats import (
    is_for_another_reader,
    refuse_other_files,
    refuse_other_zips,
    who_reads,
)
from flax_googlenet.weights.pickles import (
    MAX_AXES,
    MAX_NAME,
    MAX_PICKLE_BYTES,
    STORAGE_DTYPES,
    Interpreter,
    StateDictError,
    Storage,
    Tensor,
    UnusualTensor,
)

MAX_BYTES = 2**30  # a training checkpoint in float64 with averaged weights and momentum has 420 MB
_MAX_DIRECTORY_BYTES = 2**22  # of a zip; that of a training checkpoint has 200 kB

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


class Place(NamedTuple):
    """A part of a file."""

    start: int
    """Offset of its first byte."""
    size: int
    """Number of bytes."""
    crc: int | None = None
    """CRC-32 checksum; None where the format has none."""


class Contents(NamedTuple):
    """The structure of a file, without the values of its tensors."""

    content: Any
    """What the file holds, with ``Tensor`` and ``Placeholder`` objects."""
    places: dict[str, Place]
    """Places of the storages, by their keys, and of all other entries of a zip, which have checksums."""
    unknown: list[str]
    """Names of classes that do not belong to training checkpoints."""
    is_swapped: bool = False
    """Whether the values have the other byte order than this machine."""


def read_structure(file: io.BufferedReader, name: str | os.PathLike[str]) -> Contents:
    """Read the structure of a file, whatever its format; its name helps to name damage.

    Raises:
        StateDictError: If the file is damaged, of another format, or has anything in it that PyTorch never writes.
    """
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
        if (head[8:9] == b"{" and 8 + header_size <= size) or Path(name).suffix == ".safetensors":
            return _open_safetensors(file, size, header_size)
    except (StateDictError, OSError):
        raise
    except Exception as error:  # damaged or hostile bytes can cause almost any exception in zipfile, pickle and JSON
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise StateDictError(f"the file is damaged or cut off ({reason})") from error
    if head.startswith(b"\x80"):
        raise StateDictError(
            "this is a pickle, not a file from torch.save; if it is the data.pkl of an unpacked .pth, "
            "give the .pth itself, or pack its folder again: zip -0 -r FILE.pth FOLDER"
        )
    if is_for_another_reader(name):
        raise StateDictError(f"by its name, this is no file of PyTorch: {who_reads(name)}")
    raise StateDictError(
        "this is neither a file from torch.save nor a .safetensors, or its first bytes are damaged; "
        "the name of a file of TensorFlow must end in .pb, of Caffe in .caffemodel, and of ONNX in .onnx"
    )


class _DirectoryReader:
    """Reads a file for ``zipfile``, which would read a directory of any size, and make an object of each entry."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(_MAX_DIRECTORY_BYTES + 1 if size < 0 else min(size, _MAX_DIRECTORY_BYTES + 1))
        if len(data) > _MAX_DIRECTORY_BYTES:
            raise StateDictError(f"the directory of the zip has more than {_MAX_DIRECTORY_BYTES:,} bytes")
        return data


def _open_zip(file: io.BufferedReader, file_size: int) -> Contents:
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
        places[entry.filename] = Place(start, entry.file_size, entry.CRC)
    if places[f"{root}data.pkl"].size > MAX_PICKLE_BYTES:
        raise StateDictError(_HUGE_PICKLE)
    byte_order = _entry(file, places[f"{root}byteorder"]) if f"{root}byteorder" in places else b"little"
    if byte_order not in (b"little", b"big"):
        raise StateDictError("its byteorder is neither little nor big")
    interpreter = Interpreter(f"{root}data/")
    content = interpreter.load(io.BytesIO(_entry(file, places[f"{root}data.pkl"])))
    return Contents(content, places, list(interpreter.unknown), byte_order.decode() != sys.byteorder)


def _entry(file: io.BufferedReader, place: Place) -> bytes:
    file.seek(place.start)
    data = file.read(min(place.size, MAX_PICKLE_BYTES))
    if zlib.crc32(data) != place.crc:
        raise StateDictError("the zip is damaged or cut off (the checksum of its pickle is wrong)")
    return data


def _open_legacy(file: io.BufferedReader, file_size: int) -> Contents:
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
        places[key] = Place(position + 8, storage.size)
        position += 8 + storage.size
        if position > file_size:
            raise StateDictError("the file is damaged or cut off (its last storages are not complete)")
    return Contents(content, places, list(interpreter.unknown), sys.byteorder == "big")


def _open_safetensors(file: io.BufferedReader, file_size: int, header_size: int) -> Contents:
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
        if not is_inside or not isinstance(entry["shape"], list) or len(shape) > MAX_AXES or len(name) > MAX_NAME:
            raise StateDictError("the file is damaged or cut off (its header has an impossible tensor)")
        places[name] = Place(8 + header_size + start, stop - start)
        kind = f"torch.{_SAFETENSORS_DTYPES.get(entry['dtype'])}Storage"
        if kind not in STORAGE_DTYPES:
            content[name] = UnusualTensor(f"of the dtype {entry['dtype'][:20]}", shape)
            continue
        storage = Storage(name, STORAGE_DTYPES[kind], math.prod(shape))
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        content[name] = Tensor(storage, storage.dtype, 0, shape, strides)
    return Contents(content, places, [], sys.byteorder == "big")
