"""Reading checkpoints that nobody vouches for: a file is refused in one line, or its tensors are what it says.

Nothing in a file is ever run. PyTorch's zip reader ignores checksums, so zips are read and checked here first, and
PyTorch gets a clean copy in memory. Its older format has no checksum: there only a hash of the whole file could tell.
"""

import hashlib
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.torch
import torch

from flax_googlenet.weights.state_dicts import find_state_dict
from flax_googlenet.weights.torchvision import PortingError

MAX_BYTES = 2**30  # a training checkpoint of GoogLeNet in float64 with averaged weights and momentum has 420 MB
MAX_PICKLE_BYTES = 2**22  # its pickle has 150 kB; unpickling can take 60 times the space

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, pickled


class UntrustedFileError(Exception):
    """One line: the file, and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    state_dict: dict[str, np.ndarray]
    """torchvision's names, without prefixes -> arrays; bfloat16 as ml_dtypes has it."""
    sha256: str
    """SHA-256 digest of the file, in hexadecimal digits."""
    notes: list[str]
    """What a person should know about how the state dict was found, one line each."""


class Placeholder:
    """Stands for an object of a class that is never imported; it takes whatever a pickle gives to such an object."""

    wanted = ""
    """The full name of the class or function."""

    def __new__(cls, *_: Any) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(path: Path, key: str | None = None) -> Checkpoint:
    """Reads the state dict in a ``.pth`` (zip or legacy format) or a ``.safetensors`` in PyTorch's layout.

    Args:
        path: the file.
        key: which of several networks in the file to take, as for ``find_state_dict``.

    Raises:
        UntrustedFileError: for anything but a whole checkpoint of plain tensors.
        OSError: if there is no such file.
    """
    try:
        data = _read_capped(path)
        content = _load(path, data)
        try:
            found = find_state_dict(content, key)
        except PortingError as error:
            objects = content.values() if isinstance(content, Mapping) and key is None else [content]
            raise UntrustedFileError(next(filter(None, map(_complaint, objects)), str(error))) from error
        return Checkpoint(_to_numpy(found.state_dict, len(data)), hashlib.sha256(data).hexdigest(), found.notes)
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{path}: {error}") from error


def _read_capped(path: Path) -> bytes:
    size = path.stat().st_size
    if size == 0:
        raise UntrustedFileError("the file is empty")
    if size > MAX_BYTES:
        raise UntrustedFileError(f"the file has {size:,} bytes, and no GoogLeNet has more than {MAX_BYTES:,}")
    return path.read_bytes()


def _load(path: Path, data: bytes) -> Any:
    if re.match(rb"\s*<(!doctype|\?xml|html|head|body)", data[:512].lower()):
        raise UntrustedFileError("this is a web page, not a checkpoint: download the file itself")
    if data.startswith(b"version https://git-lfs"):
        raise UntrustedFileError("this is a Git LFS pointer, not the checkpoint: run `git lfs pull`")
    if path.suffix == ".safetensors":
        return _load_safetensors(data)
    if data.startswith(b"PK\x03\x04"):
        return _load_pickled(*_checked_zip(data))
    if data.startswith(LEGACY_MAGIC):
        return _load_pickled(io.BytesIO(data), _check_legacy_pickles(data))
    if data.startswith(b"\x1f\x8b"):
        raise UntrustedFileError("this is compressed by gzip: unpack it first, with tar xzf or gunzip")
    if data[257:262] == b"ustar":
        raise UntrustedFileError("this is a tar archive: unpack it first, with tar xf")
    if data.startswith(b"\x80"):
        raise UntrustedFileError(
            "this is a pickle, neither a file of torch.save nor a .safetensors; if it is the data.pkl of an unpacked "
            ".pth, give the .pth itself, or pack its folder again: zip -0 -r FILE.pth FOLDER"
        )
    raise UntrustedFileError("this is neither a file of torch.save nor a .safetensors, or its first bytes are damaged")


def _load_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # a KeyError for an unknown dtype, too
        raise UntrustedFileError(f"the file is damaged or cut off ({_first_line(error)})") from error
    if any(name.startswith("params/") for name in tensors):
        raise UntrustedFileError("this is a port already: --to-torchvision FILE.pth turns it back")
    return tensors


