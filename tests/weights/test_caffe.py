"""Caffe's files: read as OpenCV's own importer reads them, in every form, and refused if anything in them is wrong."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bvlc
import cv2
import jax
import numpy as np
import pytest
import reference
import safetensors.numpy
import torch
from bombs import assert_refused_cheaply
from caffe_files import STAGES, blob, caffemodel, field, layer, layer_names, prototxt
from flax.traverse_util import flatten_dict
from proof import relative_error
from scipy.special import softmax
from skimage import data as skimage_data

import flax_googlenet
from flax_googlenet import GoogLeNet, PortingError, StateDictError, endpoints, from_caffe
from flax_googlenet.weights import caffe

REAL = os.environ.get("GOOGLENET_BVLC")
needs_real = pytest.mark.skipif(not REAL, reason="GOOGLENET_BVLC does not name a bvlc_googlenet.caffemodel")


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    return bvlc.random_weights(num_classes=7)


@pytest.fixture(scope="module")
def deployed(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in state_dict.items() if not name.startswith("aux")}


@pytest.fixture(scope="module")
def valid(deployed: dict[str, np.ndarray]) -> bytes:
    return caffemodel(deployed)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "network.caffemodel"
        path.write_bytes(content)
        return path

    return write


def test_every_form_of_the_file_gives_its_weights_exactly(
    state_dict: dict[str, np.ndarray], deployed: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    for weights, form in (
        (state_dict, {}),
        (state_dict, {"v1": True, "legacy": True}),
        (deployed, {"v1": True}),
        (deployed, {"legacy": True}),
        (deployed, {"double": True}),
    ):
        path = write(caffemodel(weights, **form))
        read = caffe.read(path).state_dict
        assert read.keys() == weights.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(read[name], array)
    model, variables = from_caffe(path)
    dtype = np.float64  # of the last form
    assert model == GoogLeNet(variant="bvlc", num_classes=7, aux_logits=False, dropout=0.4, param_dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(
        variables["params"]["conv1"]["conv"]["kernel"], deployed["conv1.conv.weight"].transpose(2, 3, 1, 0)
    )
    path = write(caffemodel(state_dict))
    assert from_caffe(path)[0] == GoogLeNet(variant="bvlc", num_classes=7, dropout=0.4)


def test_layers_with_other_names_are_known_by_their_order(
    state_dict: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    berkeleys = layer_names(aux=True)
    names = {name.replace("/", "_").replace("classifier", "classifier_model"): x for name, x in berkeleys.items()}
    names = {f"{name}/new" if name == "conv1_7x7_s2" else name: x for name, x in names.items()}
    expected = flatten_dict(from_caffe(write(caffemodel(state_dict)))[1])
    found = flatten_dict(from_caffe(write(caffemodel(state_dict, names=names)))[1])
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)


def test_layers_with_berkeleys_names_may_be_in_any_order(
    deployed: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    names = dict(reversed(layer_names(aux=False).items()))
    backwards = caffe.read(write(caffemodel(deployed, names=names))).state_dict
    assert backwards.keys() == deployed.keys()
    for name, array in deployed.items():
        np.testing.assert_array_equal(backwards[name], array)


def opencv_stages(path: Path, images: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Compute every stage with OpenCV from ImageNet-normalised images, which become BGR minus Caffe's mean."""
    text = prototxt(*images.shape[1:3], num_classes).encode()
    net = cv2.dnn.readNetFromCaffe(np.frombuffer(text, np.uint8), np.fromfile(path, np.uint8))
    net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    net.enableFusion(False)
    net.enableWinograd(False)
    pixels = (images.astype(np.float64) * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
    net.setInput((pixels[..., ::-1] - [104, 117, 123]).transpose(0, 3, 1, 2).astype(np.float32))
    outputs = dict(zip(STAGES, net.forward([*STAGES.values()]), strict=True))
    return {name: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for name, x in outputs.items()}


def assert_opencv_agrees(path: Path, images: np.ndarray) -> None:
    model, variables = from_caffe(path)
    ours = jax.jit(lambda v, x: endpoints(model, v, x))(variables, images)
    theirs = opencv_stages(path, images, model.num_classes)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        error = relative_error(ours[name], theirs[name])
        print(f"{images.shape[1]}x{images.shape[2]} {name:12} {error:.1e}")
        # Both compute in float32. norm1 and norm2 make small activations, with the errors of large ones, as large as
        # these: 9e-6 measured, and 2e-6 in the other stages.
        assert error < 2e-5, name


@pytest.mark.slow
def test_every_stage_is_opencvs(state_dict: dict[str, np.ndarray], write: Callable[[bytes], Path]) -> None:
    images = np.random.default_rng(0).standard_normal((1, 97, 131, 3)).astype(np.float32)
    assert_opencv_agrees(write(caffemodel(state_dict, v1=True, legacy=True)), images)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_encoded_is_read_again_and_by_opencv_too(
    dtype: Any, state_dict: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    weights = {name: array.astype(dtype) for name, array in state_dict.items()}
    path = write(caffe.encode(weights))
    read = caffe.read(path).state_dict
    assert read.keys() == weights.keys()
    for name, array in weights.items():
        assert read[name].dtype == dtype
        np.testing.assert_array_equal(read[name], array)
    image = np.random.default_rng(0).standard_normal((1, 64, 75, 3)).astype(np.float32)
    logits = bvlc.build(state_dict, torch.float32)(torch.from_numpy(image).permute(0, 3, 1, 2)).detach().numpy()
    if dtype is np.float32:  # OpenCV reads no float64
        assert relative_error(opencv_stages(path, image, 7)["fc"], logits) < 1e-5


@pytest.mark.slow
@needs_real
@pytest.mark.parametrize("size", [(224, 224), (225, 223), (97, 131)])
def test_every_stage_of_berkeleys_weights_is_opencvs(size: tuple[int, int]) -> None:
    photograph = reference.photographs()[0][: size[0], : size[1]]
    images = ((photograph / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])[None].astype(np.float32)
    assert_opencv_agrees(Path(str(REAL)), images)


PHOTOGRAPHS: dict[str, tuple[Callable[[], Any], str, float]] = {
    "a temple": (lambda: reference.photographs()[0], "palace", 0.3366),
    "a cat": (skimage_data.chelsea, "Egyptian cat", 0.4938),
    "a cup": (skimage_data.coffee, "espresso", 0.9014),
    "a rocket": (skimage_data.rocket, "missile", 0.3056),
    "a photographer": (lambda: np.stack([skimage_data.camera()] * 3, -1), "tripod", 0.9953),
    "a motorcycle": (lambda: skimage_data.stereo_motorcycle()[0], "moped", 0.8479),
}
"""Photographs with the answer of Berkeley's weights and its probability, which OpenCV computes, too."""


@pytest.mark.slow
@needs_real
def test_photographs_get_the_answers_that_berkeleys_weights_give_in_opencv() -> None:
    path = Path(str(REAL))
    model, variables = from_caffe(path)
    assert caffe.has_bvlc_classes(caffe.read(path).state_dict)
    names = reference.IMAGENET.meta["categories"]
    images = flax_googlenet.preprocess_batch([photograph() for photograph, _, _ in PHOTOGRAPHS.values()])
    logits = flax_googlenet.make_predictor(model, variables)(images)
    for image, row, (_, name, probability) in zip(images, np.asarray(logits), PHOTOGRAPHS.values(), strict=True):
        ours = softmax(row.astype(np.float64))
        theirs = softmax(opencv_stages(path, image[None], 1000)["fc"][0].astype(np.float64))
        print(name, f"Flax {ours.max():.4f} OpenCV {theirs.max():.4f}")
        assert names[ours.argmax()] == names[theirs.argmax()] == name
        assert abs(ours.max() - probability) < 1e-3
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_file_that_is_cut_anywhere_is_refused_in_one_line(valid: bytes, write: Callable[[bytes], Path]) -> None:
    rng = np.random.default_rng(0)
    for length in [0, 1, 5, 20, 100, len(valid) - 1, *rng.integers(1, len(valid), 20)]:
        path = write(valid[:length])
        with pytest.raises((StateDictError, PortingError)) as error:
            from_caffe(path)
        assert str(error.value).startswith(str(path))
        assert isinstance(error.value, PortingError) or "\n" not in str(error.value)


@pytest.mark.slow
def test_a_flipped_bit_is_refused_or_leaves_all_names_and_shapes(
    deployed: dict[str, np.ndarray], valid: bytes, write: Callable[[bytes], Path]
) -> None:
    """The format has no checksum: a bit inside a weight changes the weight, and some change nothing that is read."""
    rng = np.random.default_rng(0)
    start = valid.index(b"loss3/classifier") - 8
    shapes = {name: array.shape for name, array in deployed.items()}
    refused = 0
    for position in [*range(100), *range(start, start + 50), *rng.integers(0, len(valid), 30)]:
        damaged = bytearray(valid)
        damaged[position] ^= 1 << int(rng.integers(8))
        path = write(bytes(damaged))
        try:
            state_dict = caffe.read(path).state_dict
            if {name: array.shape for name, array in state_dict.items()} != shapes:
                with pytest.raises(PortingError):
                    caffe.network(str(path), state_dict)
                refused += 1
        except StateDictError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 50


BOMBS = {
    "a length beyond the end": field(1, b"x") + b"\x12\xff\xff\xff\xff\xff\x7f",
    "an integer without an end": b"\x80" * 1000,
    "an integer of too many bits": b"\x08" + b"\xff" * 10 + b"\x01",
    "a shape of 2**62 values": layer("conv1/7x7_s2", [field(1, 2**62)], convolution=True, v1=True),
    "a shape of a million axes": layer("x", [field(7, field(1, b"\x01" * 10**6))], convolution=True, v1=False),
    "a million fields": b"\x08\x01" * 10**6,
    "a million layers": layer("x", [], convolution=True, v1=False) * 10**5,
    "a name of a megabyte": layer("x" * 10**6, [blob(np.ones(1), legacy=True)], convolution=True, v1=False),
    "groups": b"\x0b" * 1000,
    "values without a shape": layer("x", [field(5, b"\0" * 8)], convolution=True, v1=True),
    "no values of a huge shape": layer(
        "x", [field(5, b"") + field(1, 0) + field(2, 2**62) + field(3, 2**62)], convolution=True, v1=True
    ),
    "half a number": layer("x", [field(5, b"\0" * 3)], convolution=True, v1=True),
    "an integer for a layer": field(2, 1),
    "bytes for an integer": layer("x", [field(1, b"1")], convolution=True, v1=True),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_little_time_and_memory(name: str, write: Callable[[bytes], Path]) -> None:
    assert_refused_cheaply(from_caffe, write(BOMBS[name]), message_length=200)


OTHERS = {
    "<!doctype html><html>": "web page",
    'name: "GoogleNet"\nlayer {\n  name: "data"\n}\n': r"prototxt: give the \.caffemodel",
    "version https://git-lfs.github.com/spec/v1": "git lfs pull",
    "": "no layers with weights",
}


@pytest.mark.parametrize("content", OTHERS)
def test_files_of_other_kinds_are_named(content: str, write: Callable[[bytes], Path]) -> None:
    with pytest.raises(StateDictError, match=OTHERS[content]):
        from_caffe(write(content.encode()))


def test_another_network_is_refused_with_all_that_is_wrong(
    deployed: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    names = layer_names(aux=False)
    wrong = {**deployed, "inception3a.branch3.1.conv.weight": np.ones((32, 16, 3, 3))}
    with pytest.raises(PortingError) as error:
        from_caffe(write(caffemodel(wrong)))
    (problem,) = error.value.problems["wrong shape"]
    assert "inception3a.branch3.1.conv.weight (32, 16, 3, 3), expected (32, 16, 5, 5)" in problem

    del names["inception_5b/1x1"]
    names["conv9"] = "conv1.conv"
    names["conv10"] = "conv1.conv"
    with pytest.raises(PortingError) as error:
        from_caffe(write(caffemodel(deployed, names=names)))
    assert "inception5b.branch1.conv.weight" in error.value.problems["missing"]
    assert {"conv9.weight", "conv10.bias"} < {*error.value.problems["unexpected"]}

    infinite = {**deployed, "fc.bias": np.full(7, np.inf)}
    with pytest.raises(PortingError) as error:
        from_caffe(write(caffemodel(infinite)))
    assert error.value.problems == {"not finite": ["fc.bias"]}


def test_a_layer_that_is_there_twice_is_refused(
    valid: bytes, deployed: dict[str, np.ndarray], write: Callable[[bytes], Path]
) -> None:
    again = layer("loss3/classifier", [blob(deployed["fc.weight"], legacy=False)], convolution=False, v1=False)
    with pytest.raises(StateDictError, match="two layers with the name loss3/classifier"):
        from_caffe(write(valid + again))


def test_a_file_of_caffe_with_another_name_needs_its_own(valid: bytes, tmp_path: Path) -> None:
    (tmp_path / "network.bin").write_bytes(valid)
    with pytest.raises(StateDictError, match=r"of Caffe in \.caffemodel"):
        flax_googlenet.read_state_dict(tmp_path / "network.bin")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_reader_of_caffes_files_names_those_of_the_others(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "network.caffemodel"
    if kind == "safetensors":
        safetensors.numpy.save_file({"fc.bias": np.zeros(3, np.float32)}, path)
    else:
        torch.save({"fc.bias": torch.zeros(3)}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(StateDictError, match=r"read_state_dict .*flax_googlenet\.load"):
        from_caffe(path)


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        from_caffe(tmp_path / "missing.caffemodel")
