"""Reads checkpoints from untrusted files: a file is refused with one line, or gives exactly the tensors it stores.

Nothing in a file is ever run. PyTorch's zip reader ignores checksums, so zips are checked here first, and PyTorch gets
a clean copy in memory. Its older format has no checksum: only a hash of the file could show a damaged weight.
"""

import hashlib
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.torch
import torch

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.weights.state_dicts import find_state_dict
from flax_googlenet.weights.torchvision import PortingError

MAX_BYTES = 2**30  # a training checkpoint in float64 with averaged weights and momentum has 420 MB
MAX_PICKLE_BYTES = 2**22  # its pickle has 150 kB; unpickling can take 60 times the memory

_HUGE_PICKLE = f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes, too many for a list of tensors"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, pickled


class UntrustedFileError(GoogLeNetError):
    """A file that is damaged, unsafe or not a checkpoint; the message is one line that names the file."""


class Checkpoint(NamedTuple):
    """A state dict and the file that it comes from."""

    state_dict: dict[str, np.ndarray]
    """torchvision's names, without prefixes -> arrays; bfloat16 is ``ml_dtypes.bfloat16``."""
    sha256: str
    """SHA-256 digest of the file, in hexadecimal digits."""
    notes: list[str]
    """Notes on how the state dict was found, one line each."""


class Placeholder:
    """An object of a class that is never imported. It accepts whatever a pickle passes to such an object."""

    wanted = ""
    """Full name of the class or function."""

    def __new__(cls, *_: Any) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(path: Path, key: str | None = None) -> Checkpoint:
    """Read the state dict in a ``.pth`` (zip or legacy format) or a ``.safetensors`` in PyTorch's layout.

    Args:
        path: File to read.
        key: Which of several networks in the file to take, as for ``find_state_dict``.

    Raises:
        UntrustedFileError: If the file is anything but an undamaged checkpoint of plain tensors.
        OSError: If the file cannot be read.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise UntrustedFileError("the file is empty")
        if size > MAX_BYTES:
            raise UntrustedFileError(f"the file has {size:,} bytes, and no GoogLeNet has more than {MAX_BYTES:,}")
        data = path.read_bytes()
        content = _load(path, data)
        try:
            found = find_state_dict(content, key)
        except PortingError as error:
            objects = content.values() if isinstance(content, Mapping) and key is None else [content]
            raise UntrustedFileError(next(filter(None, map(_complaint, objects)), str(error))) from error
        return Checkpoint(_to_numpy(found.state_dict, len(data)), hashlib.sha256(data).hexdigest(), found.notes)
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{path}: {error}") from error


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
            "this is a pickle, not a file from torch.save; if it is the data.pkl of an unpacked .pth, "
            "give the .pth itself, or pack its folder again: zip -0 -r FILE.pth FOLDER"
        )
    raise UntrustedFileError(
        "this is neither a file from torch.save nor a .safetensors, or its first bytes are damaged"
    )


def _load_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # not only safetensors' own: an unknown dtype raises a KeyError
        raise UntrustedFileError(f"the file is damaged or cut off ({_first_line(error)})") from error
    if any(name.startswith("params/") for name in tensors):
        raise UntrustedFileError("this is already a port: --to-torchvision FILE.pth converts it back")
    return tensors


def _checked_zip(data: bytes) -> tuple[io.BytesIO, set[str]]:
    """Check that the entries of a zip are uncompressed, of a plausible size and of the right CRC.

    Returns:
        A copy of the zip, and the names of the classes and functions in its pickle.
    """
    clean, wanted = io.BytesIO(), set()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(clean, "w") as target:
            entries = source.infolist()
            _refuse_other_zips([entry.filename for entry in entries])
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UntrustedFileError("the zip has compressed entries, which torch.save never writes: a zip bomb?")
            if sum(entry.file_size for entry in entries) > len(data):
                raise UntrustedFileError("the entries of the zip claim more bytes than the file has: a zip bomb?")
            if len({entry.filename for entry in entries}) < len(entries):
                raise UntrustedFileError("the zip has two entries with the same name")
            if any(e.filename.endswith("data.pkl") and e.file_size > MAX_PICKLE_BYTES for e in entries):
                raise UntrustedFileError(_HUGE_PICKLE)
            for entry in entries:
                content = source.read(entry)  # checks the CRC
                target.writestr(entry.filename, content)
                if entry.filename.endswith("data.pkl"):
                    wanted |= _wanted(io.BytesIO(content))
    except UntrustedFileError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds for damage: BadZipFile, struct.error, ...
        raise UntrustedFileError(f"the zip is damaged or cut off ({_first_line(error)})") from error
    clean.seek(0)
    return clean, wanted


def _refuse_other_zips(names: list[str]) -> None:
    """Raise UntrustedFileError for a zip of another format, which may be compressed, with advice on what to do."""
    if any("/code/" in name for name in names):
        raise UntrustedFileError("this is a TorchScript program, not a state dict: save model.state_dict() instead")
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        raise UntrustedFileError("this is a program of torch.export, not a state dict: save model.state_dict() instead")
    if any(name.endswith(".npy") for name in names):
        raise UntrustedFileError(
            "this is a .npz of NumPy arrays: write them with safetensors.numpy.save_file(dict(numpy.load(FILE)), "
            '"FILE.safetensors") and give that file'
        )
    if inner := [name for name in names if name.endswith((".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors"))]:
        raise UntrustedFileError(f"this is an archive that holds {inner[0]}: unpack it first, with unzip")


def _check_legacy_pickles(data: bytes) -> set[str]:
    """Return the names of the classes and functions in the pickles of a file in PyTorch's older format."""
    # Five pickles: magic number, protocol, system, the object, the names of its storages. Raw bytes follow.
    stream = io.BytesIO(data[: MAX_PICKLE_BYTES + 1])
    try:
        return set().union(*(_wanted(stream) for _ in range(5)))
    except Exception as error:  # pickletools raises several kinds
        if len(data) > MAX_PICKLE_BYTES and stream.tell() > MAX_PICKLE_BYTES:
            raise UntrustedFileError(_HUGE_PICKLE) from error
        raise UntrustedFileError(f"the file is damaged or cut off ({_first_line(error)})") from error


