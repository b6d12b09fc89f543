"""Reads state dicts from PyTorch's files without PyTorch: a file is refused, or gives exactly the tensors it stores.

Files are untrusted. Nothing in them is run (see ``pickles``), and the size of a file limits the memory and the time
that reading it takes. The structure is read first (see ``layouts``). Then the file is read once from start to end, and
only the tensors of the network are kept.
"""

import hashlib
import io
import math
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_googlenet.errors import listing, printable
from flax_googlenet.files import open_regular_file
from flax_googlenet.weights.layouts import Contents, Place, read_structure
from flax_googlenet.weights.other_formats import folder_advice
from flax_googlenet.weights.pickles import Placeholder, StateDictError, Tensor, UnusualTensor
from flax_googlenet.weights.state_dicts import find_state_dict
from flax_googlenet.weights.torchvision import PortingError

_MAX_TENSORS = 10_000  # a GoogLeNet has 364; a pickle can repeat one tensor under 200,000 names
_CHUNK = 2**20  # bytes that are read, hashed and checked at once: they stay in a processor's cache


class Checkpoint(NamedTuple):
    """A state dict and the file that it comes from."""

    state_dict: dict[str, np.ndarray]
    """torchvision's names, without prefixes -> arrays; bfloat16 is ``ml_dtypes.bfloat16``."""
    sha256: str
    """SHA-256 digest of the file, in hexadecimal digits."""
    notes: list[str]
    """Notes on how the state dict was found and on what was left out, one line each."""
    variant: str = "torchvision"
    """Name of the network, as for ``GoogLeNet``."""


def read_state_dict(path: str | os.PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
    """Read the state dict of a GoogLeNet from a PyTorch file, without PyTorch.

    The file is a ``.pth``, ``.pt``, ``.ckpt`` or ``.bin`` from ``torch.save``, in its present or its older format, or a
    ``.safetensors`` with PyTorch's names. It can be a training checkpoint that contains the state dict; a prefix of all
    names, such as ``module.``, is removed. Nothing in the file is run. A ``UserWarning`` says what was left out and
    which other networks the file has.

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

    The digest is computed from the same bytes as the arrays, while they are read. It takes two fifths of the time.
    """
    digest = hashlib.sha256()
    state_dict, notes = _read(path, key, digest.update)
    return Checkpoint(state_dict, digest.hexdigest(), notes)


def _read(
    path: str | os.PathLike[str], key: str | None, hash_part: Callable[[memoryview], object]
) -> tuple[dict[str, np.ndarray], list[str]]:
    try:
        with open_regular_file(path) as file:
            contents = read_structure(file, path)
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
            size = storage.dtype.itemsize // (2 if storage.dtype.kind == "c" else 1)  # of a number, real or imaginary
            values[storage.key].view(f"u{size}").byteswap(inplace=True)
    arrays = {name: _array(tensor, values[tensor.storage.key]) for name, tensor in tensors.items()}
    return arrays, list(map(printable, notes))


def _find(contents: Contents, key: str | None) -> tuple[dict[str, Any], list[str]]:
    content = contents.content
    try:
        found = find_state_dict(content, key)
    except PortingError as error:
        objects = content.values() if isinstance(content, Mapping) and key is None else [content]
        needed = [value.name for value in objects if isinstance(value, Placeholder)]
        needed.sort(key=lambda name: name not in contents.unknown)  # a model rather than the arguments beside it
        raise StateDictError(_asks_for(needed[0]) if needed else str(error)) from error
    if len(found.state_dict) > _MAX_TENSORS:
        raise StateDictError(
            f"it has {len(found.state_dict):,} tensors, and no GoogLeNet has more than {_MAX_TENSORS:,}"
        )
    notes = found.notes
    if contents.unknown:
        notes = [*notes, f"left out objects of other classes, and ran nothing: {listing(contents.unknown, 3)}"]
    return found.state_dict, notes


def _asks_for(name: str) -> str:
    return f"it needs {name}, and only plain tensors are loaded: save model.state_dict() instead"


def _checked(name: str, tensor: Any, places: Mapping[str, Place]) -> Tensor:
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
        raise StateDictError(
            f"{name} claims {str(tensor.shape)[:80]}, more than the bytes stored for it: "
            "call contiguous() before saving if it was expanded"
        )
    return tensor


def _read_places(
    file: io.BufferedReader,
    places: Mapping[str, Place],
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


def _array(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    # The stride of an axis of length 1 has no meaning, and can be any number.
    axes = zip(tensor.shape, tensor.strides, strict=True)
    strides = [stride * tensor.dtype.itemsize if length > 1 else 0 for length, stride in axes]
    return np.ndarray(tensor.shape, tensor.dtype, values, tensor.first_byte, strides)
