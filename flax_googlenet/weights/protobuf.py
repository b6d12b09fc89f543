"""Reads and writes messages of Protocol Buffers, of which the files of Caffe, TensorFlow and ONNX consist.

Files are untrusted. Each number in one is checked before it has any effect, and the size of a file limits the memory
and the time that reading it takes. The format has no checksum, so only a hash of the file shows a damaged weight.

Reference: https://protobuf.dev/programming-guides/encoding/
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from flax_googlenet.errors import printable
from flax_googlenet.files import read_regular_file
from flax_googlenet.weights.layouts import MAX_BYTES
from flax_googlenet.weights.other_formats import is_for_another_reader, refuse_other_files, who_reads
from flax_googlenet.weights.pickles import StateDictError
from flax_googlenet.weights.pth import Checkpoint

_MAX_FIELDS = 2**17  # in the messages that are read; a network in training has 3,000
_VARINT, _LENGTH = 0, 2  # kinds of values on the wire; the others have 8 bytes (1) and 4 bytes (5)
_FIXED_SIZES = {1: 8, 5: 4}


def read(
    path: str | os.PathLike[str],
    suffix: str,
    parse: Callable[[memoryview], tuple[dict[str, np.ndarray], str]],
    if_text: str,
) -> Checkpoint:
    """Read the weights of a file that is one message of Protocol Buffers.

    Args:
        path: File to read.
        suffix: The suffix of the names that such files have.
        parse: Returns the weights in a message and their variant, or raises a StateDictError.
        if_text: What to say about a file of text.

    Raises:
        StateDictError: If the file is damaged or of another known format. The message names it.
        OSError: If it cannot be read.
    """
    try:
        data = _read_message(path, if_text)
        state_dict, variant = parse(memoryview(data))
    except StateDictError as error:
        advice = f"; {who_reads(path)}" if is_for_another_reader(path, suffix) else ""
        raise StateDictError(f"{os.fspath(path)}: {printable(str(error))}{advice}") from error
    return Checkpoint(state_dict, hashlib.sha256(data).hexdigest(), [], variant)


def _read_message(path: str | os.PathLike[str], if_text: str) -> bytes:
    """Return the bytes of a file, after a look at whether they could be a message of Protocol Buffers."""
    data = read_regular_file(path, MAX_BYTES)
    refuse_other_files(data[:512])
    if data and data[:512].isascii() and data[:512].decode().replace("\n", " ").replace("\r", " ").isprintable():
        raise StateDictError(if_text)
    # A zip, a pickle, and the length of the JSON after it: no message that is read begins with one of them.
    is_safetensors = data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data)
    if data.startswith((b"PK\x03\x04", b"\x80\x02")) or is_safetensors:
        raise StateDictError(
            "this is a .pth or .safetensors: flax_googlenet.read_state_dict reads those of PyTorch, and "
            "flax_googlenet.load those of this library"
        )
    return data


class Reader:
    """Reads the messages of one file; raises StateDictError if one is damaged, or if the file has too many fields."""

    def __init__(self) -> None:
        self._fields = 0

    def fields(self, message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Yield the numbers and values of the fields of a message: an integer, or the bytes of anything else."""
        position = 0
        while position < len(message):
            self._fields += 1
            if self._fields > _MAX_FIELDS:
                raise StateDictError(f"it has more than {_MAX_FIELDS:,} fields, too many for a network")
            key, position = varint(message, position)
            number, kind = key >> 3, key & 7
            if number == 0:
                raise StateDictError("the file is damaged, or is of another format (a field without a number)")
            if kind == _VARINT:
                value, position = varint(message, position)
                yield number, value
                continue
            if kind == _LENGTH:
                size, position = varint(message, position)
            elif kind in _FIXED_SIZES:
                size = _FIXED_SIZES[kind]
            else:
                raise StateDictError("the file is damaged, or is of another format (a field of an unknown kind)")
            if size > len(message) - position:
                raise StateDictError("the file is damaged or cut off (a field is longer than what is there)")
            yield number, message[position : position + size]
            position += size

    def message(self, message: memoryview) -> defaultdict[int, list[int | memoryview]]:
        """Return the values of all fields of a message, by the number of the field."""
        values = defaultdict(list)
        for number, value in self.fields(message):
            values[number].append(value)
        return values


def part(message: Mapping[int, list[int | memoryview]], number: int) -> memoryview:
    """Return the bytes of a field, which are empty if the message does not have it."""
    return as_bytes(message[number][-1]) if message[number] else memoryview(b"")


def varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the integer at a position, and the position after it.

    Each byte has 7 bits of the integer, the lowest first, and a bit that says whether another byte follows.

    Raises:
        StateDictError: If the integer does not end within 10 bytes, or within the message.
    """
    value = 0
    for i, byte in enumerate(message[position : position + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise StateDictError("the file is damaged or cut off (an integer without an end)")


def integer(value: int | memoryview) -> int:
    """Return the value of a field that must be an integer; raise StateDictError if it is bytes."""
    if isinstance(value, memoryview):
        raise StateDictError("the file is damaged (bytes where there should be an integer)")
    return value


def integers(value: int | memoryview, most: int) -> list[int]:
    """Return the integers of a repeated field: one, or several packed ones, of which at most ``most + 1`` are read."""
    if not isinstance(value, memoryview):
        return [value]
    found: list[int] = []
    position = 0
    while position < len(value) and len(found) <= most:
        size, position = varint(value, position)
        found.append(size)
    return found


def as_bytes(value: int | memoryview) -> memoryview:
    """Return the value of a field that must be bytes; raise StateDictError if it is an integer."""
    if not isinstance(value, memoryview):
        raise StateDictError("the file is damaged (an integer where there should be bytes)")
    return value


def numbers(data: memoryview, dtype: str) -> np.ndarray:
    """Return an array of the numbers in ``data``; raise StateDictError if there are none, or a part of one."""
    if not data or len(data) % np.dtype(dtype).itemsize:
        raise StateDictError("the file is damaged (no numbers, or a part of one)")
    return np.frombuffer(data, dtype).astype(np.dtype(dtype).newbyteorder("="))


def field(number: int, value: bytes) -> bytes:
    """Return a field of a message."""
    return encode_varint(number << 3 | _LENGTH) + encode_varint(len(value)) + value


def encode_varint(value: int) -> bytes:
    """Return the bytes that ``varint`` reads as ``value``."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + encode_varint(rest) if rest else bytes([low])
