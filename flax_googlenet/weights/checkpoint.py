"""One ``.safetensors`` file for a model's configuration, its variables and free metadata; atomic and checksummed.

The tensors are named by their path in the variables, ``params/conv1/conv/kernel``. The header's metadata has one entry,
``flax_googlenet``: a JSON object of ``sha256``, ``model`` and ``metadata``. The digest is that of the whole file with
its own 64 digits read as zeros. safetensors has no checksum of its own; with this one any flipped bit is noticed, in
the tensors or the header. The same input makes the same bytes.

The digest is no secret: a file that somebody else has made may have the right one and any contents. So everything that
is read is checked, and whatever is wrong with it is a ``CheckpointError``.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype
from jax import numpy as jnp

from flax_googlenet.errors import GoogLeNetError, well_formed
from flax_googlenet.files import read_regular_file, write_atomically
from flax_googlenet.images.preprocessing import CROP
from flax_googlenet.model import MIN_SIZE, GoogLeNet, Variables, variable_shapes

_DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}  # safetensors' names
_MAX_BYTES = 2**32  # of a file; GoogLeNet with 170,000 classes in float64 has as many
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MAX_TENSORS = 10_000  # GoogLeNet has 300; a header has room for millions, which would take minutes and gigabytes
_MAX_IMAGE_SIZE = 2**13  # pixels; in a forged file an image size could ask for any amount of memory
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')  # JSON in JSON: the quotes are escaped


class CheckpointError(GoogLeNetError, ValueError):
    """A file that is not a whole checkpoint of this library, or a model and variables that do not belong together."""


class Weights(NamedTuple):
    """The contents of a file that ``save`` wrote."""

    model: GoogLeNet
    variables: dict[str, Any]
    metadata: dict[str, Any]
    digest: str
    """The first 16 hexadecimal digits of the file's sha256."""

    @property
    def class_names(self) -> list[str] | None:
        """The name of each class, or None if the metadata has no class names, or something else in their place."""
        names = self.metadata.get("class_names")
        try:
            check_class_names(names, self.model.num_classes)
        except CheckpointError:
            return None
        return names and list(map(well_formed, names))

    @property
    def image_size(self) -> int:
        """Height and width of the training images in pixels, or 224 if the metadata has no recipe of a run."""
        recipe = self.metadata.get("recipe")
        size = recipe.get("image_size") if isinstance(recipe, dict) else None
        return size if type(size) is int and MIN_SIZE <= size <= _MAX_IMAGE_SIZE else CROP


def save(
    path: str | os.PathLike[str], model: GoogLeNet, variables: Variables, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a model, its variables and metadata to one ``.safetensors`` file.

    The file is written beside its place, synced and renamed: a kill at any moment leaves the old file or the new one.

    Args:
        path: the file to write.
        model: the network; its fields are stored.
        variables: exactly the variables that ``model.init`` makes, of any floating dtype.
        metadata: anything that JSON can hold, by name: class names, the source of the weights, ... Arrays and scalars
            of NumPy and JAX and tuples are stored as JSON's lists and numbers, and NaN and infinities as null, because
            JSON has none. ``class_names``, if it is there and not None, is a list of one string for each class.

    Raises:
        CheckpointError: if the variables are not the model's, by names and shapes; the message lists all that differ.
            If the model has a field of a wrong kind or the class names are not one string for each class. If the file
            would be too large to be read again: more than 4 GiB, or 100 MB of metadata.
        TypeError: if the metadata is not for JSON.
        OSError: if the file cannot be written; nothing is left behind then.
    """
    config = _plain(_config(model))
    try:
        _model(config)
    except ValueError as error:
        raise CheckpointError(f"the model cannot be stored: {error}") from error
    try:
        plain_metadata = _plain(dict(metadata or {}))
        # One entry: safetensors writes several in an order that changes from run to run.
        content = json.dumps({"sha256": _NO_DIGEST, "model": config, "metadata": plain_metadata}, allow_nan=False)
        json.loads(content)
    except (ValueError, RecursionError) as error:  # it holds itself, is nested too deep, or has an endless number
        raise CheckpointError(f"the metadata cannot be stored: {error}") from error
    check_class_names(plain_metadata.get("class_names"), model.num_classes)
    tensors = {"/".join(names): np.ascontiguousarray(value) for names, value in flatten_dict(dict(variables)).items()}
    _check_tensors("the variables", model, tensors)
    data = safetensors.numpy.save(tensors, {"flax_googlenet": content})
    if len(data) > _MAX_BYTES or int.from_bytes(data[:8], "little") > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{os.fspath(path)} would be too large to be read again: {len(data):,} bytes")
    start, _, digest = _digest(data, path)
    write_atomically(path, data[:start] + digest.encode() + data[start + len(digest) :])


def load(path: str | os.PathLike[str], *, dtype: Dtype | None = None) -> tuple[GoogLeNet, dict[str, Any]]:
    """Reads what ``save`` wrote: the model and its variables.

    Args:
        path: the file.
        dtype: the dtype of the computation and the parameters, instead of the stored ones: float64, float32, float16 or
            bfloat16, as anything that ``jax.numpy.dtype`` understands, such as ``"bfloat16"``. BatchNorm statistics
            stay in float32 at least. float64 needs ``jax.config.update("jax_enable_x64", True)``.

    Returns:
        The model with the stored fields, and its variables as JAX arrays on the default device.

    Raises:
        CheckpointError: if the file is damaged, in as little as one bit, or was not written by ``save``, or if its
            dtype or the one asked for is 64 bits wide and JAX has 64 bits off.
        OSError: if there is no such file, or if it is not a regular file or larger than 4 GiB.

    Example::

        model, variables = flax_googlenet.load("googlenet.safetensors")
        logits = jax.jit(model.apply)(variables, images).logits
    """
    return _load(path, dtype)[:2]


def load_weights(path: str | os.PathLike[str], *, dtype: Dtype | None = None) -> Weights:
    """Read all that ``save`` wrote, with one reading of the file; the arguments are those of ``load``.

    Raises:
        CheckpointError: for the same reasons as ``load``, and if the file cannot be read at all.
    """
    try:
        return _load(path, dtype)
    except OSError as error:
        raise CheckpointError(f"cannot read {os.fspath(path)}: {error.strerror}") from error


def _load(path: str | os.PathLike[str], dtype: Dtype | None) -> Weights:
    if dtype is not None:
        dtype = _float_dtype(dtype)
    data, content = _read(path)
    config = content["model"]
    if config.keys() - _config(GoogLeNet()).keys():
        raise CheckpointError(
            f"{os.fspath(path)} is of another version of flax_googlenet: its model has {sorted(config)}"
        )
    try:
        model = _model(config)
        tensors = {
            name: np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"])
            for name, view in safetensors.deserialize(data)
        }
        bias = tensors.get("params/fc/bias")
        if bias is None or bias.shape != (model.num_classes,):  # before shapes of any size are computed
            raise ValueError(f"num_classes is {model.num_classes}, and params/fc/bias has not as many values")
    except Exception as error:  # safetensors has an exception of its own, and NumPy several for sizes beyond 64 bits
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
    return Weights(model, unflatten_dict(variables), content["metadata"], hashlib.sha256(data).hexdigest()[:16])


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the metadata that ``save`` was given; raises the same errors as ``load``."""
    return _read(path)[1]["metadata"]


def _config(model: GoogLeNet) -> dict[str, Any]:
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.init}
    del fields["parent"], fields["name"]
    if isinstance(model.precision, jax.lax.Precision):
        fields["precision"] = model.precision.name.lower()
    elif not isinstance(model.precision, str | None):
        raise CheckpointError(f"precision {model.precision} cannot be stored: use None or a name such as 'highest'")
    return fields | {name: jnp.dtype(_float_dtype(fields[name])).name for name in ("dtype", "param_dtype")}


