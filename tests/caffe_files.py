"""Writes Caffe's files for tests: networks as text, and weights in each of the forms that Caffe has written."""

from collections.abc import Iterable, Mapping

import numpy as np

# Block -> channels of the 1x1 layer, the 3x3 and its reduction, the 5x5 and its reduction, the projection. The numbers,
# and the names of layers below, are not the library's own, so that a wrong one there is noticed.
BLOCKS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def layer_names(*, aux: bool) -> dict[str, str]:
    """Return Caffe's names of the layers with weights, in Caffe's order -> PyTorch's names of the modules."""
    names = {"conv1/7x7_s2": "conv1.conv", "conv2/3x3_reduce": "conv2.conv", "conv2/3x3": "conv3.conv"}
    for block in BLOCKS:
        inner = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
        layers = ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj")
        for layer, module in zip(layers, inner, strict=True):
            names[f"inception_{block}/{layer}"] = f"inception{block}.{module}.conv"
        if aux and block in ("4a", "4d"):
            number = 1 if block == "4a" else 2
            for layer, module in (("conv", "conv.conv"), ("fc", "fc1"), ("classifier", "fc2")):
                names[f"loss{number}/{layer}"] = f"aux{number}.{module}"
    return {**names, "loss3/classifier": "fc"}


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, value: int | bytes) -> bytes:
    """Return a field of a message: an integer, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(array: np.ndarray, *, legacy: bool, double: bool = False) -> bytes:
    values = field(8, array.astype("<f8").tobytes()) if double else field(5, array.astype("<f4").tobytes())
    if not legacy:
        return field(7, field(1, b"".join(map(varint, array.shape)))) + values
    shape = (1,) * (4 - array.ndim) + array.shape
    return b"".join(field(i, size) for i, size in enumerate(shape, start=1)) + values


def layer(name: str, blobs: Iterable[bytes], *, convolution: bool, v1: bool) -> bytes:
    if v1:
        kind = field(5, 4 if convolution else 14)
        return field(2, b"".join([field(4, name.encode()), kind, *(field(6, x) for x in blobs)]))
    kind = field(2, b"Convolution" if convolution else b"InnerProduct")
    return field(100, b"".join([field(1, name.encode()), kind, *(field(7, x) for x in blobs)]))


def caffemodel(
    state_dict: Mapping[str, np.ndarray],
    *,
    v1: bool = False,
    legacy: bool = False,
    double: bool = False,
    names: Mapping[str, str] | None = None,
) -> bytes:
    """Return a ``.caffemodel`` with the weights of a state dict, among layers without weights.

    Args:
        state_dict: PyTorch's names -> arrays.
        v1: Write V1LayerParameter, as until 2014, and not LayerParameter.
        legacy: Write shapes of four axes.
        double: Write float64.
        names: Caffe's names -> PyTorch's. By default Berkeley's.
    """
    names = names or layer_names(aux="aux1.fc1.bias" in state_dict)
    parts = [field(1, b"GoogleNet"), layer("data", [], convolution=False, v1=v1)]
    for name, module in names.items():
        weight, bias = state_dict[f"{module}.weight"], state_dict[f"{module}.bias"]
        blobs = [blob(array, legacy=legacy, double=double) for array in (weight, bias)]
        parts.append(layer(name, blobs, convolution=weight.ndim == 4, v1=v1))
    return b"".join(parts)


def prototxt(height: int, width: int, num_classes: int) -> str:
    """Return the description of the network for inference, as in Berkeley's ``deploy.prototxt``.

    Results of ReLU have names that end with ``/relu``. The last pool is global, for images of any size.
    """
    lines = [f'input: "data" input_shape {{ dim: 1 dim: 3 dim: {height} dim: {width} }}']

    def add(name: str, kind: str, bottoms: Iterable[str], parameters: str) -> str:
        inputs = " ".join(f'bottom: "{bottom}"' for bottom in bottoms)
        lines.append(f'layer {{ name: "{name}" type: "{kind}" {inputs} top: "{name}" {parameters} }}')
        return name

    def conv(name: str, bottom: str, channels: int, size: int, stride: int = 1, pad: int = 0) -> str:
        geometry = f"num_output: {channels} kernel_size: {size} stride: {stride} pad: {pad}"
        add(name, "Convolution", [bottom], f"convolution_param {{ {geometry} }}")
        return add(f"{name}/relu", "ReLU", [name], "")

    def pool(name: str, bottom: str, stride: int = 2, pad: int = 0) -> str:
        geometry = f"pool: MAX kernel_size: 3 stride: {stride} pad: {pad}"
        return add(name, "Pooling", [bottom], f"pooling_param {{ {geometry} }}")

    def norm(name: str, bottom: str) -> str:
        return add(name, "LRN", [bottom], "lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 }")

    x = norm("pool1/norm1", pool("pool1/3x3_s2", conv("conv1/7x7_s2", "data", 64, 7, 2, 3)))
    x = conv("conv2/3x3", conv("conv2/3x3_reduce", x, 64, 1), 192, 3, pad=1)
    x = pool("pool2/3x3_s2", norm("conv2/norm2", x))
    for block, (c1, reduce3, c3, reduce5, c5, projection) in BLOCKS.items():
        if block in ("4a", "5a"):
            x = pool(f"pool{int(block[0]) - 1}/3x3_s2", x)
        name = f"inception_{block}"
        branches = [
            conv(f"{name}/1x1", x, c1, 1),
            conv(f"{name}/3x3", conv(f"{name}/3x3_reduce", x, reduce3, 1), c3, 3, pad=1),
            conv(f"{name}/5x5", conv(f"{name}/5x5_reduce", x, reduce5, 1), c5, 5, pad=2),
            conv(f"{name}/pool_proj", pool(f"{name}/pool", x, stride=1, pad=1), projection, 1),
        ]
        x = add(f"{name}/output", "Concat", branches, "")
    x = add("pool5/7x7_s1", "Pooling", [x], "pooling_param { pool: AVE global_pooling: true }")
    add("loss3/classifier", "InnerProduct", [x], f"inner_product_param {{ num_output: {num_classes} }}")
    return "\n".join(lines)


STAGES = {
    "conv1": "conv1/7x7_s2/relu",
    "maxpool1": "pool1/3x3_s2",
    "norm1": "pool1/norm1",
    "conv2": "conv2/3x3_reduce/relu",
    "conv3": "conv2/3x3/relu",
    "norm2": "conv2/norm2",
    "maxpool2": "pool2/3x3_s2",
    **{f"inception{block}": f"inception_{block}/output" for block in BLOCKS},
    "maxpool3": "pool3/3x3_s2",
    "maxpool4": "pool4/3x3_s2",
    "avgpool": "pool5/7x7_s1",
    "fc": "loss3/classifier",
}
"""Our name of a stage -> the name of its layer in ``prototxt``."""
