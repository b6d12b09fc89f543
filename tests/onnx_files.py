"""Writes ONNX models for tests as ONNX's model zoo has them: Berkeley's GoogLeNet, exported by Caffe2.

What is in the zoo's files is taken from programs that print them: bvlc_googlenet's graph from the log of a compiler,
inception_v1's pools from onnx/models#11 and from a test of OpenVINO.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from caffe_files import BLOCKS, layer_names
from onnx import ModelProto, NodeProto, TensorProto, helper

STAGES = {
    "conv1": "conv1/7x7_s2_2",
    "maxpool1": "pool1/3x3_s2_1",
    "norm1": "pool1/norm1_1",
    "conv2": "conv2/3x3_reduce_2",
    "conv3": "conv2/3x3_2",
    "norm2": "conv2/norm2_1",
    "maxpool2": "pool2/3x3_s2_1",
    **{f"inception{block}": f"inception_{block}/output_1" for block in BLOCKS},
    "maxpool3": "pool3/3x3_s2_1",
    "maxpool4": "pool4/3x3_s2_1",
    "avgpool": "pool5/7x7_s1_1",
    "fc": "loss3/classifier_1",
}
"""Our name of a stage -> the name of its value."""


def zoo(
    state_dict: Mapping[str, np.ndarray], *, floor: bool = False, opset: int = 9, listed: bool = False
) -> ModelProto:
    """Return the zoo's ``bvlc_googlenet``, or ``inception_v1``, with the weights of a state dict.

    Args:
        state_dict: The weights under PyTorch's names.
        floor: Whether the max pools round down, as those of ``inception_v1``.
        opset: The version of the operations, from 3 to 12.
        listed: Whether the numbers are in a list, not raw bytes.
    """
    nodes: list[NodeProto] = []

    def add(operation: str, output: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    def conv(name: str, x: str, size: int = 1, stride: int = 1) -> str:
        geometry = {"strides": [stride] * 2, "pads": [size // 2] * 4, "kernel_shape": [size] * 2}
        x = add("Conv", f"{name}_1", x, f"{name}_w_0", f"{name}_b_0", **geometry)
        return add("Relu", f"{name}_2", x)

    def pool(number: int, x: str, size: int) -> str:
        # Caffe2 writes the padding after 2n - 1 + 3 - size for n windows.
        end = 0 if floor else size // 2 * 2 - 1 + 3 - size
        geometry = {"strides": [2, 2], "pads": [0, 0, end, end], "kernel_shape": [3, 3]}
        return add("MaxPool", f"pool{number}/3x3_s2_1", x, **geometry)

    def norm(name: str, x: str) -> str:
        return add("LRN", name, x, size=5, alpha=1e-4, beta=0.75, bias=1.0)

    def inception(block: str, x: str) -> str:
        name = f"inception_{block}"
        branches = [
            conv(f"{name}/1x1", x),
            conv(f"{name}/3x3", conv(f"{name}/3x3_reduce", x), 3),
            conv(f"{name}/5x5", conv(f"{name}/5x5_reduce", x), 5),
        ]
        x = add("MaxPool", f"{name}/pool_1", x, strides=[1, 1], pads=[1, 1, 1, 1], kernel_shape=[3, 3])
        return add("Concat", f"{name}/output_1", *branches, conv(f"{name}/pool_proj", x), axis=1)

    x = norm("pool1/norm1_1", pool(1, conv("conv1/7x7_s2", "data_0", 7, 2), 112))
    x = norm("conv2/norm2_1", conv("conv2/3x3", conv("conv2/3x3_reduce", x), 3))
    x = pool(2, x, 56)
    for block in BLOCKS:
        if block in ("4a", "5a"):
            x = pool(3 if block == "4a" else 4, x, 28 if block == "4a" else 14)
        x = inception(block, x)
    end = 1 if floor else 0  # the last stage has 6x6 values, or 7x7
    x = add("AveragePool", STAGES["avgpool"], x, strides=[1, 1], pads=[0, 0, end, end], kernel_shape=[7, 7])
    x = add(
        "Dropout",
        "pool5/7x7_s1_2",
        x,
        **({"ratio": 0.4} if opset < 12 else {}),
        **({"is_test": 1} if opset < 7 else {}),
    )
    tensors = []
    if opset < 5:
        x = add("Reshape", "OC2_DUMMY_0", x, shape=[1, 1024])
    else:
        x = add("Reshape", "OC2_DUMMY_0", x, "OC2_DUMMY_1")
        tensors.append(helper.make_tensor("OC2_DUMMY_1", TensorProto.INT64, [2], [1, 1024]))
    classifier = "loss3/classifier"
    broadcast = {"broadcast": 1} if opset < 7 else {}
    add("Gemm", f"{classifier}_1", x, f"{classifier}_w_0", f"{classifier}_b_0", transB=1, **broadcast)
    add("Softmax", "prob_1", f"{classifier}_1")
    for layer, module in layer_names(aux=False).items():
        for kind, letter in (("weight", "w"), ("bias", "b")):
            array = state_dict[f"{module}.{kind}"]
            code = helper.np_dtype_to_tensor_dtype(array.dtype)
            values = array.ravel() if listed else array.tobytes()
            tensors.append(helper.make_tensor(f"{layer}_{letter}_0", code, array.shape, values, raw=not listed))
    inputs = [helper.make_tensor_value_info("data_0", TensorProto.FLOAT, [1, 3, 224, 224])]
    inputs += [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in tensors]
    output = helper.make_tensor_value_info("prob_1", TensorProto.FLOAT, [1, len(state_dict["fc.bias"])])
    graph = helper.make_graph(nodes, "GoogleNet", inputs, [output], tensors)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, producer_name="onnx-caffe2", ir_version=3, opset_imports=opsets)


def node(model: ModelProto, output: str) -> NodeProto:
    """Return the node of a model that writes a value."""
    return next(node for node in model.graph.node if output in node.output)


def change(model: ModelProto, output: str, **attributes: Any) -> None:
    """Set attributes of the node that writes a value."""
    changed = node(model, output)
    kept = [attribute for attribute in changed.attribute if attribute.name not in attributes]
    del changed.attribute[:]
    changed.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])


def with_stages(model: ModelProto) -> ModelProto:
    """Return a copy of a model that also returns all stages."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in STAGES.values())
    return copy
