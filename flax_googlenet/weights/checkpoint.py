"""Saves a model, its variables and metadata in one ``.safetensors`` file, atomically and with a checksum.

A tensor is named by its path in the variables, such as ``params/conv1/conv/kernel``. The metadata of the header has one
entry, ``flax_googlenet``: a JSON object with ``sha256``, ``version``, ``model`` and ``metadata``. The digest is
computed over the entire file, with zeros in place of its own 64 digits. It reveals any flipped bit in the tensors or
the header, which safetensors itself does not check. The same input gives the same bytes.

Earlier and later versions of this library read each other's files wherever both have the network. A field that a later
version adds to the model is stored only where it differs from its default. So a file without it holds a network that
every version has, and an unknown field means a network that this version does not have. All other unknown entries are
ignored.

Anybody can compute the digest, so it does not show where a file comes from. Everything in a file is checked when it is
read, and any problem raises a ``CheckpointError``.
"""

import dataclasses
import functools
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

from flax_googlenet.architecture import NETWORKS
from flax_googlenet.errors import GoogLeNetError, listing, well_formed
from flax_googlenet.files import read_regular_file, write_atomically
from flax_googlenet.images.preprocessing import CROP
from flax_googlenet.model import GoogLeNet, Variables, variable_shapes
from flax_googlenet.weights.checks import tensor_problems, with_problems
from flax_googlenet.weights.other_formats import refuse_other_files, who_reads
from flax_googlenet.weights.pickles import StateDictError

_DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}  # safetensors' names
_VERSION = 2  # of the format; a file of the first version does not state it, and is otherwise the same
_FIRST_FIELDS = {
    *("num_classes", "aux_logits", "transform_input", "dropout", "dropout_aux", "batch_norm"),
    *("dtype", "param_dtype", "precision"),
}
"""The fields of the model that every version has. They are always stored."""
_MAX_BYTES = 2**32  # the size of a file with 170,000 classes in float64
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MAX_TENSORS = 10_000  # GoogLeNet has 300; a header can name millions, which would take minutes and gigabytes
_MAX_IMAGE_SIZE = 2**13  # pixels; in a forged file an image size could ask for any amount of memory
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')  # JSON in JSON: the quotes are escaped


class CheckpointError(GoogLeNetError, ValueError):
    """A file that is not an intact checkpoint of this library, or variables that do not fit the model."""


class Weights(NamedTuple):
    """The contents of a file that ``save`` wrote."""

    model: GoogLeNet
    variables: dict[str, Any]
    metadata: dict[str, Any]
    sha256: str
    """SHA-256 digest of the file, in hexadecimal digits."""

    @property
    def digest(self) -> str:
        """First 16 digits of ``sha256``, which identify the weights in records of runs and results."""
        return self.sha256[:16]

    @property
    def class_names(self) -> list[str] | None:
        """Class names in the order of the logits, or None if the metadata has no valid ones."""
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
        min_size = NETWORKS[self.model.variant].min_size
        return size if type(size) is int and min_size <= size <= _MAX_IMAGE_SIZE else CROP


def save(
    path: str | os.PathLike[str], model: GoogLeNet, variables: Variables, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model, its variables and metadata to one ``.safetensors`` file.

    The file is written under a temporary name, synced and renamed: a kill leaves either the old file or the new one.

    Args:
        path: File to write.
        model: Network; its fields are stored.
        variables: Variables with the names and shapes of those from ``model.init``, in any floating dtypes.
        metadata: Anything that JSON can hold, by name, such as class names or the source of the weights. Tuples, and
            arrays and scalars of NumPy and JAX, are stored as lists and numbers. NaN and infinities are stored as null,
            because JSON does not have them. ``class_names``, if present and not None, is a list with one string for
            each class.

    Raises:
        CheckpointError: If names or shapes of the variables are not the model's, in a message that lists all of them;
            if a field of the model has a wrong value; if the class names are not one string for each class; or if the
            file would be too large to be read again, with more than 4 GiB or 100 MB of metadata.
        TypeError: If JSON cannot hold the metadata.
        OSError: If the file cannot be written. Nothing is left behind.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(model)}
    config = {
        name: value
        for name, value in _plain(_config(model)).items()
        if name in _FIRST_FIELDS or value != defaults[name]
    }
    try:
        _model(config)
    except ValueError as error:
        raise CheckpointError(f"the model cannot be stored: {error}") from error
    try:
        plain_metadata = _plain(dict(metadata or {}))
        # A single entry, because safetensors writes several in an order that changes from run to run.
        contents = {"sha256": _NO_DIGEST, "version": _VERSION, "model": config, "metadata": plain_metadata}
        content = json.dumps(contents, allow_nan=False)
        json.loads(content)
    except (ValueError, RecursionError) as error:  # it contains itself, or its nesting or a number is too long
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
    """Read the model and the variables in a file that ``save`` wrote.

    Args:
        path: File to read.
        dtype: Dtype of the computation and the parameters, in place of the stored ones: float64, float32, float16 or
            bfloat16, in any form that ``jax.numpy.dtype`` accepts, such as ``"bfloat16"``. BatchNorm statistics stay
            in float32 or float64. float64 needs ``jax.config.update("jax_enable_x64", True)``.

    Returns:
        The model with the stored fields, and its variables as JAX arrays on the default device.

    Raises:
        CheckpointError: If a single bit of the file is damaged, if ``save`` did not write it, if it holds a network
            that only a later version has, or if the stored or the requested dtype is float64 and JAX does not have 64
            bits enabled.
        OSError: If the file does not exist, is not a regular file or is larger than 4 GiB.

    Example::

        model, variables = flax_googlenet.load("googlenet.safetensors")
        logits = jax.jit(model.apply)(variables, images).logits
    """
    return _load(path, dtype)[:2]


