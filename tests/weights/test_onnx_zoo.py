"""ONNX models as the model zoo has them: what a file computes is what the network computes, or the file is refused."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bvlc
import jax
import numpy as np
import onnx
import onnxruntime
import pytest
import reference
from bombs import assert_refused_cheaply
from caffe_files import field
from onnx import ModelProto, TensorProto, helper
from onnx_files import STAGES, change, node, with_stages, zoo
from proof import flax_stages, relative_error
from scipy.special import softmax

import flax_googlenet
from flax_googlenet import GoogLeNet, PortingError, StateDictError, from_onnx
from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD
from flax_googlenet.weights import caffe
from flax_googlenet.weights import onnx as reader

REAL = os.environ.get("GOOGLENET_BVLC")


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    weights = bvlc.random_weights(num_classes=7)
    return {name: array for name, array in weights.items() if not name.startswith("aux")}


@pytest.fixture(scope="module")
def valid(state_dict: dict[str, np.ndarray]) -> bytes:
    return zoo(state_dict).SerializeToString()


@pytest.fixture
def model(valid: bytes) -> ModelProto:
    return onnx.load_model_from_string(valid)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[ModelProto | bytes], Path]:
    def write(content: ModelProto | bytes) -> Path:
        path = tmp_path / "net.onnx"
        path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        return path

    return write


def check_weights(path: Path, expected: dict[str, np.ndarray]) -> None:
    found = reader.read(path).state_dict
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def onnx_runtime_stages(model: ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what ONNX Runtime computes for one image, ImageNet-normalised RGB: our names of stages -> NHWC."""
    session = onnxruntime.InferenceSession(with_stages(model).SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = (images * IMAGENET_STD + IMAGENET_MEAN) * 255
    bgr = pixels[..., ::-1] - np.array([104, 117, 123])
    values = session.run([*STAGES.values()], {"data_0": bgr.transpose(0, 3, 1, 2).astype(np.float32)})
    named = zip(STAGES, values, strict=True)
    return {stage: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value for stage, value in named}


@pytest.mark.slow
@pytest.mark.parametrize(("floor", "opset"), [(False, 7), (True, 9), (False, 12)])
def test_every_stage_is_what_onnx_runtime_computes_from_the_file(
    floor: bool, opset: int, state_dict: dict[str, np.ndarray], write: Callable[[ModelProto], Path]
) -> None:
    model = zoo(state_dict, floor=floor, opset=opset)
    network, variables = from_onnx(write(model))
    assert network.variant == ("bvlc_floor" if floor else "bvlc")
    images = reference.preset(reference.photographs()[0])[None].astype(np.float64)
    expected, actual = onnx_runtime_stages(model, images), flax_stages(network, variables, images)
    assert actual.keys() == expected.keys()
    assert actual["inception5b"].shape == ((1, 6, 6, 1024) if floor else (1, 7, 7, 1024))
    for name, stage in expected.items():
        assert relative_error(stage, actual[name]) < 2e-6, name  # float32 against float64: 7e-7 measured


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="GOOGLENET_BVLC does not name a bvlc_googlenet.caffemodel")
def test_with_berkeleys_weights_the_two_files_answer_differently_and_the_ports_as_they_do(
    write: Callable[[ModelProto], Path],
) -> None:
    weights = caffe.read(str(REAL)).state_dict
    images = reference.preset(reference.photographs()[0])[None]
    answers = []
    for floor in (False, True):
        model = zoo(weights, floor=floor)
        logits = flax_googlenet.make_predictor(*from_onnx(write(model)))(images)
        answers.append(softmax(np.asarray(logits, np.float64)))
        expected = softmax(onnx_runtime_stages(model, images)["fc"].astype(np.float64))
        np.testing.assert_allclose(answers[-1], expected, rtol=0, atol=1e-5)  # 1.1e-6 measured
    assert np.abs(answers[0] - answers[1]).max() > 0.05  # 0.09: a palace with 34 % and with 42 %


@pytest.mark.parametrize(("floor", "opset"), [(False, 3), (True, 6), (True, 9), (False, 12)])
def test_the_weights_of_all_versions_are_read_exactly(
    floor: bool, opset: int, state_dict: dict[str, np.ndarray], write: Callable[[ModelProto], Path]
) -> None:
    path = write(zoo(state_dict, floor=floor, opset=opset))
    check_weights(path, state_dict)
    found = reader.read(path)
    assert found.variant == ("bvlc_floor" if floor else "bvlc")
    assert found.notes == ([reader.FLOOR_POOLS] if floor else [])


