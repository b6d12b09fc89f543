"""One ``.safetensors`` file for a model's configuration, its variables and free metadata; atomic and checksummed.

The tensors are named by their path in the variables, ``params/conv1/conv/kernel``. The header's metadata has one entry,
``flax_googlenet``: a JSON object of ``sha256``, ``model`` and ``metadata``. The digest is that of the whole file with
its own 64 digits read as zeros. safetensors has no checksum of its own; with this one any flipped bit is noticed, in
the tensors or the header. The same input makes the same bytes.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype
from jax import numpy as jnp

from flax_googlenet.model import GoogLeNet, Variables, variable_shapes

_DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}  # safetensors' names
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')  # JSON in JSON: the quotes are escaped


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this library, or a model and variables that do not belong together."""


def save(
    path: str | os.PathLike[str], model: GoogLeNet, variables: Variables, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a model, its variables and metadata to one ``.safetensors`` file.

    The file is written beside its place, synced and renamed: a kill at any moment leaves the old file or the new one.

    Args:
        path: the file to write.
        model: the network; its fields are stored, all but ``frozen``.
        variables: exactly the variables that ``model.init`` makes, of any floating dtype.
        metadata: anything JSON can hold, by name: class names, the source of the weights, ...

    Raises:
        CheckpointError: if the variables are not the model's, by names and shapes; the message lists all that differ.
        TypeError: if the metadata is not for JSON.
        OSError: if the file cannot be written; nothing is left behind then.
    """
    tensors = {"/".join(names): np.ascontiguousarray(value) for names, value in flatten_dict(dict(variables)).items()}
    _check_tensors("the variables", model, tensors)
    # One entry: safetensors writes several in an order that changes from run to run.
    content = {"sha256": _NO_DIGEST, "model": _config(model), "metadata": dict(metadata or {})}
    data = safetensors.numpy.save(tensors, {"flax_googlenet": json.dumps(content)})
    start, _, digest = _digest(data, path)
    write_atomically(path, data[:start] + digest.encode() + data[start + len(digest) :])


def load(path: str | os.PathLike[str], *, dtype: Dtype | None = None) -> tuple[GoogLeNet, dict[str, Any]]:
    """Reads what ``save`` wrote: the model and its variables.

    Args:
        path: the file.
        dtype: of the computation and the parameters, instead of the stored ones. BatchNorm statistics stay in float32
            at least. float64 needs ``jax.config.update("jax_enable_x64", True)``.

    Returns:
        The model with the stored fields, and its variables as JAX arrays on the default device.

    Raises:
        CheckpointError: if the file is damaged, in as little as one bit, or was not written by ``save``, or if its
            dtype or the one asked for is 64 bits wide and JAX has 64 bits off.
        OSError: if there is no such file.

    Example::

        model, variables = flax_googlenet.load("googlenet.safetensors")
        logits = jax.jit(model.apply)(variables, images).logits
    """
    return load_whole(path, dtype=dtype)[:2]


def load_whole(
    path: str | os.PathLike[str], *, dtype: Dtype | None = None
) -> tuple[GoogLeNet, dict[str, Any], dict[str, Any], str]:
    """As ``load``; model, variables, metadata and the sha256 of the file, from one reading of it."""
    if dtype is not None and dtype not in _DTYPES.values():
        raise CheckpointError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    data, content = _read(path)
    config = content["model"]
    if config.keys() != _config(GoogLeNet()).keys():
        raise CheckpointError(
            f"{os.fspath(path)} is of another version of flax_googlenet: its model has {sorted(config)}"
        )
    try:
        fields = {name: jnp.dtype(config[name]).type for name in ("dtype", "param_dtype")}
        if not (isinstance(config["num_classes"], int) and set(fields.values()) <= set(_DTYPES.values())):
            raise ValueError("num_classes, dtype or param_dtype is of no kind that a model has")
        model = GoogLeNet(**config | fields)
        tensors = {
            name: np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"])
            for name, view in safetensors.deserialize(data)
        }
    except (TypeError, ValueError, KeyError) as error:  # the sha256 is no secret: anyone can write it
        raise CheckpointError(f"{os.fspath(path)} holds no model of flax_googlenet: {error}") from error
    if dtype is not None:
        model = model.clone(dtype=dtype, param_dtype=dtype)
    for wanted in {model.dtype, model.param_dtype, *(tensor.dtype for tensor in tensors.values() if dtype is None)}:
        if jax.dtypes.canonicalize_dtype(wanted) != wanted:
            raise CheckpointError(
                f"{os.fspath(path)}: {jnp.dtype(wanted)} needs jax.config.update('jax_enable_x64', True); "
                "or load it with dtype=jax.numpy.float32"
            )
    shapes = _check_tensors(f"{os.fspath(path)}: the tensors", model, tensors)
    variables = {}
    for names, shape in shapes.items():
        tensor = tensors["/".join(names)]
        variables[names] = jnp.asarray(tensor, tensor.dtype if dtype is None else shape.dtype)
    return model, unflatten_dict(variables), content["metadata"], hashlib.sha256(data).hexdigest()


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the metadata that ``save`` was given; raises as ``load``."""
    return _read(path)[1]["metadata"]


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file beside its place, syncs it and renames it: afterwards the old file is there or the new one, whole.

    Raises:
        OSError: if it cannot be written; the old file is untouched then, and nothing is left beside it.
    """
    target = Path(os.path.realpath(path))  # a link stays a link, to the new contents
    if target.exists() and not target.is_file():  # a rename would replace a device or a pipe
        raise FileExistsError(errno.EEXIST, "it is there already and not a regular file", str(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_synced(beside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise


def replace_synced(source: Path, target: Path) -> None:
    """Renames ``source`` to ``target``, in the same directory, and waits until the disk has it."""
    os.replace(source, target)
    directory = os.open(target.parent, os.O_RDONLY)  # the rename itself reaches the disk with its directory
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _config(model: GoogLeNet) -> dict[str, Any]:
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.init}
    del fields["parent"], fields["name"], fields["frozen"]  # frozen is of a training, not of the network
    if isinstance(model.precision, jax.lax.Precision):
        fields["precision"] = model.precision.name.lower()
    elif not isinstance(model.precision, str | None):
        raise CheckpointError(f"precision {model.precision} cannot be stored: use None or a name such as 'highest'")
    return fields | {name: jnp.dtype(fields[name]).name for name in ("dtype", "param_dtype")}


def _read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    data = Path(path).read_bytes()
    _, stored, computed = _digest(data, path)
    if stored != computed:
        raise CheckpointError(f"{os.fspath(path)} is damaged: its sha256 is {computed}, and {stored} was stored in it")
    length = int.from_bytes(data[:8], "little")
    try:
        content = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["flax_googlenet"])
        if not (isinstance(content["model"], dict) and isinstance(content["metadata"], dict)):
            raise TypeError("model and metadata must be objects")
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{os.fspath(path)} holds no model of flax_googlenet: {error}") from error
    return data, content


def _digest(data: bytes, path: str | os.PathLike[str]) -> tuple[int, str, str]:
    """Where the digest stands in the file, the one that stands there, and the one that should."""
    header_end = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    match = _DIGEST.search(data, 8, header_end)
    if match is None:
        raise CheckpointError(
            f"{os.fspath(path)} is not a checkpoint of flax_googlenet, or is damaged: it has no sha256; "
            f"one of PyTorch's is ported with: python convert/port_weights.py {shlex.quote(os.fspath(path))}"
        )
    start, stop = match.span(1)
    view = memoryview(data)
    sha256 = hashlib.sha256(view[:start])
    sha256.update(_NO_DIGEST.encode())
    sha256.update(view[stop:])
    return start, match[1].decode(), sha256.hexdigest()


def _check_tensors(
    subject: str, model: GoogLeNet, tensors: Mapping[str, np.ndarray]
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Raises unless the tensors are those of the model; returns the shapes that it would initialise."""
    shapes = flatten_dict(variable_shapes(model))
    expected = {"/".join(names): shape.shape for names, shape in shapes.items()}
    known = {name: tensor for name, tensor in tensors.items() if name in expected}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrong shape": [
            f"{name} {tensor.shape}, expected {expected[name]}"
            for name, tensor in known.items()
            if tensor.shape != expected[name]
        ],
        "wrong dtype": [
            f"{name} {tensor.dtype}" for name, tensor in known.items() if tensor.dtype not in _DTYPES.values()
        ],
    }
    if any(problems.values()):
        listing = "\n".join(f"{kind}: {names}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{subject} are not those of {model.__class__.__name__}({_config(model)}):\n{listing}")
    return shapes
