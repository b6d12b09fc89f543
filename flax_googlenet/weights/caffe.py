"""Reads Caffe's files without Caffe: a file is refused, or gives exactly the weights it stores.

A ``.caffemodel`` is a message of Protocol Buffers: a network with layers, which have blobs of numbers.

Reference: https://github.com/BVLC/caffe/blob/master/src/caffe/proto/caffe.proto
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_googlenet.architecture import BRANCHES, WIDTHS
from flax_googlenet.model import GoogLeNet
from flax_googlenet.weights import protobuf
from flax_googlenet.weights.pickles import MAX_NAME, StateDictError
from flax_googlenet.weights.protobuf import (
    Reader,
    as_bytes,
    encode_varint,
    field,
    integer,
    integers,
    numbers,
)
from flax_googlenet.weights.pth import Checkpoint
from flax_googlenet.weights.torchvision import shapes_by_path, to_variables

_MAX_AXES = 32  # Caffe's kMaxBlobAxes

_HEADS = {"inception4a": ("loss1", "aux1"), "inception4d": ("loss2", "aux2")}
"""Block -> names of the auxiliary head that reads it, in Caffe and here."""

INPUT = "ImageNet-normalised RGB, which the network maps to BGR in [0, 255] minus (104, 117, 123)"
"""What the network's images are, for the metadata of files."""

_BVLC_CLASSIFIER = "ef057001349ecb54"
"""First digits of the SHA-256 digest of the last layer's weights in ``bvlc_googlenet.caffemodel``."""


class _Format(NamedTuple):
    """The numbers of the fields of a layer, and the types whose weights are read."""

    name: int
    type: int
    blobs: int
    convolution: int | bytes
    inner_product: int | bytes


_CONVOLUTION, _INNER_PRODUCT = b"Convolution", b"InnerProduct"
_FORMATS = {2: _Format(4, 5, 6, 4, 14), 100: _Format(1, 2, 7, _CONVOLUTION, _INNER_PRODUCT)}
"""Field of the network -> format of its layers: V1LayerParameter and LayerParameter."""


class _Layer(NamedTuple):
    name: str
    blobs: list[np.ndarray]
    """The weights and, if there is one, the bias, with PyTorch's axes."""


def from_caffe(path: str | os.PathLike[str]) -> tuple[GoogLeNet, dict[str, Any]]:
    """Read the paper's GoogLeNet from a ``.caffemodel``, without Caffe.

    Files of the network that Berkeley trained are read, with or without auxiliary heads and with any number of classes.
    Layers with other names are known by their order and their shapes. The network reads BGR pixels in [0, 255] minus
    (104, 117, 123), to which it maps the images itself. A file does not say whether its network was trained with
    another mean.

    Args:
        path: File to read.

    Returns:
        The model, which has ``variant="bvlc"`` and Berkeley's ``dropout=0.4``, and its variables: nested dicts of NumPy
        arrays in the dtypes of the file.

    Raises:
        StateDictError: If the file is damaged or of another kind.
        PortingError: If it holds another network. The message lists all tensors that are wrong.
        OSError: If the file cannot be read.

    Example::

        model, variables = flax_googlenet.from_caffe("bvlc_googlenet.caffemodel")
    """
    return network(os.fspath(path), read(path).state_dict)


def network(subject: str, state_dict: dict[str, np.ndarray], variant: str = "bvlc") -> tuple[GoogLeNet, dict[str, Any]]:
    """Return the network with the weights that ``read`` returned, and its variables.

    Args:
        subject: The name of the file in messages.
        state_dict: The weights.
        variant: The network, as for ``GoogLeNet``.

    Raises:
        PortingError: If they are not those of the network.
    """
    bias = state_dict.get("fc.bias", np.empty(1000, np.float32))
    has_aux = any(name.startswith(("aux1.", "aux2.")) for name in state_dict)
    model = GoogLeNet(
        variant=variant,
        num_classes=bias.size or 1000,
        aux_logits=has_aux,
        dropout=0.4,
        param_dtype=bias.dtype.type,
    )
    return model, to_variables(subject, state_dict, shapes_by_path(model))


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the weights of a ``.caffemodel`` under the names that PyTorch would give them, such as ``fc.weight``.

    Layers that are not of the network keep their names.

    Raises:
        StateDictError, OSError: For the same reasons as ``from_caffe``.
    """
    if_text = "this is text, such as a .prototxt: give the .caffemodel, which has the weights"
    return protobuf.read(path, ".caffemodel", _state_dict, if_text)


def encode(state_dict: Mapping[str, np.ndarray]) -> bytes:
    """Return a ``.caffemodel``, as Caffe has written them since 2014, with weights under the names of ``read``.

    Numbers of fewer than 32 bits are written as float32.
    """
    parts = [field(1, b"GoogleNet")]
    for name, module in _modules(has_aux="aux1.fc1.bias" in state_dict).items():
        arrays = [state_dict[f"{module}.{kind}"] for kind in ("weight", "bias")]
        kind = _CONVOLUTION if arrays[0].ndim == 4 else _INNER_PRODUCT
        blobs = b"".join(field(7, _encode_blob(array)) for array in arrays)
        parts.append(field(100, field(1, name.encode()) + field(2, kind) + blobs))
    return b"".join(parts)


def _encode_blob(array: np.ndarray) -> bytes:
    shape = field(7, field(1, b"".join(map(encode_varint, array.shape))))
    if array.dtype == np.float64:
        return shape + field(8, array.astype("<f8").tobytes())
    return shape + field(5, array.astype("<f4").tobytes())


def has_bvlc_classes(state_dict: dict[str, np.ndarray]) -> bool:
    """Return whether the classes are ImageNet's in torchvision's order: whether the last layer is Berkeley's own."""
    weight = np.ascontiguousarray(state_dict["fc.weight"])
    return hashlib.sha256(weight.data).hexdigest().startswith(_BVLC_CLASSIFIER)