@pytest.mark.parametrize(("dtype", "listed"), [(np.float32, True), (np.float64, False), (np.float64, True)])
def test_every_form_of_a_tensor_gives_its_values_exactly(
    dtype: Any, listed: bool, state_dict: dict[str, np.ndarray], write: Callable[[ModelProto], Path]
) -> None:
    weights = {name: array.astype(dtype) for name, array in state_dict.items()}
    check_weights(write(zoo(weights, listed=listed)), weights)


def test_neither_names_nor_the_order_of_weights_matter(
    model: ModelProto, state_dict: dict[str, np.ndarray], write: Callable[[ModelProto], Path]
) -> None:
    graph = model.graph
    names = {name: f"value{i}" for i, name in enumerate({name for node in graph.node for name in node.output})}
    names |= {tensor.name: f"tensor{i}" for i, tensor in enumerate(graph.initializer)}
    for part in graph.node:
        part.input[:] = [names.get(name, name) for name in part.input]
        part.output[:] = [names[name] for name in part.output]
    for tensor in (*graph.initializer, *graph.output):
        tensor.name = names[tensor.name]
    tensors = sorted(graph.initializer, key=lambda tensor: tensor.name)
    del graph.initializer[:], graph.input[1:]
    graph.initializer.extend(tensors)
    check_weights(write(model), state_dict)


