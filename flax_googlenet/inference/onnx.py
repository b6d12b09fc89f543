"""The folded network as an ONNX model, for programs without JAX: ONNX Runtime, OpenVINO and others run it.

The values in the graph have the names of ``endpoints``.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from jax import numpy as jnp
from onnx import ModelProto, NodeProto, TensorProto, helper

from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD, NETWORKS, WIDTHS, PoolPadding
from flax_googlenet.images.preprocessing import CROP, RESIZE
from flax_googlenet.inference.folding import fold_in_float64
from flax_googlenet.model import GoogLeNet, Variables, input_scale_and_shift
from flax_googlenet.weights.checkpoint import Weights

Value = str | np.ndarray | np.generic
"""The name of a value in the graph, or a constant."""

DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
"""ONNX's codes of the dtypes that a file can compute in."""


class _Graph:
    """The nodes and constants of a graph that is being built."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, operator: str, *inputs: Value, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return the name of the output."""
        name = name or f"{operator}_{len(self.nodes)}"
        names = [x if isinstance(x, str) else self.constant(f"{name}/input{i}", x) for i, x in enumerate(inputs)]
        self.nodes.append(helper.make_node(operator, names, [name], name, **attributes))
        return name

    def constant(self, name: str, values: np.ndarray | np.generic) -> str:
        """Add a constant, and return its name."""
        code = TensorProto.INT64 if values.dtype == np.int64 else DTYPES[values.dtype.name]
        self.constants.append(helper.make_tensor(name, code, values.shape, values.tobytes(), raw=True))
        return name

    def cast(self, x: str, dtype: str, name: str = "") -> str:
        """Convert a value to one of ``DTYPES``."""
        return self.add("Cast", x, to=DTYPES[dtype], name=name)


def onnx_model(
    model: GoogLeNet,
    variables: Variables,
    *,
    size: tuple[int, int] | None,
    uint8: bool,
    top: int | None,
    layout: str,
    metadata: Mapping[str, Any],
) -> ModelProto:
    """Return the network with its weights as an ONNX model. The arguments are those of ``export``."""
    graph = _Graph()
    checked = Weights(model, {}, dict(metadata), "")  # for its properties, which leave out what is invalid
    dtype = jnp.dtype(model.dtype).name
    shape: list[int | str] = ["n", *(size or ("h", "w"))]
    shape.insert(layout.index("C"), 3)
    description = f"{'uint8' if uint8 else 'float32'} RGB [{', '.join(map(str, shape))}]"

    x = "images"
    if layout == "NHWC":
        x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
    if uint8:
        x = graph.cast(x, "float32")
        if size is None:
            x = _resize_and_crop(graph, x, checked.image_size)
            description += f", which the file resizes and crops to {checked.image_size}x{checked.image_size}"
    else:
        description += f", in [0, 1], minus {IMAGENET_MEAN}, divided by {IMAGENET_STD}"
        if size is None:
            # In ONNX Runtime this fails for images that are too small, with a message that has both sizes.
            min_size = NETWORKS[model.variant].min_size
            smallest = np.array([0, 3, min_size, min_size])
            x = graph.add("Reshape", x, graph.add("Max", graph.add("Shape", x), smallest), name="check_size")
    x = _to_network_input(graph, x, model, uint8)
    logits = _network(graph, graph.cast(x, dtype), fold_in_float64(model, variables), model)
    graph.cast(logits, "float32", name="logits")
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", model.num_classes])]
    if top is not None:
        probabilities = graph.add("Softmax", "logits", axis=1)
        k = graph.constant("top", np.array([top]))
        graph.nodes.append(helper.make_node("TopK", [probabilities, k], ["probabilities", "int64_indices"]))
        graph.add("Cast", "int64_indices", to=TensorProto.INT32, name="indices")
        outputs = [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", top]),
            helper.make_tensor_value_info("indices", TensorProto.INT32, ["n", top]),
        ]

    images = helper.make_tensor_value_info("images", TensorProto.UINT8 if uint8 else TensorProto.FLOAT, shape)
    opsets = [helper.make_opsetid("", 22 if dtype == "bfloat16" else 18)]  # the first with convolutions in bfloat16
    result = helper.make_model(
        helper.make_graph(graph.nodes, "googlenet", [images], outputs, graph.constants),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="flax-googlenet",
        producer_version=version("flax-googlenet"),
    )
    properties = {"input": description, "source": metadata.get("source"), "class_names": checked.class_names}
    helper.set_model_props(
        result, {k: v if isinstance(v, str) else json.dumps(v) for k, v in properties.items() if v is not None}
    )
    return result


