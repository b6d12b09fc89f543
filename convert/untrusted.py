"""Reading checkpoints that nobody vouches for: a file is refused in one line, or its tensors are what it says.

Nothing in a file is ever run. PyTorch's zip reader ignores checksums, so zips are read and checked here first, and
PyTorch gets a clean copy in memory. Its older format has no checksum: there only a hash of the whole file could tell.
"""

import argparse
import hashlib
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.torch
import torch

MAX_BYTES = 2**30  # a training checkpoint of GoogLeNet in float64 with averaged weights and momentum has 420 MB
MAX_PICKLE_BYTES = 2**22  # its pickle has 150 kB; unpickling can take 60 times the space

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, pickled
WRAPPERS = ("model", "state_dict", "model_ema")  # as in torchvision's reference script and in Lightning
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


class UntrustedFileError(Exception):
    """One line: the file, and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    state_dict: dict[str, np.ndarray]
    """torchvision's names, without prefixes -> arrays; bfloat16 as ml_dtypes has it."""
    sha256: str
    """Of the whole file."""
    note: str | None
    """What else the file holds that could have been meant."""


def read(path: Path, key: str | None = None) -> Checkpoint:
    """Reads the state dict in a ``.pth`` (zip or legacy format) or a ``.safetensors`` in PyTorch's layout.

    Args:
        path: the file.
        key: of the state dict inside a training checkpoint; None finds it where it is plain which one is meant.

    Raises:
        UntrustedFileError: for anything but a whole checkpoint of plain tensors.
        OSError: if there is no such file.
    """
    try:
        data = _read_capped(path)
        state_dict, note = _find_state_dict(_load(path, data), key)
        tensors = _strip_prefixes(state_dict)
        return Checkpoint(_to_numpy(tensors, len(data)), hashlib.sha256(data).hexdigest(), note)
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
        return _load_pickled(_checked_zip(data))
    if data.startswith(LEGACY_MAGIC):
        _check_legacy_pickles(data)
        return _load_pickled(io.BytesIO(data))
    raise UntrustedFileError("this is neither a file of torch.save nor a .safetensors, or its first bytes are damaged")


def _load_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # a KeyError for an unknown dtype, too
        raise UntrustedFileError(f"the file is damaged or cut off ({_first_line(error)})") from error
    if any(name.startswith("params/") for name in tensors):
        raise UntrustedFileError("this is a port already: --to-torchvision FILE.pth turns it back")
    return tensors


def _checked_zip(data: bytes) -> io.BytesIO:
    """A copy of a zip that was checked: entries stored, not compressed, of a sane size, and of the right CRC."""
    clean = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(clean, "w") as target:
            entries = source.infolist()
            if any("/code/" in entry.filename for entry in entries):
                raise UntrustedFileError(
                    "this is a TorchScript program, not a state dict: save model.state_dict() instead"
                )
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UntrustedFileError("the zip has compressed entries, which torch.save never writes: a zip bomb?")
            if sum(entry.file_size for entry in entries) > len(data):
                raise UntrustedFileError("the zip claims more contents than it has bytes: a zip bomb?")
            if len({entry.filename for entry in entries}) < len(entries):
                raise UntrustedFileError("the zip has two entries of one name")
            if any(e.filename.endswith("data.pkl") and e.file_size > MAX_PICKLE_BYTES for e in entries):
                raise UntrustedFileError(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes: no list of tensors has")
            for entry in entries:
                target.writestr(entry.filename, source.read(entry))  # checks the CRC
    except UntrustedFileError:
        raise
    except (
        Exception
    ) as error:  # zipfile raises a dozen kinds on damage: BadZipFile, struct.error, NotImplementedError...
        raise UntrustedFileError(f"the zip is damaged or cut off ({_first_line(error)})") from error
    clean.seek(0)
    return clean


def _check_legacy_pickles(data: bytes) -> None:
    # magic number, protocol, system, the object, its storages' names; then raw bytes
    stream = io.BytesIO(data[: MAX_PICKLE_BYTES + 1])
    try:
        for _ in range(5):
            for _ in pickletools.genops(stream):
                pass
    except Exception as error:  # pickletools raises several kinds
        if len(data) > MAX_PICKLE_BYTES and stream.tell() > MAX_PICKLE_BYTES:
            raise UntrustedFileError(
                f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes: no list of tensors has"
            ) from error
        raise UntrustedFileError(f"the file is damaged or cut off ({_first_line(error)})") from error


def _load_pickled(file: io.BytesIO) -> Any:
    try:
        # torchvision's training script keeps its arguments, an argparse.Namespace: a bag of attributes.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or damaged pickle sets off
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            reason = f"it asks for {wanted[1]}, and only plain tensors are loaded: save model.state_dict() instead"
        else:
            reason = f"the file is damaged or cut off ({_first_line(error)})"
        raise UntrustedFileError(reason) from error


def _find_state_dict(content: Any, key: str | None) -> tuple[Mapping[str, Any], str | None]:
    if not isinstance(content, Mapping):
        raise UntrustedFileError(f"it holds a {type(content).__name__}, not a state dict")
    found = ", ".join(str(name) for name in list(content)[:12]) + (", ..." if len(content) > 12 else "")
    candidates = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            raise UntrustedFileError(f"there is no state dict under --key {key}; the keys found: {found}")
        return content[key], None
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        return content, None
    if not candidates:
        raise UntrustedFileError(f"no state dict found; name one with --key; the keys found: {found or 'none'}")
    chosen, *others = candidates
    return content[chosen], f"took {chosen!r}; --key {others[0]} takes the other weights in it" if others else None


def _strip_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Drops what wrappers of the model put before every name, and the counter of an averaged model."""
    stripped = {str(name): value for name, value in state_dict.items()}
    if "n_averaged" in stripped and len(stripped) > 1:
        del stripped["n_averaged"]
    while prefix := next((p for p in PREFIXES if stripped and all(name.startswith(p) for name in stripped)), None):
        stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    return stripped


def _to_numpy(tensors: Mapping[str, Any], file_size: int) -> dict[str, np.ndarray]:
    arrays, storages = {}, {}
    for name, tensor in tensors.items():
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
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
