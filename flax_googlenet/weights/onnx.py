"""Reads the paper's GoogLeNet from an ONNX model, without the package ``onnx``: what the file computes, or nothing.

ONNX's model zoo has Berkeley's network twice, exported by Caffe2: ``bvlc_googlenet`` with the windows of Caffe's max
pools, and ``inception_v1`` with max pools that round down. An ONNX model is a message of Protocol Buffers: a graph of
nodes, each with an operation, attributes and the names of the values that it reads and writes. The reader follows the
graph from its output to its input, so that neither names nor the order of the weights matter, and refuses a graph with
other operations.

The zoo's files were not at hand and have never been read here. Their content is known from programs that print them.

References:
    https://github.com/onnx/onnx/blob/main/onnx/onnx.proto and docs/Operators.md
    https://github.com/onnx/models/tree/main/validated/vision/classification/inception_and_googlenet
    https://github.com/onnx/models/issues/11
"""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_googlenet.architecture import WIDTHS
from flax_googlenet.errors import listing
from flax_googlenet.model import GoogLeNet
from flax_googlenet.weights import caffe, protobuf
from flax_googlenet.weights.pickles import MAX_AXES, MAX_NAME, StateDictError
from flax_googlenet.weights.protobuf import Reader, as_bytes, integer, integers, numbers, part
from flax_googlenet.weights.pth import Checkpoint

FLOOR_POOLS = "the max pools round their sizes down, so that the answers differ from those of Berkeley's network"
"""How ``inception_v1`` differs, for notes and the metadata of files."""

_DTYPES = {1: ("<f4", 4), 11: ("<f8", 10)}
"""FLOAT and DOUBLE -> the numbers in memory, and the field that lists them where there are no raw bytes."""

_FLOAT, _INT = 1, 2
"""Types of attributes."""

_POOL = {"auto_pad": "NOTSET", "ceil_mode": 0, "dilations": [1, 1], "pads": [0] * 4, "strides": [1, 1]}
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "AveragePool": _POOL | {"count_include_pad": 0},
    "Concat": {"axis": 1},
    "Conv": {"auto_pad": "NOTSET", "dilations": [1, 1], "group": 1, "pads": [0] * 4, "strides": [1, 1]},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "LRN": {"alpha": 1e-4, "beta": 0.75, "bias": 1.0},
    "MaxPool": _POOL,
}
"""Operation -> the attributes that change what it computes, with the values that ONNX takes where there are none."""


class _Node(NamedTuple):
    operation: str
    inputs: list[str]
    attributes: dict[str, Any]


