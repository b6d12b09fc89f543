"""Writes events as TensorBoard reads them.

tensorboardX would write them too, but it imports PyTorch where that is installed, which takes two seconds, and its
writer hangs for ever once the disk is full.

References: https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto for the fields,
https://protobuf.dev/programming-guides/encoding/ for their encoding.
"""

import functools
import struct
import time
from collections.abc import Mapping

import numpy as np

VERSION = b"\x1a\x0dbrain.Event:2"  # field 3, file_version: 13 bytes
"""The content of the first event of a file."""

START = b"\x3a\x02\x08\x01"  # field 7, session_log: 2 bytes, in which field 1, status, is START
"""The content of an event from whose step on TensorBoard drops the events that it has read from earlier files."""


def scalars(values: Mapping[str, float]) -> bytes:
    """Return the content of an event with named values, in float32."""
    summary = b""
    for tag, value in values.items():
        with np.errstate(over="ignore"):  # a value that is too large becomes infinite
            named = _bytes(1, tag.encode()) + b"\x15" + np.array(value).astype("<f4").tobytes()  # field 2, simple_value
        summary += _bytes(1, named)
    return _bytes(5, summary)


def event(content: bytes, step: int = 0) -> bytes:
    """Return the record of an event: the length of its data, the data, and a checksum of each."""
    data = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + content  # fields 1 and 2
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _bytes(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    """Encode an integer of at least 0: seven bits in a byte, the lowest first; the eighth bit says that more follow."""
    return bytes([number & 0x7F | 0x80]) + _varint(number >> 7) if number > 0x7F else bytes([number])


def _checksum(data: bytes) -> bytes:
    """Return the masked CRC-32C of the data, as TensorFlow's files of records have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _crc(crc & 0xFF ^ byte)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF)


@functools.cache
def _crc(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, the lowest bit first
    return byte
