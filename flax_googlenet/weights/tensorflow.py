"""Reads Google's GoogLeNet from a GraphDef without TensorFlow: a file is refused, or gives exactly its weights.

A GraphDef is a message of Protocol Buffers: nodes with a name, an operation and attributes. A node of the operation
``Const`` has a tensor. Google's file is ``tensorflow_inception_graph.pb`` in ``inception5h.zip``, from 2015. It was not
at hand and has never been read here. Its names, shapes and operations are taken from the programs that read it. So the
operations are checked, too: a file that computes another function is refused.

References:
    https://github.com/tensorflow/tensorflow/tree/master/tensorflow/core/framework, graph.proto and what it imports
    https://github.com/tensorflow/tensorflow/blob/v1.0.0/tensorflow/examples/tutorials/deepdream/deepdream.ipynb
"""

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from flax_googlenet.architecture import BRANCHES, NETWORKS, WIDTHS
from flax_googlenet.errors import listing
from flax_googlenet.model import GoogLeNet
from flax_googlenet.weights import caffe, protobuf
from flax_googlenet.weights.layouts import MAX_BYTES
from flax_googlenet.weights.pickles import MAX_AXES, MAX_NAME, StateDictError
from flax_googlenet.weights.protobuf import Reader, as_bytes, integer, integers, numbers, part
from flax_googlenet.weights.pth import Checkpoint
from flax_googlenet.weights.torchvision import TORCH_AXES

INPUT = "ImageNet-normalised RGB, which the network maps to RGB in [0, 255] minus 117"
"""What the network's images are, for the metadata of files."""

_DTYPES = {1: "<f4", 2: "<f8"}
"""DT_FLOAT and DT_DOUBLE. Constants of other dtypes are shapes and axes."""

_LRN_DEFAULTS = {"depth_radius": 5, "bias": 1.0, "alpha": 1.0, "beta": 0.5}
"""What TensorFlow takes for attributes that a node does not have."""

_KINDS = {"w": "weight", "b": "bias"}
_FC1_SHAPE = (4 * 4 * 128, 1024)  # TensorFlow flattens the channels last, PyTorch first


class _Node(NamedTuple):
    name: str
    operation: bytes
    attributes: dict[bytes, memoryview]