def test_the_package_onnx_is_not_needed(
    state_dict: dict[str, np.ndarray], valid: bytes, write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(valid)
    monkeypatch.setitem(sys.modules, "onnx", None)
    check_weights(path, state_dict)


def subtract_mean(model: ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Sub", ["data_0", "mean"], ["centred"]))
    node(model, "conv1/7x7_s2_1").input[0] = "centred"


def read_a_constant(model: ModelProto) -> None:
    node(model, "conv1/7x7_s2_1").input[0] = "loss3/classifier_b_0"


def read_a_second_result(model: ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Split", ["data_0"], ["first", "second"]))
    node(model, "conv1/7x7_s2_1").input[0] = "second"


def swap_branches(model: ModelProto) -> None:
    branches = node(model, "inception_4b/output_1").input
    branches[1], branches[2] = branches[2], branches[1]


def read_another_value(model: ModelProto) -> None:
    node(model, "inception_3b/1x1_1").input[0] = "pool2/3x3_s2_1"


def leave_out_relu(model: ModelProto) -> None:
    node(model, "inception_5a/3x3_1").input[0] = "inception_5a/3x3_reduce_1"


def share_a_weight(model: ModelProto) -> None:
    node(model, "inception_5b/1x1_1").input[2] = "inception_5b/3x3_b_0"


OTHER_FUNCTIONS: dict[str, Callable[[ModelProto], None]] = {
    "conv1 has the strides [1, 1], not [2, 2]": lambda model: change(model, "conv1/7x7_s2_1", strides=[1, 1]),
    "conv3 has the group 2, not 1": lambda model: change(model, "conv2/3x3_1", group=2),
    "conv2 has the pads [0, 0, 1, 1], not": lambda model: change(model, "conv2/3x3_reduce_1", pads=[0, 0, 1, 1]),
    "norm1 has the size 9, not 5": lambda model: change(model, "pool1/norm1_1", size=9),
    "norm2 has the bias 2.0, not 1.0": lambda model: change(model, "conv2/norm2_1", bias=2.0),
    "norm2 has the alpha None": lambda model: change(model, "conv2/norm2_1", alpha=[1e-4]),
    "inception4c has the axis 2, not 1": lambda model: change(model, "inception_4c/output_1", axis=2),
    "inception4d has the axis -2, not 1": lambda model: change(model, "inception_4d/output_1", axis=-2),
    "conv2 has the pads [-1, 0, 0, 0], not": lambda model: change(model, "conv2/3x3_reduce_1", pads=[-1, 0, 0, 0]),
    # As many windows as if it rounded down, and the last one without its last row.
    "maxpool1 has the pads [0, 0, -2, -2], which should be": lambda model: change(
        model, "pool1/3x3_s2_1", pads=[0, 0, -2, -2], ceil_mode=1
    ),
    "inception5a.branch4.0 has the pads [0, 0, 0, 0]": lambda model: change(model, "inception_5a/pool_1", pads=[0] * 4),
    "fc has the alpha 2.0": lambda model: change(model, "loss3/classifier_1", alpha=2.0),
    "avgpool has the count_include_pad 1": lambda model: change(model, STAGES["avgpool"], count_include_pad=1),
    "avgpool does not make one value of 7 x 7": lambda model: change(model, STAGES["avgpool"], pads=[0, 0, 1, 1]),
    "maxpool4 has the kernel_shape [2, 2], not [3, 3]": lambda model: change(
        model, "pool4/3x3_s2_1", kernel_shape=[2, 2]
    ),
    "at 224x224 maxpool3 makes 13 x 13 values of 28 x 28: Caffe's makes 14 x 14": lambda model: change(
        model, "pool3/3x3_s2_1", pads=[0, 0, 0, 0]
    ),
    "at 224x224 maxpool1 makes 55 x 56 values of 112": lambda model: change(model, "pool1/3x3_s2_1", pads=[0, 0, 0, 2]),
    "maxpool1 has the pads [1, 1, 1, 1], which should be 0 before": lambda model: change(
        model, "pool1/3x3_s2_1", pads=[1, 1, 1, 1]
    ),
    "conv1 reads the result of Sub": subtract_mean,
    "conv1 reads a constant": read_a_constant,
    "a second result of a node, not the images": read_a_second_result,
    "maxpool1 has the auto_pad SAME_UPPER, not NOTSET": lambda model: change(
        model, "pool1/3x3_s2_1", auto_pad="SAME_UPPER"
    ),
    "branches of inception3b read different values": read_another_value,
    "inception5a.branch2.0 should be the result of Relu, and inception_5a/3x3_reduce_1 is the result of Conv": (
        leave_out_relu
    ),
    "belongs to another layer as well": share_a_weight,
}


@pytest.mark.parametrize("difference", OTHER_FUNCTIONS)
def test_a_graph_that_computes_another_function_is_refused(
    difference: str, model: ModelProto, write: Callable[[ModelProto], Path]
) -> None:
    OTHER_FUNCTIONS[difference](model)
    path = write(model)
    with pytest.raises(StateDictError) as error:
        from_onnx(path)
    assert str(error.value).startswith(f"{path}: ")
    assert difference in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_function_is_known_however_the_file_states_it(
    model: ModelProto, write: Callable[[ModelProto], Path]
) -> None:
    change(model, "pool1/3x3_s2_1", pads=[0, 0, 0, 0], ceil_mode=1)
    change(model, "pool2/3x3_s2_1", pads=[0, 0, 1, 1])
    norm = node(model, "pool1/norm1_1")
    kept = [attribute for attribute in norm.attribute if attribute.name == "size"]
    del norm.attribute[:]  # the others have the values that ONNX takes without them
    norm.attribute.extend(kept)
    for part in model.graph.node:
        part.domain = "ai.onnx"  # another name of the domain without a name
    zero = node(model, "loss3/classifier_1").attribute.add()
    zero.name, zero.type = "transA", onnx.AttributeProto.INT  # proto3 leaves out the value
    assert reader.read(write(model)).variant == "bvlc"


def test_branches_in_another_order_are_refused_by_the_shapes_of_their_weights(
    model: ModelProto, write: Callable[[ModelProto], Path]
) -> None:
    swap_branches(model)
    with pytest.raises(StateDictError, match=r"inception4b\.branch2\.1 has the pads \[2, 2, 2, 2\]"):
        from_onnx(write(model))


def test_other_widths_are_refused_with_all_that_is_wrong(
    state_dict: dict[str, np.ndarray], write: Callable[[ModelProto], Path]
) -> None:
    wrong = {**state_dict, "inception4a.branch2.1.conv.bias": np.ones(204, np.float32)}
    wrong["fc.weight"] = wrong["fc.weight"][:, :512]
    model = zoo(wrong)
    node(model, "conv2/3x3_1").input.pop()  # the bias
    with pytest.raises(PortingError) as error:
        from_onnx(write(model))
    problems = error.value.problems["wrong shape"]
    assert "inception4a.branch2.1.conv.bias (204,), expected (208,)" in problems
    assert len(problems) == 2
    assert error.value.problems["missing"] == ["conv3.conv.bias"]


def external(model: ModelProto) -> None:
    tensor = model.graph.initializer[-1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def quantised(model: ModelProto) -> None:
    node(model, "loss3/classifier_1").op_type = "QLinearMatMul"


def half(model: ModelProto) -> None:
    model.graph.initializer[-1].data_type = TensorProto.FLOAT16


def of_another_domain(model: ModelProto) -> None:
    node(model, "prob_1").domain = "com.example"


@pytest.mark.parametrize(
    ("change_model", "advice"),
    [
        (external, "another file: bring them in"),
        (
            quantised,
            "fc should be the result of Gemm, and .* is the result of QLinearMatMul; .* before it was quantised",
        ),
        (half, "loss3/classifier_b_0 is neither float32 nor float64"),
        (of_another_domain, r"prob_1 is the result of com\.example\.Softmax"),
        (lambda model: model.graph.ClearField("output"), "no graph with weights and an output"),
        (lambda model: model.graph.ClearField("initializer"), "no graph with weights and an output"),
        (lambda model: setattr(model, "producer_name", "pytorch"), "the weights from which it was exported"),
    ],
)
def test_models_that_are_not_read_are_named(
    change_model: Callable[[ModelProto], None],
    advice: str,
    model: ModelProto,
    write: Callable[[ModelProto], Path],
) -> None:
    change_model(model)
    with pytest.raises(StateDictError, match=advice) as error:
        from_onnx(write(model))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"<!doctype html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x1f\x8b\x08", "unpack it first"),
        (b'{"graph": {}}\n', r"give the \.onnx"),
        (b"", "not an ONNX model"),
    ],
)
def test_files_of_other_kinds_are_named(content: bytes, advice: str, write: Callable[[bytes], Path]) -> None:
    with pytest.raises(StateDictError, match=advice):
        from_onnx(write(content))


def test_a_file_that_is_cut_anywhere_is_refused(valid: bytes, write: Callable[[bytes], Path]) -> None:
    rng = np.random.default_rng(0)
    for length in [0, 1, 5, 20, 100, len(valid) - 1, *rng.integers(1, len(valid), 20)]:
        path = write(valid[:length])
        with pytest.raises(StateDictError) as error:
            from_onnx(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_flipped_bit_is_refused_or_leaves_all_names_and_shapes(
    state_dict: dict[str, np.ndarray], valid: bytes, write: Callable[[bytes], Path]
) -> None:
    """The format has no checksum: a bit inside a weight changes the weight, and some change nothing that is read."""
    rng = np.random.default_rng(0)
    shapes = {name: array.shape for name, array in state_dict.items()}
    refused = 0
    for position in [*range(25, 60), *rng.integers(0, 10_000, 20), *rng.integers(0, len(valid), 5)]:
        damaged = bytearray(valid)
        damaged[position] ^= 1 << int(rng.integers(8))
        path = write(bytes(damaged))
        try:
            weights = reader.read(path).state_dict
            if {name: array.shape for name, array in weights.items()} != shapes:
                with pytest.raises(PortingError):
                    caffe.network(str(path), weights)
                refused += 1
        except StateDictError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def message(*graph: bytes) -> bytes:
    return field(1, 3) + field(7, b"".join(graph))


GEMM = field(
    1,
    field(1, b"x") + field(1, b"w") + field(2, b"y") + field(4, b"Gemm") + field(5, field(1, b"transB") + field(3, 1)),
)
OUTPUT = field(12, field(1, b"y"))


def tensor(content: bytes) -> bytes:
    return message(GEMM, OUTPUT, field(5, field(8, b"w") + field(2, 1) + content))


BOMBS = {
    "a length beyond the end": b"\x3a\xff\xff\xff\xff\x7f",
    "an integer for the graph": field(7, 1),
    "an integer for a node": message(field(1, 1)),
    "an integer for a name": message(field(1, field(1, 1) + field(2, 1))),
    "a shape of 2**62 values": tensor(field(1, 2**31) + field(1, 2**31) + field(9, b"\0" * 8)),
    "a size without an end": tensor(field(1, b"\xff" * 12)),
    "a shape of a megabyte": tensor(field(1, b"\1" * 10**6) + field(9, b"\0" * 4)),
    "a shape of many numbers": tensor(field(1, 1) * 10**4 + field(9, b"\0" * 4)),
    "an empty tensor": tensor(field(1, 0) + field(1, 2**40) + field(9, b"")),
    "no values": tensor(field(1, 7)),
    "half a number": tensor(field(1, 1) + field(9, b"\0" * 3)),
    "a hundred thousand nodes": message(field(1, field(1, b"x") + field(2, b"y")) * 10**5),
    "a name of a megabyte": message(field(1, field(1, b"x" * 10**6) + field(2, b"y"))),
    "a node that reads its own result": message(
        OUTPUT, field(1, field(1, b"y") + field(2, b"y") + field(4, b"Softmax")), field(5, field(8, b"w"))
    ),
    "pads of a megabyte": tensor(b"")
    + message(field(1, field(1, b"x") + field(2, b"z") + field(5, field(1, b"pads") + field(8, b"\1" * 10**6)))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_little_time_and_memory(name: str, write: Callable[[bytes], Path]) -> None:
    assert_refused_cheaply(from_onnx, write(BOMBS[name]), message_length=300)


def test_it_is_saved_with_its_variant(
    state_dict: dict[str, np.ndarray], write: Callable[[ModelProto], Path], tmp_path: Path
) -> None:
    model, variables = from_onnx(write(zoo(state_dict, floor=True)))
    assert model == GoogLeNet(variant="bvlc_floor", num_classes=7, aux_logits=False, dropout=0.4)
    flax_googlenet.save(tmp_path / "net.safetensors", model, variables)
    loaded, weights = flax_googlenet.load(tmp_path / "net.safetensors")
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, weights, variables)