def load_weights(path: str | os.PathLike[str], *, dtype: Dtype | None = None) -> Weights:
    """Read all that ``save`` wrote, with one reading of the file; the arguments are those of ``load``.

    Raises:
        CheckpointError: For the same reasons as ``load``, and if the file cannot be read at all.
    """
    try:
        return _load(path, dtype)
    except OSError as error:
        raise CheckpointError(f"cannot read {os.fspath(path)}: {error.strerror}") from error


def require_finite(path: str | os.PathLike[str], weights: Weights) -> None:
    """Raise a CheckpointError if a weight is not finite, which pictures and features might hide."""
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(weights.variables)):
        raise CheckpointError(f"{os.fspath(path)} is damaged: some of its weights are not finite")


def _load(path: str | os.PathLike[str], dtype: Dtype | None) -> Weights:
    if dtype is not None:
        dtype = _float_dtype(dtype)
    data, content = _read(path)
    config = content["model"]
    if unknown := sorted(config.keys() - _config(GoogLeNet()).keys()):
        fields = listing(f"{name}={config[name]!r}"[:50] for name in unknown)
        raise CheckpointError(
            f"{os.fspath(path)} holds a network with {fields}, which this version of flax_googlenet does not have: "
            f"install a newer one (the file has format {str(content.get('version', 1))[:20]}, and this is {_VERSION})"
        )
    try:
        model = _model(config)
        tensors = {
            name: np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"])
            for name, view in safetensors.deserialize(data)
        }
        bias = tensors.get("params/fc/bias")
        if bias is None or bias.shape != (model.num_classes,):  # checked before shapes of any size are computed
            raise ValueError(f"num_classes is {model.num_classes}, but params/fc/bias has a different length")
    except Exception as error:  # safetensors raises its own exception, and NumPy several for sizes beyond 64 bits
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
    return Weights(model, unflatten_dict(variables), content["metadata"], hashlib.sha256(data).hexdigest())


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata in a file that ``save`` wrote; raises the same errors as ``load``."""
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
    """Return the network of a stored configuration, with defaults for the fields that earlier versions did not have.

    Raises:
        ValueError: If a field has a wrong value.
    """
    fields = _config(GoogLeNet()) | config
    dtypes = {jnp.dtype(dtype).name: jnp.dtype(dtype).type for dtype in _DTYPES.values()}
    is_right = {
        "variant": lambda value: isinstance(value, str) and value in NETWORKS,
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
    """Convert a value to lists, dicts and Python's numbers, with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {name: _plain(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_class_names(names: Any, num_classes: int) -> None:
    """Raise CheckpointError unless ``names`` is None or a list with one string for each class."""
    if names is None:
        return
    if not isinstance(names, list):
        raise CheckpointError(f"class_names must be a list of {num_classes} strings, got a {type(names).__name__}")
    if len(names) != num_classes:
        raise CheckpointError(f"class_names must have one name for each of the {num_classes} classes, got {len(names)}")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise CheckpointError(f"class_names must be strings, but that of class {index} is {name!r}")


def _read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    data = read_regular_file(path, _MAX_BYTES)
    _, stored, computed = _digest(data, path)
    if stored != computed:
        raise CheckpointError(f"{os.fspath(path)} is damaged: its sha256 is {computed}, not {stored} as stored in it")
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
    """Return the offset of the digest in the file, the digest stored there, and the correct one."""
    header_end = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    match = _DIGEST.search(data, 8, header_end)
    if match is None:
        try:
            refuse_other_files(data[:512])
        except StateDictError as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}") from error
        raise CheckpointError(
            f"{os.fspath(path)} is not a checkpoint of flax_googlenet, or is damaged: it has no sha256; "
            f"{who_reads(path)}, and convert/port_weights.py, in the repository of this project, writes and proves its "
            f"port: python convert/port_weights.py {shlex.quote(os.fspath(path))}"
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
    """Return the shapes of the model's variables by path, or raise CheckpointError if the tensors do not have them."""
    matrix = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(functools.partial(jax.lax.dot, precision=model.precision), matrix, matrix)
    except (TypeError, ValueError) as error:  # a precision that JAX does not have
        raise CheckpointError(f"{subject} belong to a network that JAX cannot build: {error}") from error
    shapes = flatten_dict(variable_shapes(model))
    expected = {"/".join(names): shape.shape for names, shape in shapes.items()}
    problems = tensor_problems(tensors, expected)
    problems["wrong dtype"] = [
        f"{name} {tensor.dtype}"
        for name, tensor in tensors.items()
        if name in expected and tensor.dtype not in _DTYPES.values()
    ]
    if any(problems.values()):
        raise CheckpointError(with_problems(f"{subject} do not fit GoogLeNet({_config(model)}):", problems))
    return shapes