def _resize_and_crop(graph: _Graph, x: str, size: int) -> str:
    """Do what ``preprocess`` does before it normalises, on pixels [n, 3, h, w]: Pillow's antialiased resize.

    ONNX's ``Resize`` with ``antialias`` is not used: ONNX Runtime 1.32 differs from Pillow by up to 7 of 255 levels,
    OpenVINO 2026.4 ignores the attribute and differs by up to 80, and neither can start between two pixels.
    """
    sides = graph.cast(graph.add("Shape", x, start=2), "float32")  # [2], height and width
    short = graph.add("ReduceMin", sides, keepdims=1)
    if size == CROP:
        enlarged = graph.add("Mul", sides, np.float32(RESIZE))
        # The half keeps a whole quotient from being rounded down: OpenVINO multiplies by the reciprocal.
        resized = graph.add("Floor", graph.add("Div", graph.add("Add", enlarged, np.float32(0.5)), short))
        margins = graph.add("Mul", graph.add("Sub", resized, np.float32(CROP)), np.float32(0.5))
        steps = graph.add("Div", sides, resized)  # in pixels of the image for a pixel of the result
        starts = graph.add("Mul", graph.add("Round", margins), steps)
    else:
        crop = graph.add("Mul", short, np.float32(CROP / RESIZE))
        starts = graph.add("Mul", graph.add("Sub", sides, crop), np.float32(0.5))
        steps = graph.add("Expand", graph.add("Div", crop, np.float32(size)), np.array([2]))

    def weights(axis: int) -> str:  # [size, pixels along the axis]
        side, step, start = (graph.add("Gather", values, np.int64(axis)) for values in (sides, steps, starts))
        offsets = graph.add("Mul", step, np.arange(size, dtype=np.float32)[:, None] + np.float32(0.5))
        centres = graph.add("Add", start, offsets)  # [size, 1]
        pixels = graph.add("Range", np.float32(0.5), graph.add("Add", side, np.float32(0.5)), np.float32(1))
        distances = graph.add("Abs", graph.add("Sub", pixels, centres))
        reach = graph.add("Max", step, np.float32(1))
        triangle = graph.add("Relu", graph.add("Sub", np.float32(1), graph.add("Div", distances, reach)))
        return graph.add("Div", triangle, graph.add("ReduceSum", triangle, np.array([1]), keepdims=1))

    # As Pillow does: first horizontally, with the result rounded to whole levels, and then vertically.
    columns = graph.add("Transpose", weights(axis=1), perm=[1, 0])
    x = graph.add("Round", graph.add("MatMul", x, columns))  # [n, 3, h, size]
    return graph.add("Round", graph.add("MatMul", weights(axis=0), x), name="resized")  # [n, 3, size, size]


def _to_network_input(graph: _Graph, x: str, model: GoogLeNet, uint8: bool) -> str:
    """Map pixels [n, 3, h, w] to what the network reads, in one multiplication and one addition.

    For networks that read BGR, ``_network`` reverses the channels of the first kernel instead.
    """
    scale_and_shift = input_scale_and_shift(model)
    if scale_and_shift is None and not uint8:
        return x
    scale, shift = scale_and_shift or (np.ones(3), np.zeros(3))
    if NETWORKS[model.variant].bgr:
        scale, shift = scale[::-1], shift[::-1]
    if uint8:
        shift = shift - scale * np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)
        scale = scale / np.array(IMAGENET_STD) / 255
    scale, shift = (values.astype(np.float32).reshape(3, 1, 1) for values in (scale, shift))
    return graph.add("Add", graph.add("Mul", x, scale), shift)