def _load_pickled(file: io.BytesIO, wanted: Collection[str]) -> Any:
    """Load a file of ``torch.save``; ``wanted`` names all classes and functions in its pickles."""
    # People save NumPy numbers, paths, dates and their configuration beside the weights, and PyTorch's loader refuses a
    # file with a class that it does not know. Given placeholders for such classes it reads the file: nothing is
    # imported or run. The loader looks for its own tensor classes first, and refuses os and sys in any case.
    # It calls bytearray itself, so that a number of 5 bytes in the pickle could become gigabytes.
    if "builtins.bytearray" in wanted:
        raise UntrustedFileError(_asks_for("builtins.bytearray"))
    try:
        # As built-in types, the placeholders appear under the plain names of their classes in the loader's errors.
        stubs: dict[str, Any] = {
            name: type(name, (Placeholder,), {"wanted": name, "__module__": "builtins"}) for name in wanted
        }
        # The loader fills only plain dicts and lists.
        stubs |= {"collections.defaultdict": lambda *_: {}, "collections.deque": lambda *_: []}
        with (
            torch.serialization.safe_globals([(stub, name) for name, stub in stubs.items()]),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or damaged pickle can cause any exception
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UntrustedFileError(_asks_for(refused[1])) from error
        # A configuration, for example, can be an instance of a subclass of dict.
        if (refused := re.search(r"got <class '([^']+)'>", str(error))) and refused[1] in wanted:
            raise UntrustedFileError(_asks_for(refused[1])) from error
        raise UntrustedFileError(f"the file is damaged or cut off ({_first_line(error)})") from error


def _wanted(pickle: io.BytesIO) -> set[str]:
    """Read one pickle to its end, and return the full names of the classes and functions in it."""
    names = {str(argument) for opcode, argument, _ in pickletools.genops(pickle) if opcode.name == "GLOBAL"}
    # torch.save writes for Python 2, where these two modules have other names.
    return {
        re.sub(r"^__builtin__ ", "builtins ", re.sub(r"^copy_reg ", "copyreg ", name)).replace(" ", ".")
        for name in names
    }


def _complaint(value: Any) -> str | None:
    return _asks_for(value.wanted) if isinstance(value, Placeholder) else None


def _asks_for(name: str) -> str:
    return f"it needs {name}, and only plain tensors are loaded: save model.state_dict() instead"


def _to_numpy(tensors: Mapping[str, Any], file_size: int) -> dict[str, np.ndarray]:
    arrays, storages = {}, {}
    for name, tensor in tensors.items():
        if complaint := _complaint(tensor):
            raise UntrustedFileError(complaint)
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UntrustedFileError(f"{name} is not a plain tensor")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # A view that repeats its storage can claim any size, and its first copy would fill the memory.
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
    text = str(error).rpartition("WeightsUnpickler error:")[2]  # skips PyTorch's long advice
    return (text.strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