def from_onnx(path: str | os.PathLike[str]) -> tuple[GoogLeNet, dict[str, Any]]:
    """Read the paper's GoogLeNet from a file of ONNX's model zoo, without the package ``onnx``.

    The zoo has Berkeley's network as ``bvlc_googlenet`` and as ``inception_v1``. The latter has max pools that round
    their sizes down, so that it gives other answers: it is the variant ``"bvlc_floor"``. Files with the same operations
    and other weights are read, too, with any number of classes. The network reads BGR pixels in
    [0, 255] minus (104, 117, 123), to which it maps the images itself. A file does not say whether its network was
    trained with another mean. The network returns logits, where the files return probabilities.

    This reader was tested with ONNX Runtime on files that were made as the zoo's are, but never with the zoo's own.

    Args:
        path: File to read. Its weights must be inside it.

    Returns:
        The model, which has ``variant="bvlc"`` or ``"bvlc_floor"`` and Berkeley's ``dropout=0.4``, and its variables:
        nested dicts of NumPy arrays in the dtypes of the file.

    Raises:
        StateDictError: If the file is damaged or of another kind, or if its operations are those of another network.
        PortingError: If it holds the weights of another network. The message lists all tensors that are wrong.
        OSError: If the file cannot be read.

    Example::

        model, variables = flax_googlenet.from_onnx("googlenet-9.onnx")
    """
    checkpoint = read(path)
    return caffe.network(os.fspath(path), checkpoint.state_dict, checkpoint.variant)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the weights of an ONNX model under the names that PyTorch would give them, and find its variant.

    Raises:
        StateDictError, OSError: For the same reasons as ``from_onnx``.
    """
    if_text = "this is text, such as a .json: give the .onnx, which has the weights"
    checkpoint = protobuf.read(path, ".onnx", _network, if_text)
    return checkpoint._replace(notes=[FLOOR_POOLS]) if checkpoint.variant == "bvlc_floor" else checkpoint


def _network(model: memoryview) -> tuple[dict[str, np.ndarray], str]:
    """Return the weights of a model, and its variant."""
    graph = _Graph(model)
    # From the output to the input: each call takes the value that a layer writes, and returns the one that it reads.
    x = graph.dense("fc", graph.skip(graph.output, "Softmax"))
    x = graph.average_pool("avgpool", graph.skip(x, "Flatten", "Reshape", "Dropout"))
    for block in reversed(WIDTHS):
        x = graph.inception(block, x)
        if pool := {"inception5a": "maxpool4", "inception4a": "maxpool3"}.get(block):
            x = graph.max_pool(pool, x)
    x = graph.response_norm("norm2", graph.max_pool("maxpool2", x))
    x = graph.conv("conv2", graph.conv("conv3", x, size=3))
    x = graph.max_pool("maxpool1", graph.response_norm("norm1", x))
    x = graph.conv("conv1", x, size=7, stride=2)
    if x not in graph.inputs:
        graph.differences.append(f"conv1 reads {graph.source(x)}, not the images")
    if graph.differences:
        raise _other_network(listing(graph.differences, 3))
    return graph.weights, graph.variant()


class _Graph:
    """The nodes and tensors of a model, and what the way through them has found."""

    def __init__(self, model: memoryview) -> None:
        self._reader = Reader()
        graph = self._reader.message(part(self._reader.message(model), 7))
        self.nodes: dict[str, _Node] = {}
        """Name of a value -> the node that writes it."""
        for fields in map(self._reader.message, map(as_bytes, graph[1])):
            if fields[1] and fields[2]:  # it reads and writes values
                self.nodes[_name(fields[2][0])] = self._node(fields)
        tensors = [self._reader.message(as_bytes(tensor)) for tensor in graph[5]]
        self._tensors = {_name(part(tensor, 8)): tensor for tensor in tensors}
        if not (self.nodes and self._tensors and graph[12]):
            raise StateDictError("it has no graph with weights and an output: it is not an ONNX model, or is damaged")
        inputs = {_name(part(self._reader.message(as_bytes(value)), 1)) for value in graph[11]}
        self.inputs = inputs - {*self._tensors}  # files with ir_version 3 list the weights as inputs, too
        self.output = _name(part(self._reader.message(as_bytes(graph[12][0])), 1))
        self.weights: dict[str, np.ndarray] = {}
        self.differences: list[str] = []
        self._pools: dict[str, _Node] = {}

    def _node(self, fields: Mapping[int, list[int | memoryview]]) -> _Node:
        attributes = [self._reader.message(as_bytes(attribute)) for attribute in fields[5]]
        domain, operation = _name(part(fields, 7)), _name(part(fields, 4))
        return _Node(
            operation if domain in ("", "ai.onnx") else f"{domain}.{operation}",
            [_name(value) for value in fields[1]],
            {_name(part(attribute, 1)): _value(attribute) for attribute in attributes},
        )

    def source(self, value: str) -> str:
        """Return in words where a value comes from."""
        if value in self.nodes:
            return f"the result of {self.nodes[value].operation[:60]}"
        return "the input" if value in self.inputs else "a constant or a second result of a node"

    def skip(self, value: str, *operations: str) -> str:
        """Return the value that the nodes of these operations start from; each of them may be missing."""
        for operation in operations:
            if value in self.nodes and self.nodes[value].operation == operation:
                value = self.nodes[value].inputs[0]
        return value

    def dense(self, stage: str, value: str) -> str:
        return self._take(stage, self._step(stage, "Gemm", value, transB=1))

    def conv(self, stage: str, value: str, size: int = 1, stride: int = 1) -> str:
        value = self._step(stage, "Relu", value).inputs[0]
        node = self._step(stage, "Conv", value, pads=[size // 2] * 4, strides=[stride] * 2)
        return self._take(f"{stage}.conv", node)

    def inception(self, block: str, value: str) -> str:
        branches = self._step(block, "Concat", value).inputs
        if len(branches) != 4:
            raise _other_network(f"{block} has {len(branches)} branches, not 4")
        branch4 = self.conv(f"{block}.branch4.1", branches[3])
        starts = {
            self.conv(f"{block}.branch1", branches[0]),
            self.conv(f"{block}.branch2.0", self.conv(f"{block}.branch2.1", branches[1], size=3)),
            self.conv(f"{block}.branch3.0", self.conv(f"{block}.branch3.1", branches[2], size=5)),
            self._step(f"{block}.branch4.0", "MaxPool", branch4, kernel_shape=[3, 3], pads=[1] * 4).inputs[0],
        }
        if len(starts) > 1:
            raise _other_network(f"the branches of {block} read different values")
        return starts.pop()

    def response_norm(self, stage: str, value: str) -> str:
        return self._step(stage, "LRN", value, size=5).inputs[0]

    def max_pool(self, stage: str, value: str) -> str:
        return self._pool(stage, "MaxPool", value, kernel_shape=[3, 3], strides=[2, 2])

    def average_pool(self, stage: str, value: str) -> str:
        return self._pool(stage, "AveragePool", value, kernel_shape=[7, 7])

    def _pool(self, stage: str, operation: str, value: str, **expected: Any) -> str:
        """Keep a pool for ``variant``, which looks at how it rounds."""
        pool = self._pools[stage] = self._step(stage, operation, value, pads=None, ceil_mode=None, **expected)
        pads = pool.attributes.get("pads", [0] * 4)
        if not isinstance(pads, list) or len(pads) != 4 or pads[:2] != [0, 0] or min(pads) < 0:
            self.differences.append(
                f"{stage} has the pads {pads}, which should be 0 before the values, and not negative"
            )
        return pool.inputs[0]

    def _step(self, stage: str, operation: str, value: str, **expected: Any) -> _Node:
        """Return the node that writes a value, which must have this operation and these attributes (None: any)."""
        node = self.nodes.get(value)
        if node is None or node.operation != operation:
            raise _other_network(
                f"{stage} should be the result of {operation}, and {value[:60]} is {self.source(value)}"
            )
        for name, right in (_ATTRIBUTES.get(operation, {}) | expected).items():
            found = node.attributes.get(name, _ATTRIBUTES[operation].get(name))
            if isinstance(found, float) and isinstance(right, float):
                found, right = np.float32(found), np.float32(right)
            if right is not None and found != right:
                self.differences.append(f"{stage} has the {name} {found}, not {right}")
        return node

    def _take(self, module: str, node: _Node) -> str:
        """Keep the weights that a node reads, under PyTorch's names, and return the value that it reads."""
        for kind, name in zip(("weight", "bias"), node.inputs[1:], strict=False):
            if name not in self._tensors:
                reason = "is not a tensor of the file, or belongs to another layer as well"
                raise _other_network(f"the {kind} of {module}, {name[:60]}, {reason}")
            # Each is taken only once, so that a file cannot claim memory that it does not have itself.
            self.weights[f"{module}.{kind}"] = _array(self._tensors.pop(name), name[:60])
        return node.inputs[0]

    def variant(self) -> str:
        """Return the variant that has all the pools, for the images of 224x224 that the zoo's files take.

        Caffe2 wrote Caffe's rounding as explicit padding. It is wider than needed, but gives the same windows.
        """
        average_pool, *max_pools = self._pools  # in the order of the way back
        size, variants = 112, {"bvlc", "bvlc_floor"}
        for stage in reversed(max_pools):
            rounded = {"bvlc": -(-(size - 3) // 2) + 1, "bvlc_floor": (size - 3) // 2 + 1}
            found = _windows(self._pools[stage], size, window=3, stride=2)
            variants = {variant for variant in variants if found == [rounded[variant]] * 2}
            if not variants:
                raise _other_network(
                    f"at 224x224 {stage} makes {' x '.join(map(str, found))} values of {size} x {size}: Caffe's makes "
                    f"{rounded['bvlc']} x {rounded['bvlc']}, or if all round down {rounded['bvlc_floor']} x "
                    f"{rounded['bvlc_floor']}"
                )
            size = found[0]
        if _windows(self._pools[average_pool], size, window=7, stride=1) != [1, 1]:
            raise _other_network(f"at 224x224 {average_pool} does not make one value of {size} x {size}")
        return variants.pop()


def _other_network(reason: str) -> StateDictError:
    advice = "give the file from before it was quantised or optimised, or the checkpoint from which it was exported"
    return StateDictError(f"it does not compute what Berkeley's network does: {reason}; {advice}")


def _windows(pool: _Node, size: int, window: int, stride: int) -> list[int]:
    """Return the numbers of windows of a pool along the height and the width of ``size`` x ``size`` values."""
    rests = [size + after - window for after in pool.attributes.get("pads", [0] * 4)[2:]]
    return [(-(-rest // stride) if pool.attributes.get("ceil_mode") else rest // stride) + 1 for rest in rests]


def _name(value: int | memoryview) -> str:
    name = bytes(as_bytes(value)[: MAX_NAME + 1])
    if len(name) > MAX_NAME:
        raise StateDictError(f"it has a name of more than {MAX_NAME:,} characters")
    return name.decode(errors="surrogateescape")


def _value(attribute: Mapping[int, list[int | memoryview]]) -> Any:
    """Return the value of an attribute: a float, an integer, a text, a list of integers, or None for anything else.

    Programs that write by the rules of proto3 leave out a value of zero. The type (field 20) then says what it is.
    """
    if attribute[8]:
        return [_signed(value) for packed in attribute[8][:9] for value in integers(packed, most=8)][:9]
    if attribute[2]:
        return float(numbers(as_bytes(attribute[2][-1]), "<f4")[0])
    if attribute[3]:
        return _signed(integer(attribute[3][-1]))
    if attribute[4]:
        return _name(part(attribute, 4)[:20])
    return {_FLOAT: 0.0, _INT: 0}.get(integer(attribute[20][-1])) if attribute[20] else None


def _signed(value: int) -> int:
    """Return the int64 that a varint of 64 bits stands for: negative ones have the two's complement."""
    return (value + 2**63) % 2**64 - 2**63


def _array(tensor: Mapping[int, list[int | memoryview]], name: str) -> np.ndarray:
    if tensor[13] or (tensor[14] and tensor[14][-1] != 0):
        raise StateDictError("its weights are in another file: bring them in with onnx.save(onnx.load(FILE), NEW_FILE)")
    if not tensor[2] or tensor[2][-1] not in _DTYPES:
        raise StateDictError(f"{name} is neither float32 nor float64: give the file from before it was quantised")
    dtype, listed = _DTYPES[integer(tensor[2][-1])]
    shape = [size for packed in tensor[1][: MAX_AXES + 1] for size in integers(packed, MAX_AXES)]
    if len(shape) > MAX_AXES:
        raise StateDictError(f"a tensor has more than {MAX_AXES} axes")
    values = numbers(memoryview(b"".join(map(as_bytes, tensor[9] or tensor[listed]))), dtype)
    if math.prod(shape) != values.size:
        raise StateDictError(
            f"the file is damaged or cut off (a tensor of shape {shape[:8]} has {values.size:,} values)"
        )
    return values.reshape(shape)