def _network(graph: _Graph, x: str, params: Mapping[str, Any], model: GoogLeNet) -> str:
    """Add the folded network in the model's dtype, and return the name of its logits [n, num_classes].

    Args:
        graph: The graph to add to.
        x: Name of the network's input [n, 3, h, w].
        params: The parameters of ``fold_in_float64``.
        model: The network.
    """
    network, dtype = NETWORKS[model.variant], jnp.dtype(model.dtype)

    def geometry(window: int, stride: int, padding: PoolPadding, rounds_up: bool = False) -> dict[str, Any]:
        shape = {"kernel_shape": [window] * 2, "strides": [stride] * 2}
        if isinstance(padding, str):
            return {**shape, "auto_pad": "SAME_UPPER" if padding == "SAME" else padding}
        return {**shape, "pads": [padding] * 2 + [padding + (stride - 1 if rounds_up else 0)] * 2}

    def conv(name: str, x: str, stride: int = 1) -> str:
        layer = params
        for part in name.split("/"):
            layer = layer[part]
        kernel, bias = layer["conv"]["kernel"], layer["conv"]["bias"]  # HWIO
        if name == "conv1" and network.bgr:
            kernel = kernel[:, :, ::-1]
        padding = network.conv1_padding if name == "conv1" else kernel.shape[0] // 2
        x = graph.add(
            "Conv",
            x,
            kernel.transpose(3, 2, 0, 1).astype(dtype),
            bias.astype(dtype),
            name=f"{name}/pre_relu",
            **geometry(kernel.shape[0], stride, padding),
        )
        return graph.add("Relu", x, name=name)

    def max_pool(
        name: str, x: str, window: int = 3, stride: int = 2, padding: PoolPadding = network.pool_padding
    ) -> str:
        # With this padding after the input, the windows are those of ``ceil_mode``. With ``ceil_mode`` itself, OpenVINO
        # refuses inputs that are smaller than a window.
        return graph.add("MaxPool", x, name=name, **geometry(window, stride, padding, rounds_up=True))

    def response_norm(name: str, x: str) -> str:
        if not network.response_norm:
            return x
        radius, k, alpha, beta = network.response_norm
        size = 2 * radius + 1  # by which ONNX divides alpha
        x = graph.add("LRN", graph.cast(x, "float32"), size=size, alpha=size * alpha, beta=beta, bias=k)
        return graph.cast(x, dtype.name, name=name)

    x = max_pool("maxpool1", conv("conv1", x, stride=2))
    x = conv("conv3", conv("conv2", response_norm("norm1", x)))
    x = max_pool("maxpool2", response_norm("norm2", x))
    for block in WIDTHS:
        if block == "inception4a":
            x = max_pool("maxpool3", x)
        elif block == "inception5a":
            x = max_pool("maxpool4", x, network.maxpool4_window)
        # Three 1x1 convolutions read x. As one, with its output split, they make ONNX Runtime slower: 0.95x on a CPU.
        branches = [
            conv(f"{block}/branch1", x),
            conv(f"{block}/branch2_1", conv(f"{block}/branch2_0", x)),
            conv(f"{block}/branch3_1", conv(f"{block}/branch3_0", x)),
            conv(f"{block}/branch4_1", max_pool(f"{block}/branch4_0", x, stride=1, padding=1)),
        ]
        x = graph.add("Concat", *branches, axis=1, name=block)
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x, name="avgpool"))
    kernel, bias = (params["fc"][name].astype(dtype) for name in ("kernel", "bias"))
    return graph.add("Gemm", x, kernel, bias, name="fc")
