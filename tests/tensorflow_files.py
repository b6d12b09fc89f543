"""Writes GraphDefs for tests: Google's GoogLeNet with any weights, without TensorFlow."""

from collections.abc import Mapping

import numpy as np
from caffe_files import field, varint

# Block -> channels of the 1x1 layer, the 3x3 and its bottleneck, the 5x5 and its bottleneck, the reduction of the pool.
# The numbers, and the names of layers below, are not the library's own, so that a wrong one there is noticed.
BLOCKS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 204, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 48, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def layer_names() -> dict[str, str]:
    """Return Google's names of the layers with weights -> PyTorch's names of the modules."""
    names = {"conv2d0": "conv1.conv", "conv2d1": "conv2.conv", "conv2d2": "conv3.conv", "softmax2": "fc"}
    for block in BLOCKS:
        inner = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
        layers = ("1x1", "3x3_bottleneck", "3x3", "5x5_bottleneck", "5x5", "pool_reduce")
        for layer, module in zip(layers, inner, strict=True):
            names[f"mixed{block}_{layer}"] = f"inception{block}.{module}.conv"
    for i in (0, 1):
        names |= {f"head{i}_bottleneck": f"aux{i + 1}.conv.conv", f"nn{i}": f"aux{i + 1}.fc1"}
        names[f"softmax{i}"] = f"aux{i + 1}.fc2"
    return names


def constants(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights of a state dict under Google's names and with TensorFlow's axes."""
    arrays = {}
    for layer, module in layer_names().items():
        if f"{module}.bias" not in state_dict:
            continue
        weight = state_dict[f"{module}.weight"]
        if weight.ndim == 4:
            weight = weight.transpose(2, 3, 1, 0)
        elif layer in ("nn0", "nn1"):  # reads 4x4 pixels of 128 channels, which TensorFlow flattens channels last
            weight = weight.reshape(-1, 128, 4, 4).transpose(2, 3, 1, 0).reshape(2048, -1)
        else:
            weight = weight.T
        arrays |= {f"{layer}_w": weight, f"{layer}_b": state_dict[f"{module}.bias"]}
    return arrays


def attribute(name: str, value: bytes) -> bytes:
    return field(5, field(1, name.encode()) + field(2, value))


def node(name: str, operation: str, attributes: bytes = b"") -> bytes:
    return field(1, field(1, name.encode()) + field(2, operation.encode()) + attributes)


def shape(sizes: tuple[int, ...]) -> bytes:
    return field(2, b"".join(field(2, field(1, size)) for size in sizes))


def constant(name: str, array: np.ndarray, *, in_list: bool = False) -> bytes:
    """Return a node with a tensor, whose numbers are bytes (``tensor_content``) or a list."""
    double = array.dtype == np.float64
    number = (6 if double else 5) if in_list else 4
    values = field(number, array.astype("<f8" if double else "<f4").tobytes())
    tensor = field(1, 2 if double else 1) + shape(array.shape) + values
    return node(name, "Const", attribute("value", field(8, tensor)))


def ints(*values: int) -> bytes:
    return field(1, field(3, b"".join(map(varint, values))))


def number(value: float) -> bytes:
    return varint(4 << 3 | 5) + np.float32(value).tobytes()


def conv(name: str, stride: int = 1, padding: bytes = b"SAME") -> bytes:
    attributes = attribute("strides", ints(1, stride, stride, 1)) + attribute("padding", field(2, padding))
    return node(f"{name}_pre_relu/conv", "Conv2D", attributes)


def pool(name: str, stride: int, padding: bytes = b"SAME") -> bytes:
    geometry = attribute("ksize", ints(1, 3, 3, 1)) + attribute("strides", ints(1, stride, stride, 1))
    return node(name, "MaxPool", geometry + attribute("padding", field(2, padding)))


def norm(name: str, bias: float = 2.0, alpha: float = 1e-4) -> bytes:
    return node(name, "LRN", attribute("bias", number(bias)) + attribute("alpha", number(alpha)))


OPERATIONS = (
    conv("conv2d0", 2)
    + pool("maxpool0", 2)
    + norm("localresponsenorm0")
    + conv("mixed3a_5x5")
    + pool("mixed3a_pool", 1)
    + pool("maxpool10", 2)
)


def graph(state_dict: Mapping[str, np.ndarray], *, in_list: bool = False, operations: bytes = OPERATIONS) -> bytes:
    """Return a GraphDef with the weights of a state dict, a constant that is no weight, and some operations."""
    axis = node("mixed3a/concat_dim", "Const", attribute("value", field(8, field(1, 3) + field(7, 3))))
    weights = [constant(name, array, in_list=in_list) for name, array in constants(state_dict).items()]
    return node("input", "Placeholder") + b"".join(weights) + axis + operations