def from_tensorflow(path: str | os.PathLike[str]) -> tuple[GoogLeNet, dict[str, Any]]:
    """Read Google's GoogLeNet, the network of DeepDream and Lucid, from a frozen GraphDef, without TensorFlow.

    The file is ``tensorflow_inception_graph.pb`` of ``inception5h.zip``, or has the same nodes with other weights, with
    or without auxiliary heads and with any number of classes. The network reads RGB pixels in [0, 255] minus 117, to
    which it maps the images itself. Google's own file has 1008 classes in an order of its own.

    This reader was tested with TensorFlow on files of random weights, but never with Google's own file.

    Args:
        path: File to read.

    Returns:
        The model, which has ``variant="inception5h"`` and the paper's ``dropout=0.4``, and its variables: nested dicts
        of NumPy arrays in the dtypes of the file.

    Raises:
        StateDictError: If the file is damaged or of another kind, or if its operations are those of another network.
        PortingError: If it holds the weights of another network. The message lists all tensors that are wrong.
        OSError: If the file cannot be read.

    Example::

        model, variables = flax_googlenet.from_tensorflow("tensorflow_inception_graph.pb")
    """
    return caffe.network(os.fspath(path), read(path).state_dict, "inception5h")


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the weights of a GraphDef under the names, and with the axes, that PyTorch would give them.

    Constants that are not of the network keep their names.

    Raises:
        StateDictError, OSError: For the same reasons as ``from_tensorflow``.
    """
    if_text = "this is text, such as a .pbtxt: give the .pb, which has the weights"
    return protobuf.read(path, ".pb", _state_dict, if_text)


def _state_dict(graph: memoryview) -> tuple[dict[str, np.ndarray], str]:
    reader, modules = Reader(), _modules()
    state_dict: dict[str, np.ndarray] = {}
    differences: list[str] = []
    for node in _nodes(reader, graph):
        differences += _differences(reader, node)
        array = _constant(reader, node) if node.operation == b"Const" else None
        if array is None:
            continue
        layer, _, kind = node.name.rpartition("_")
        key = f"{modules[layer]}.{_KINDS[kind]}" if layer in modules and kind in _KINDS else node.name
        if key in state_dict:
            raise StateDictError(f"it has two nodes with the name {node.name[:60]}")
        if layer in ("nn0", "nn1") and array.shape == _FC1_SHAPE:
            array = array.reshape(4, 4, 128, 1024).transpose(2, 0, 1, 3).reshape(_FC1_SHAPE)
        state_dict[key] = array.transpose(TORCH_AXES.get(array.ndim, range(array.ndim)))
    if not state_dict:
        raise StateDictError("it has no nodes with weights: it is not a frozen GraphDef, or is damaged")
    if differences:
        raise StateDictError(f"its operations are not those of inception5h: {listing(differences, 3)}")
    return state_dict, "inception5h"


def _modules() -> dict[str, str]:
    """Return Google's names of the layers with weights -> PyTorch's names."""
    modules = {"conv2d0": "conv1.conv", "conv2d1": "conv2.conv", "conv2d2": "conv3.conv", "softmax2": "fc"}
    for block in WIDTHS:
        for branch, (_, layer) in BRANCHES.items():
            name = f"{block.replace('inception', 'mixed')}_{layer}"
            modules[name] = f"{block}.{branch.replace('_', '.')}.conv"
    for i, head in enumerate(("aux1", "aux2")):
        modules |= {f"head{i}_bottleneck": f"{head}.conv.conv", f"nn{i}": f"{head}.fc1", f"softmax{i}": f"{head}.fc2"}
    return modules


def _nodes(reader: Reader, graph: memoryview) -> Iterator[_Node]:
    """Yield the nodes of a GraphDef in the order of the file."""
    for number, value in reader.fields(graph):
        if number == 1:
            node = reader.message(as_bytes(value))
            name = bytes(part(node, 1)[: MAX_NAME + 1]).decode(errors="surrogateescape")
            if len(name) > MAX_NAME:
                raise StateDictError(f"a node has a name of more than {MAX_NAME:,} characters")
            entries = [reader.message(as_bytes(entry)) for entry in node[5]]
            attributes = {bytes(part(entry, 1)[:MAX_NAME]): part(entry, 2) for entry in entries}
            yield _Node(name, bytes(part(node, 2)[:MAX_NAME]), attributes)


def _constant(reader: Reader, node: _Node) -> np.ndarray | None:
    """Return the tensor of a ``Const``, or None if its numbers are not float32 or float64."""
    tensor = reader.message(part(reader.message(node.attributes.get(b"value", memoryview(b""))), 8))
    if not tensor[1] or tensor[1][-1] not in _DTYPES:
        return None
    dims = [reader.message(as_bytes(dim)) for dim in reader.message(part(tensor, 2))[2]]
    if len(dims) > MAX_AXES:
        raise StateDictError(f"a tensor has more than {MAX_AXES} axes")
    shape = [integer(dim[1][-1]) if dim[1] else 0 for dim in dims]
    content = tensor[4] or tensor[5] or tensor[6]  # tensor_content, float_val or double_val
    values = numbers(memoryview(b"".join(map(as_bytes, content))), _DTYPES[tensor[1][-1]])
    # A single value stands for all. It is not copied, so that a file cannot claim memory that it does not have itself.
    if not 0 < math.prod(shape) <= MAX_BYTES or values.size not in (1, math.prod(shape)):
        raise StateDictError(
            f"the file is damaged or cut off (a tensor of shape {shape[:8]} has {values.size:,} values)"
        )
    return values.reshape(shape) if values.size > 1 else np.broadcast_to(values, shape)


def _differences(reader: Reader, node: _Node) -> list[str]:
    """Return what sets a convolution, a max pool or a response normalisation apart from those of the network."""
    stride = 2 if node.name.startswith(("conv2d0_", "maxpool")) else 1
    same: dict[str, Any] = {"strides": [1, stride, stride, 1], "padding": b"SAME"}
    norm = NETWORKS["inception5h"].response_norm
    expected: dict[str, Any] = {}
    match node.operation:
        case b"Conv2D":
            expected = same
        case b"MaxPool":
            expected = same | {"ksize": [1, 3, 3, 1]}
        case b"LRN" if norm:
            expected = {"depth_radius": norm.radius, "bias": norm.k, "alpha": norm.alpha, "beta": norm.beta}
    differences = []
    for name, right in expected.items():
        attribute = node.attributes.get(name.encode())
        found = _LRN_DEFAULTS.get(name) if attribute is None else _value(reader, attribute)
        if found != (float(np.float32(right)) if isinstance(right, float) else right):
            differences.append(f"{node.name[:60]} has the {name} {found}, not {right}")
    return differences


def _value(reader: Reader, attribute: memoryview) -> Any:
    """Return the value of an attribute: bytes, an integer, a float or a list of integers."""
    for number, value in reader.fields(attribute):
        match number:
            case 1:
                return [size for part in reader.message(as_bytes(value))[3][:5] for size in integers(part, most=4)]
            case 2:
                return bytes(as_bytes(value)[:20])
            case 3:
                return integer(value)
            case 4:
                return float(numbers(as_bytes(value), "<f4")[0])
    return None