def _checked_zip(data: bytes) -> tuple[io.BytesIO, set[str]]:
    """Copy a zip and check it: entries stored, not compressed, of a sane size, and of the right CRC.

    Returns:
        The copy, and the names of the classes and functions in its pickle.
    """
    clean, wanted = io.BytesIO(), set()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(clean, "w") as target:
            entries = source.infolist()
            _refuse_other_zips([entry.filename for entry in entries])
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UntrustedFileError("the zip has compressed entries, which torch.save never writes: a zip bomb?")
            if sum(entry.file_size for entry in entries) > len(data):
                raise UntrustedFileError("the zip claims more contents than it has bytes: a zip bomb?")
            if len({entry.filename for entry in entries}) < len(entries):
                raise UntrustedFileError("the zip has two entries of one name")
            if any(e.filename.endswith("data.pkl") and e.file_size > MAX_PICKLE_BYTES for e in entries):
                raise UntrustedFileError(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes: no list of tensors has")
            for entry in entries:
                content = source.read(entry)  # checks the CRC
                target.writestr(entry.filename, content)
                if entry.filename.endswith("data.pkl"):
                    wanted |= _wanted(io.BytesIO(content))
    except UntrustedFileError:
        raise
    except (
        Exception
    ) as error:  # zipfile raises a dozen kinds on damage: BadZipFile, struct.error, NotImplementedError...
        raise UntrustedFileError(f"the zip is damaged or cut off ({_first_line(error)})") from error
    clean.seek(0)
    return clean, wanted


def _refuse_other_zips(names: list[str]) -> None:
    """Raise UntrustedFileError for zips of other formats, which may be compressed, and say what to do with them."""
    if any("/code/" in name for name in names):
        raise UntrustedFileError("this is a TorchScript program, not a state dict: save model.state_dict() instead")
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        raise UntrustedFileError("this is a program of torch.export, not a state dict: save model.state_dict() instead")
    if any(name.endswith(".npy") for name in names):
        raise UntrustedFileError(
            "these are arrays of NumPy, a .npz: write them with safetensors.numpy.save_file(dict(numpy.load(FILE)), "
            '"FILE.safetensors") and give that file'
        )
    if inner := [name for name in names if name.endswith((".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors"))]:
        raise UntrustedFileError(f"this is an archive that holds {inner[0]}: unpack it first, with unzip")


def _check_legacy_pickles(data: bytes) -> set[str]:
    """Read the pickles of PyTorch's older format, and return the names of the classes and functions in them."""
    # magic number, protocol, system, the object, its storages' names; then raw bytes
    stream = io.BytesIO(data[: MAX_PICKLE_BYTES + 1])
    try:
        return set().union(*(_wanted(stream) for _ in range(5)))
    except Exception as error:  # pickletools raises several kinds
        if len(data) > MAX_PICKLE_BYTES and stream.tell() > MAX_PICKLE_BYTES:
            raise UntrustedFileError(
                f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes: no list of tensors has"
            ) from error
        raise UntrustedFileError(f"the file is damaged or cut off ({_first_line(error)})") from error


def _load_pickled(file: io.BytesIO, wanted: Collection[str]) -> Any:
    """Load a file of ``torch.save``; ``wanted`` names all classes and functions in its pickles."""
    # Beside the weights people keep NumPy's numbers, paths, dates and their configuration. PyTorch's loader refuses a
    # file with a class that it does not know. It takes a placeholder instead: the class is not imported, and nothing is
    # run. Its own classes, those of tensors, come first, and it refuses os and sys whatever is put in their place.
    # PyTorch's loader calls bytearray itself: a number of 5 bytes in the pickle would become gigabytes.
    if "builtins.bytearray" in wanted:
        raise UntrustedFileError(_asks_for("builtins.bytearray"))
    try:
        # The loader's errors name the placeholders, as built-in types without a module.
        stubs: dict[str, Any] = {
            name: type(name, (Placeholder,), {"wanted": name, "__module__": "builtins"}) for name in wanted
        }
        stubs |= {"collections.defaultdict": _plain_dict, "collections.deque": _plain_list}
        with (
            torch.serialization.safe_globals([(stub, name) for name, stub in stubs.items()]),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or damaged pickle sets off
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UntrustedFileError(_asks_for(refused[1])) from error
        # The loader puts elements into plain lists and dicts alone, not into a configuration that is a dict of a class
        # of its own.
        if (refused := re.search(r"got <class '([^']+)'>", str(error))) and refused[1] in wanted:
            raise UntrustedFileError(_asks_for(refused[1])) from error
        raise UntrustedFileError(f"the file is damaged or cut off ({_first_line(error)})") from error


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Stand in for collections.defaultdict: the loader puts elements into nothing but plain dicts."""
    return {}


def _plain_list(*_: Any) -> list[Any]:
    """Stand in for collections.deque in the same way."""
    return []


def _wanted(pickle: io.BytesIO) -> set[str]:
    """Return the full names of the classes and functions in one pickle, which is read to its end."""
    names = {str(argument) for opcode, argument, _ in pickletools.genops(pickle) if opcode.name == "GLOBAL"}
    # torch.save pickles for Python 2, too, where these two modules had other names.
    return {
        re.sub(r"^__builtin__ ", "builtins ", re.sub(r"^copy_reg ", "copyreg ", name)).replace(" ", ".")
        for name in names
    }


def _complaint(value: Any) -> str | None:
    return _asks_for(value.wanted) if isinstance(value, Placeholder) else None


def _asks_for(name: str) -> str:
    return f"it asks for {name}, and only plain tensors are loaded: save model.state_dict() instead"


def _to_numpy(tensors: Mapping[str, Any], file_size: int) -> dict[str, np.ndarray]:
    arrays, storages = {}, {}
    for name, tensor in tensors.items():
        if complaint := _complaint(tensor):
            raise UntrustedFileError(complaint)
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UntrustedFileError(f"{name} is not a plain tensor")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # Stated sizes cost nothing; the first copy of a view that repeats its storage would fill the memory.
        if tensor.numel() * tensor.itemsize > storage.nbytes() or sum(storages.values()) > file_size:
            raise UntrustedFileError(f"{name} claims {tuple(tensor.shape)}, more than the bytes stored for it")
        try:
            if tensor.dtype == torch.bfloat16:
                arrays[name] = tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            else:
                arrays[name] = tensor.detach().numpy()
        except (TypeError, RuntimeError) as error:  # quantized, float8
            raise UntrustedFileError(f"{name} is not a plain tensor ({_first_line(error)})") from error
    return arrays


def _first_line(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error:")[2]  # PyTorch puts its advice in front of what is wrong
    return (text.strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