def _model(config: dict[str, Any]) -> GoogLeNet:
    """Returns the network of a stored configuration. A field that an earlier version did not store gets its default.

    Raises:
        ValueError: if a field has a value of the wrong kind.
    """
    fields = _config(GoogLeNet()) | config
    dtypes = {jnp.dtype(dtype).name: jnp.dtype(dtype).type for dtype in _DTYPES.values()}
    is_right = {
        "num_classes": lambda value: type(value) is int and value > 0,
        "precision": lambda value: value is None or isinstance(value, str),
        **dict.fromkeys(("aux_logits", "transform_input", "batch_norm"), lambda value: value in (True, False)),
        **dict.fromkeys(("dropout", "dropout_aux"), lambda value: type(value) in (int, float) and 0 <= value <= 1),
        **dict.fromkeys(("dtype", "param_dtype"), lambda value: isinstance(value, str) and value in dtypes),
    }
    if wrong := [name for name, value in fields.items() if not is_right[name](value)]:
        raise ValueError(", ".join(f"{name} cannot be {str(fields[name])[:50]!r}" for name in wrong))
    return GoogLeNet(**fields | {name: dtypes[fields[name]] for name in ("dtype", "param_dtype")})


def _float_dtype(dtype: Dtype) -> Dtype:
    with suppress(TypeError):
        if (found := jnp.dtype(dtype).type) in _DTYPES.values():
            return found
    raise CheckpointError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")


def _plain(value: Any) -> Any:
    """Returns the value in lists, dicts and Python's own numbers, and None for NaN and infinities, which JSON lacks."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {name: _plain(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_class_names(names: Any, num_classes: int) -> None:
    """Raises CheckpointError unless ``names`` is None or a list of one string for each class."""
    if names is None:
        return
    if not isinstance(names, list):
        raise CheckpointError(f"class_names must be a list of {num_classes} strings, got a {type(names).__name__}")
    if len(names) != num_classes:
        raise CheckpointError(f"class_names must have one name for each of the {num_classes} classes, got {len(names)}")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise CheckpointError(f"class_names must be strings, and that of class {index} is {name!r}")


def _read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    data = read_regular_file(path, _MAX_BYTES)
    _, stored, computed = _digest(data, path)
    if stored != computed:
        raise CheckpointError(f"{os.fspath(path)} is damaged: its sha256 is {computed}, and {stored} was stored in it")
    length = int.from_bytes(data[:8], "little")
    try:
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes")
        header = json.loads(data[8 : 8 + length])
        if len(header) > _MAX_TENSORS:
            raise ValueError(f"it has {len(header):,} tensors")
        content = json.loads(header["__metadata__"]["flax_googlenet"])
        if not (isinstance(content["model"], dict) and isinstance(content["metadata"], dict)):
            raise TypeError("model and metadata must be objects")
    except (TypeError, ValueError, KeyError, RecursionError) as error:
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
    try:
        shapes = flatten_dict(variable_shapes(model))
    except (TypeError, ValueError) as error:  # a precision that JAX does not have
        raise CheckpointError(f"{subject} are of a network that JAX cannot make: {error}") from error
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
