"""GraphDefs of TensorFlow: the weights in them are read exactly, and whatever is wrong in a file is refused."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bvlc
import jax
import numpy as np
import pytest
from bombs import assert_refused_cheaply
from caffe_files import field
from flax.traverse_util import flatten_dict
from inception5h import Inception5h
from tensorflow_files import attribute, constant, conv, graph, ints, node, norm, pool, shape

import flax_googlenet
from flax_googlenet import GoogLeNet, PortingError, StateDictError, from_tensorflow
from flax_googlenet.weights import caffe, tensorflow


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    return bvlc.random_weights(num_classes=7, network=Inception5h)


@pytest.fixture(scope="module")
def deployed(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in state_dict.items() if not name.startswith("aux")}


@pytest.fixture(scope="module")
def valid(deployed: dict[str, np.ndarray]) -> bytes:
    return graph(deployed)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "graph.pb"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(("dtype", "in_list"), [(np.float32, False), (np.float32, True), (np.float64, True)])
def test_every_form_of_a_tensor_gives_its_values_exactly(
    dtype: Any, in_list: bool, state_dict: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    weights = {name: array.astype(dtype) for name, array in state_dict.items()}
    path = write(graph(weights, in_list=in_list))
    model, variables = from_tensorflow(path)
    assert model == GoogLeNet(variant="inception5h", num_classes=7, dropout=0.4, param_dtype=dtype)
    expected = flatten_dict(caffe.network("expected", weights, "inception5h")[1])
    found = flatten_dict(variables)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_graph_without_heads_and_one_value_for_all_of_a_tensor_are_read(
    deployed: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    rest = {name: array for name, array in deployed.items() if name != "conv3.conv.bias"}
    bias = field(8, field(1, 1) + shape((192,)) + field(5, np.float32(0.25).tobytes()))
    weight = constant("conv2d2_w", deployed["conv3.conv.weight"].transpose(2, 3, 1, 0))
    model, variables = from_tensorflow(
        write(graph(rest) + weight + node("conv2d2_b", "Const", attribute("value", bias)))
    )
    assert not model.aux_logits
    np.testing.assert_array_equal(variables["params"]["conv3"]["conv"]["bias"], np.full(192, 0.25, np.float32))


OTHER_OPERATIONS = {
    "conv2d0_pre_relu/conv has the padding b'VALID'": conv("conv2d0", 2, b"VALID"),
    "conv2d0_pre_relu/conv has the strides [1, 1, 1, 1]": conv("conv2d0", 1),
    "maxpool4 has the padding b'VALID'": pool("maxpool4", 2, b"VALID"),
    "mixed4a_pool has the strides [1, 2, 2, 1]": pool("mixed4a_pool", 2),
    "localresponsenorm0 has the bias 1.0": norm("localresponsenorm0", bias=1.0),
    "localresponsenorm1 has the depth_radius 2": node(
        "localresponsenorm1", "LRN", attribute("depth_radius", field(3, 2))
    ),
}


@pytest.mark.parametrize("difference", OTHER_OPERATIONS)
def test_a_graph_that_computes_another_function_is_refused(
    difference: str, deployed: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    path = write(graph(deployed, operations=OTHER_OPERATIONS[difference]))
    with pytest.raises(StateDictError) as error:
        from_tensorflow(path)
    assert str(error.value).startswith(f"{path}: ")
    assert f"not those of inception5h: {difference}" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_network_is_refused_with_all_that_is_wrong(
    deployed: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    wrong = {**deployed, "inception4a.branch2.1.conv.bias": np.ones(208, np.float32)}
    del wrong["inception5b.branch1.conv.bias"]
    with pytest.raises(PortingError) as error:
        from_tensorflow(write(graph(wrong) + constant("scale", np.ones(3, np.float32))))
    (problem,) = error.value.problems["wrong shape"]
    assert "inception4a.branch2.1.conv.bias (208,), expected (204,)" in problem
    assert "inception5b.branch1.conv.bias" in error.value.problems["missing"]
    assert "scale" in error.value.problems["unexpected"]


def test_a_file_that_is_cut_anywhere_is_refused(valid: bytes, write: Callable[[bytes], Path]) -> None:
    rng = np.random.default_rng(0)
    in_last_weight = valid.rindex(b"mixed3a/concat_dim") - 10  # the node after the weights begins a few bytes later
    for length in [0, 1, 5, 20, 100, in_last_weight, *rng.integers(1, in_last_weight, 20)]:
        path = write(valid[:length])
        with pytest.raises((StateDictError, PortingError)) as error:
            from_tensorflow(path)
        assert str(error.value).startswith(str(path))
        assert isinstance(error.value, PortingError) or "\n" not in str(error.value)


@pytest.mark.slow
def test_a_flipped_bit_is_refused_or_leaves_all_names_and_shapes(
    deployed: dict[str, np.ndarray], valid: bytes, write: Callable[[bytes], Path]
) -> None:
    """The format has no checksum: a bit inside a weight changes the weight, and some change nothing that is read."""
    rng = np.random.default_rng(0)
    shapes = {name: array.shape for name, array in deployed.items()}
    start = valid.index(b"conv2d0_w") - 6
    refused = 0
    for position in [*range(start, start + 30), *range(len(valid) - 25, len(valid)), *rng.integers(0, len(valid), 5)]:
        damaged = bytearray(valid)
        damaged[position] ^= 1 << int(rng.integers(8))
        path = write(bytes(damaged))
        try:
            state_dict = tensorflow.read(path).state_dict
            if {name: array.shape for name, array in state_dict.items()} != shapes:
                with pytest.raises(PortingError):
                    caffe.network(str(path), state_dict, "inception5h")
                refused += 1
        except StateDictError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
            refused += 1
    assert refused > 25


def tensor(value: bytes) -> bytes:
    return node("conv2d0_w", "Const", attribute("value", field(8, field(1, 1) + value)))


BOMBS = {
    "a length beyond the end": b"\x0a\xff\xff\xff\xff\x7f",
    "an integer for a node": field(1, 1),
    "an integer for a name": field(1, field(1, 1)),
    "an integer for an attribute": field(1, field(5, 1)),
    "a shape of 2**62 values": tensor(shape((2**31, 2**31)) + field(4, b"\0" * 8)),
    "one value for 2**62": tensor(shape((2**31, 2**31)) + field(5, b"\0" * 4)),
    "a size without an end": tensor(field(2, field(2, b"\x08" + b"\xff" * 12)) + field(4, b"\0" * 4)),
    "a shape of a thousand axes": tensor(shape((1,) * 1000) + field(4, b"\0" * 4)),
    "an empty tensor": tensor(shape((0, 2**40)) + field(4, b"\0" * 4)),
    "no values": tensor(shape((7, 7, 3, 64))),
    "half a number": tensor(shape((1,)) + field(4, b"\0" * 3)),
    "a million nodes": node("", "") * 10**5,
    "a name of a megabyte": node("x" * 10**6, "NoOp"),
    "two nodes of a name": constant("x", np.ones(3)) * 2,
    "no weights": node("input", "Placeholder"),
    "strides of a megabyte": constant("x", np.ones(3)) + node("x", "Conv2D", attribute("strides", ints(*[1] * 10**6))),
    "many strides": constant("x", np.ones(3))
    + node("x", "Conv2D", attribute("strides", field(1, field(3, 1) * 10**4))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_little_time_and_memory(name: str, write: Callable[[bytes], Path]) -> None:
    assert_refused_cheaply(from_tensorflow, write(BOMBS[name]), message_length=250)


def test_tensors_that_claim_more_than_the_file_has_take_no_memory(write: Callable[[bytes], Path]) -> None:
    one = shape((2**15, 2**15)) + field(5, np.float32(1).tobytes())
    nodes = [node(f"x{i}", "Const", attribute("value", field(8, field(1, 1) + one))) for i in range(100)]
    path = write(b"".join(nodes))
    tracemalloc.start()
    try:
        with pytest.raises(PortingError, match="unexpected"):
            from_tensorflow(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**25


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"<!doctype html><html>", "web page"),
        (b'node {\n  name: "input"\n}\n', r"pbtxt: give the \.pb"),
        (b"", "frozen"),
        (b"\x08\x01\x12\x02\x0a\x00", "SavedModel of TensorFlow: freeze"),
    ],
)
def test_files_of_other_kinds_are_named(content: bytes, advice: str, write: Callable[[bytes], Path]) -> None:
    with pytest.raises(StateDictError, match=advice):
        from_tensorflow(write(content))


def test_it_is_saved_with_its_variant(valid: bytes, write: Callable[[bytes], Path], tmp_path: Path) -> None:
    model, variables = from_tensorflow(write(valid))
    flax_googlenet.save(tmp_path / "5h.safetensors", model, variables)
    loaded, weights = flax_googlenet.load(tmp_path / "5h.safetensors")
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, weights, variables)