def _state_dict(message: memoryview) -> tuple[dict[str, np.ndarray], str]:
    layers = list(_layers(message))
    if not layers:
        raise StateDictError(
            "it has no layers with weights, or is damaged; Caffe's upgrade_net_proto_binary upgrades files from 2013"
        )
    without_aux = _modules(has_aux=False)
    modules = _modules(has_aux=True) if len(layers) > len(without_aux) else without_aux
    names = [layer.name for layer in layers]
    if {*names} != {*modules} and len(names) == len(modules):
        names = list(modules)  # another author's names: the order decides, and the shapes are checked
    state_dict: dict[str, np.ndarray] = {}
    for name, layer in zip(names, layers, strict=True):
        for i, blob in enumerate(layer.blobs):
            key = f"{modules.get(name, name)}.{('weight', 'bias')[i] if i < 2 else f'blob{i}'}"
            if key in state_dict:
                raise StateDictError(f"it has two layers with the name {name[:60]}")
            state_dict[key] = blob
    return state_dict, "bvlc"


def _modules(has_aux: bool) -> dict[str, str]:
    """Return Caffe's names of the layers with weights, in the order of the file -> PyTorch's names."""
    modules = {"conv1/7x7_s2": "conv1.conv", "conv2/3x3_reduce": "conv2.conv", "conv2/3x3": "conv3.conv"}
    for block in WIDTHS:
        caffe_block = block.replace("inception", "inception_")
        for branch, (layer, _) in BRANCHES.items():
            modules[f"{caffe_block}/{layer}"] = f"{block}.{branch.replace('_', '.')}.conv"
        if has_aux and block in _HEADS:
            loss, head = _HEADS[block]
            modules |= {f"{loss}/conv": f"{head}.conv.conv", f"{loss}/fc": f"{head}.fc1"}
            modules[f"{loss}/classifier"] = f"{head}.fc2"
    return {**modules, "loss3/classifier": "fc"}


def _layers(network: memoryview) -> Iterator[_Layer]:
    """Yield the layers with weights, in the order of the file."""
    reader = Reader()
    for number, value in reader.fields(network):
        if number in _FORMATS:
            layer = _layer(reader, as_bytes(value), _FORMATS[number])
            if layer.blobs:
                yield layer


def _layer(reader: Reader, message: memoryview, fields: _Format) -> _Layer:
    name, kind, blobs = "", None, []
    for number, value in reader.fields(message):
        if number == fields.name:
            name = bytes(as_bytes(value)[: MAX_NAME + 1]).decode(errors="surrogateescape")
        elif number == fields.type:
            kind = bytes(value[:MAX_NAME]) if isinstance(value, memoryview) else value
        elif number == fields.blobs:
            blobs.append(_blob(reader, as_bytes(value)))
    if len(name) > MAX_NAME:
        raise StateDictError(f"a layer has a name of more than {MAX_NAME:,} characters")
    if kind not in (fields.convolution, fields.inner_product):
        return _Layer(name, [_in_shape(blob, 0) for blob in blobs])  # not a layer of the network
    axes = 4 if kind == fields.convolution else 2
    return _Layer(name, [_in_shape(blob, axes if i == 0 else 1) for i, blob in enumerate(blobs)])


def _blob(reader: Reader, message: memoryview) -> np.ndarray:
    """Return the values of a blob in the shape that the file says."""
    old_shape, shape, values = [1, 1, 1, 1], None, []
    for number, value in reader.fields(message):
        match number:
            case 1 | 2 | 3 | 4:  # num, channels, height and width
                old_shape[number - 1] = integer(value)
            case 5 | 8:
                values.append(numbers(as_bytes(value), "<f4" if number == 5 else "<f8"))
            case 7:
                shape = _shape(reader, as_bytes(value))
    shape = old_shape if shape is None else shape
    if len(values) != 1 or not 0 < math.prod(shape) == values[0].size:  # NumPy has no empty arrays of any shape
        sizes = " and ".join(f"{array.size:,}" for array in values[:2]) or "no"
        raise StateDictError(f"the file is damaged or cut off (a blob of shape {shape[:8]} has {sizes} values)")
    return values[0].reshape(shape)


def _shape(reader: Reader, message: memoryview) -> list[int]:
    shape: list[int] = []
    for number, value in reader.fields(message):
        if number == 1:
            shape += integers(value, _MAX_AXES)
        if len(shape) > _MAX_AXES:
            raise StateDictError(f"a blob has more than {_MAX_AXES} axes")
    return shape


def _in_shape(blob: np.ndarray, axes: int) -> np.ndarray:
    """Return a blob without the first axes of length 1 that files had until 2014, where every blob has four axes."""
    extra = blob.ndim - axes
    return blob.reshape(blob.shape[extra:]) if extra > 0 and set(blob.shape[:extra]) == {1} else blob
