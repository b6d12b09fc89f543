"""ONNX models, as ONNX Runtime and OpenVINO run them, and the command that writes them."""

import hashlib
import json
import os
import re
import subprocess
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
import torch
from inception5h import Inception5h
from jax import numpy as jnp
from PIL import Image
from proof import relative_error
from scipy.special import softmax
from skimage import data

import flax_googlenet
from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD, NETWORKS
from flax_googlenet.commands.cli import main
from flax_googlenet.images.preprocessing import denormalise
from flax_googlenet.model import GoogLeNet
from flax_googlenet.weights import caffe

ROOT = Path(__file__).parents[2]
REAL = os.environ.get("GOOGLENET_BVLC")

# float32, relative to the largest logit: worst measured 2.3e-6 in ONNX Runtime, 3.9e-6 in OpenVINO, 2.5e-6 in PyTorch.
RTOL = 5e-6

CLASS_NAMES = ["hot dog", "Bär", "三"]
METADATA = {"source": "https://example.org/w.pth", "class_names": CLASS_NAMES, "recipe": {"image_size": 64}}

Network = tuple[GoogLeNet, Any, torch.nn.Module]
"""A model, its variables, and the same network in PyTorch in float64."""


@pytest.fixture(scope="module")
def networks() -> dict[str, Network]:
    """Networks by their variant; torchvision's has 3 classes."""
    state_dict = {key: tensor.numpy() for key, tensor in reference.random_checkpoint(num_classes=3).items()}
    model, variables = GoogLeNet(num_classes=3, transform_input=True), flax_googlenet.from_torchvision(state_dict)
    caffes, googles = bvlc.random_weights(), bvlc.random_weights(network=Inception5h)
    floor = bvlc.BVLCGoogLeNetFloor
    return {
        "torchvision": (model, variables, reference.build(state_dict, transform_input=True, dtype=torch.float64)),
        "bvlc": (*caffe.network("random weights", caffes), bvlc.build(caffes, torch.float64)),
        "bvlc_floor": (
            *caffe.network("random weights", caffes, "bvlc_floor"),
            bvlc.build(caffes, torch.float64, floor),
        ),
        "inception5h": (
            *caffe.network("random weights", googles, "inception5h"),
            bvlc.build(googles, torch.float64, Inception5h),
        ),
    }


@pytest.fixture(scope="module")
def small(networks: dict[str, Network]) -> tuple[GoogLeNet, Any]:
    return networks["torchvision"][:2]


def runs_in_onnx_runtime(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    return lambda images: session.run(None, {"images": images})


def runs_in_openvino(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    import openvino

    run = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return lambda images: list(run(images).values())


ENGINES = [runs_in_onnx_runtime, pytest.param(runs_in_openvino, marks=pytest.mark.benchmark)]


def logits_of(network: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    return reference.stages(network, images.astype(np.float64))["fc"]


# The file.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("variant", "layout"),
    [("torchvision", "NHWC"), ("bvlc", "NCHW"), ("inception5h", "NHWC"), ("bvlc_floor", "NCHW")],
)
def test_the_logits_are_pytorchs_for_images_of_any_number_and_size(
    networks: dict[str, Network],
    variant: str,
    layout: str,
    engine: Any,
    photographs: np.ndarray,
    random_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    model, variables, network = networks[variant]
    flax_googlenet.export(tmp_path / "g.onnx", model, variables, layout=layout)
    onnx.checker.check_model(tmp_path / "g.onnx", full_check=True)
    predict = engine(tmp_path / "g.onnx")
    least = NETWORKS[variant].min_size
    for images in (
        photographs,
        *(random_images(*shape) for shape in [(3, least, least), (1, 97, 131), (2, least + 2, 83)]),
    ):
        pixels = images.astype(np.float32)
        given = pixels if layout == "NHWC" else pixels.transpose(0, 3, 1, 2)
        [logits] = predict(np.ascontiguousarray(given))
        assert logits.dtype == np.float32
        assert relative_error(logits, logits_of(network, images)) < RTOL, images.shape


def test_onnx_runtime_refuses_images_that_are_too_small(small: tuple[GoogLeNet, Any], tmp_path: Path) -> None:
    flax_googlenet.export(tmp_path / "g.onnx", *small)
    with pytest.raises(Exception, match=r"\{1,3,14,20\}, requested shape:\{1,3,15,20\}"):
        runs_in_onnx_runtime(tmp_path / "g.onnx")(np.zeros((1, 14, 20, 3), np.float32))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
def test_uint8_images_of_one_size_are_scaled_and_normalised_inside(
    networks: dict[str, Network], variant: str, engine: Any, tmp_path: Path
) -> None:
    model, variables, network = networks[variant]
    pixels = np.stack([photograph[150:190, 200:243] for photograph in reference.photographs()])
    flax_googlenet.export(tmp_path / "g.onnx", model, variables, uint8=True, size=(40, 43))
    images = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
    [logits] = engine(tmp_path / "g.onnx")(pixels)
    assert relative_error(logits, logits_of(network, images)) < RTOL


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("size", "metadata"), [(224, {}), (64, METADATA)])
def test_uint8_images_of_any_size_are_resized_and_cropped_as_preprocess_does_it(
    small: tuple[GoogLeNet, Any], size: int, metadata: dict[str, Any], engine: Any, tmp_path: Path
) -> None:
    flax_googlenet.export(tmp_path / "g.onnx", *small, uint8=True, metadata=metadata)
    onnx.utils.extract_model(tmp_path / "g.onnx", tmp_path / "resize.onnx", ["images"], ["resized"])
    resize = engine(tmp_path / "resize.onnx")
    photographs = np.stack(reference.photographs())
    for images in (photographs, photographs[:, :, :300].copy(), photographs[:1, :65, :97], photographs[:1, :1]):
        [resized] = resize(np.ascontiguousarray(images))
        assert resized.shape == (len(images), 3, size, size)
        expected = np.stack([255 * denormalise(flax_googlenet.preprocess(image, size)) for image in images])
        levels = abs(resized.transpose(0, 2, 3, 1) - np.round(expected))
        assert levels.max() <= 1
        assert levels.mean() < 0.01  # 0.004 measured


def test_top_is_the_likeliest_classes(networks: dict[str, Network], tmp_path: Path) -> None:
    model, variables, network = networks["torchvision"]
    flax_googlenet.export(tmp_path / "g.onnx", model, variables, uint8=True, top=2)
    photographs = reference.photographs()
    probabilities, indices = runs_in_onnx_runtime(tmp_path / "g.onnx")(np.stack(photographs))
    images = np.stack([flax_googlenet.preprocess(photograph) for photograph in photographs])
    expected = softmax(logits_of(network, images), axis=1)
    order = np.argsort(-expected)[:, :2]
    assert (probabilities.dtype, indices.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(indices, order)
    # A level more or less in a few pixels, for weights that exaggerate it: measured 5e-4.
    np.testing.assert_allclose(probabilities, np.take_along_axis(expected, order, 1), atol=2e-3)


def test_the_metadata_names_the_input_the_source_and_the_classes(small: tuple[GoogLeNet, Any], tmp_path: Path) -> None:
    flax_googlenet.export(tmp_path / "g.onnx", *small, uint8=True, metadata=METADATA, layout="NCHW")
    properties = onnxruntime.InferenceSession(tmp_path / "g.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(properties["class_names"]) == CLASS_NAMES
    assert properties["source"] == METADATA["source"]
    assert "uint8 RGB [n, 3, h, w]" in properties["input"]
    assert "64x64" in properties["input"]


def test_the_values_in_the_graph_have_the_names_of_endpoints(networks: dict[str, Network], tmp_path: Path) -> None:
    model, variables, _ = networks["bvlc"]
    flax_googlenet.export(tmp_path / "g.onnx", model, variables)
    images = jax.ShapeDtypeStruct((1, 31, 31, 3), jnp.float32)
    stages = jax.eval_shape(lambda v, x: flax_googlenet.endpoints(model, v, x, branches=True), variables, images)
    assert stages.keys() <= {name for node in onnx.load(tmp_path / "g.onnx").graph.node for name in node.output}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_in_half_precision_has_half_the_bytes_and_half_precisions_error(
    networks: dict[str, Network],
    dtype: Any,
    variant: str,
    engine: Any,
    random_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    model, variables, network = networks[variant]
    flax_googlenet.export(tmp_path / "g.onnx", model.clone(dtype=dtype), variables)
    onnx.checker.check_model(tmp_path / "g.onnx", full_check=True)
    needed = [block for name, block in variables["params"].items() if not name.startswith("aux")]
    parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(needed))
    assert (tmp_path / "g.onnx").stat().st_size < 2.02 * parameters  # each weight once
    if dtype is jnp.bfloat16 and engine is runs_in_onnx_runtime:
        return  # it has no convolutions in bfloat16 on a CPU
    images = random_images(2, 33, 45)
    [logits] = engine(tmp_path / "g.onnx")(images.astype(np.float32))
    error = relative_error(logits, logits_of(network, images))
    assert error < 8 * float(jnp.finfo(dtype).eps)  # measured 1.9 times


def test_the_same_input_makes_the_same_bytes_with_auxiliary_heads_or_without(
    small: tuple[GoogLeNet, Any], tmp_path: Path
) -> None:
    model, variables = small
    params = {name: block for name, block in variables["params"].items() if not name.startswith("aux")}
    flax_googlenet.export(tmp_path / "with.onnx", model, variables, metadata=METADATA)
    flax_googlenet.export(
        tmp_path / "without.onnx", model.clone(aux_logits=False), {**variables, "params": params}, metadata=METADATA
    )
    assert (tmp_path / "with.onnx").read_bytes() == (tmp_path / "without.onnx").read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("g.onnx", {"gradient": True, "size": (32, 32)}, "no gradient"),
        ("g.onnx", {"layout": "CHWN"}, "NHWC or NCHW, got CHWN"),
        ("G.ONNX", {"layout": "CHWN"}, "NHWC or NCHW, got CHWN"),
        ("g.stablehlo", {"layout": "NCHW"}, "ends in .onnx"),
        ("g.onnx", {"size": (14, 40)}, "at least 15 by 15"),
    ],
)
def test_what_a_format_does_not_have_is_refused_and_nothing_written(
    small: tuple[GoogLeNet, Any], name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(flax_googlenet.ExportError, match=message):
        flax_googlenet.export(tmp_path / name, *small, **options)
    assert not list(tmp_path.iterdir())


def test_float64_is_refused(small: tuple[GoogLeNet, Any], tmp_path: Path) -> None:
    model, variables = small
    with pytest.raises(flax_googlenet.ExportError, match="float32"):
        flax_googlenet.export(tmp_path / "g.onnx", model.clone(dtype=jnp.float64), variables)


def test_without_the_package_onnx_the_message_names_the_extra(
    small: tuple[GoogLeNet, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "flax_googlenet.inference.onnx", raising=False)
    monkeypatch.delattr("flax_googlenet.inference.onnx", raising=False)
    with pytest.raises(flax_googlenet.ExportError, match=r"flax-googlenet\[onnx\]"):
        flax_googlenet.export(tmp_path / "g.onnx", *small)
    assert main(["export", "--weights", "not read", "--output", str(tmp_path / "g.onnx")]) == 3
    assert "flax-googlenet[onnx]" in capsys.readouterr().err


@pytest.fixture
def quantise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[np.ndarray], np.ndarray]]:
    """Return a function that makes a file in int8 as the page does, and returns what maps images to its logits."""
    monkeypatch.chdir(tmp_path)

    def quantise(photographs: list[np.ndarray], model: GoogLeNet, variables: Any) -> Callable[[np.ndarray], np.ndarray]:
        flax_googlenet.export("googlenet.onnx", model, variables)
        Path("photos").mkdir()
        for i, photograph in enumerate(photographs):
            Image.fromarray(photograph).save(f"photos/{i}.png")
        page = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
        [code] = [
            code for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "quantize_static" in code
        ]
        exec(code, {})
        options = onnxruntime.SessionOptions()  # without optimisations it rounds to int8, and computes in float32:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the same on every CPU
        session = onnxruntime.InferenceSession("googlenet-int8.onnx", options)
        return lambda images: session.run(None, {"images": images})[0]

    return quantise


def test_the_page_makes_a_file_in_int8_that_computes_the_network(
    networks: dict[str, Network], photographs: np.ndarray, quantise: Callable[..., Callable[[np.ndarray], np.ndarray]]
) -> None:
    model, variables, network = networks["bvlc"]
    logits = quantise(reference.photographs(), model, variables)(photographs)
    onnx.checker.check_model("googlenet-int8.onnx", full_check=True)
    convolutions = [node for node in onnx.load("googlenet-int8.onnx").graph.node if node.op_type == "Conv"]
    assert [node.name for node in convolutions if "DequantizeLinear" not in node.input[0]] == ["conv1/pre_relu"]
    assert 1e-4 < relative_error(logits, logits_of(network, photographs)) < 3e-2  # measured 1.6e-2


@pytest.mark.skipif(not REAL, reason="GOOGLENET_BVLC does not name a bvlc_googlenet.caffemodel")
def test_berkeleys_weights_in_int8_know_the_same_classes(
    quantise: Callable[..., Callable[[np.ndarray], np.ndarray]],
) -> None:
    photographs = [*reference.photographs(), data.chelsea(), data.coffee(), data.rocket(), data.astronaut()]
    logits = quantise(photographs, *flax_googlenet.from_caffe(str(REAL)))
    images = flax_googlenet.preprocess_batch(photographs)
    [expected] = runs_in_onnx_runtime(Path("googlenet.onnx"))(images)
    found = logits(images)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    np.testing.assert_allclose(softmax(found, axis=1), softmax(expected, axis=1), atol=0.05)  # measured 0.022


def test_readers_of_weights_say_what_reads_the_file(small: tuple[GoogLeNet, Any], tmp_path: Path) -> None:
    flax_googlenet.export(tmp_path / "g.onnx", *small)
    for read in (flax_googlenet.load, flax_googlenet.read_state_dict):
        with pytest.raises(flax_googlenet.GoogLeNetError, match="ONNX Runtime"):
            read(tmp_path / "g.onnx")


# The command.


@pytest.mark.parametrize(
    ("options", "results"),
    [
        (["--uint8", "--top", "2"], "probabilities, indices"),
        (["--layout", "NCHW", "--dtype", "float16", "--size", "64", "64"], "logits"),
        pytest.param(["--dtype", "bfloat16", "--top", "2"], "probabilities, indices", marks=pytest.mark.benchmark),
    ],
)
def test_the_command_prints_the_lines_that_run_its_file_without_jax(
    networks: dict[str, Network],
    options: list[str],
    results: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model, variables, network = networks["torchvision"]
    metadata = {"class_names": CLASS_NAMES, "recipe": {"image_size": 64}}  # a run of training names no source
    flax_googlenet.save("weights.safetensors", model, variables, metadata)
    assert main(["export", "--weights", "weights.safetensors", "--output", "it's.onnx", *options]) == 0
    summary, _, lines = capsys.readouterr().out.partition("\n\n")
    assert summary.startswith("wrote it's.onnx: ")
    assert lines.count("\n") == 3

    photographs = np.stack(reference.photographs())
    images = np.stack([flax_googlenet.preprocess(photograph, 64) for photograph in photographs])  # [2, 64, 64, 3]
    given = photographs if "--uint8" in options else images.transpose(0, 3, 1, 2) if "NCHW" in options else images
    np.save("images.npy", given)
    code = f"import sys, numpy; sys.modules['jax'] = None; images = numpy.load('images.npy')\n{lines}"
    subprocess.run([sys.executable, "-c", f"{code}numpy.savez('results.npz', {results})"], check=True)
    with np.load("results.npz") as file:
        answers = dict(file)
    logits = logits_of(network, images)
    if results == "logits":
        assert relative_error(answers["arr_0"], logits) < 8 * float(jnp.finfo(jnp.float16).eps)
    else:
        np.testing.assert_array_equal(answers["arr_1"], np.argsort(-logits)[:, :2])
    properties = {entry.key: entry.value for entry in onnx.load("it's.onnx").metadata_props}
    assert hashlib.sha256(Path("weights.safetensors").read_bytes()).hexdigest() in properties["source"]
    assert json.loads(properties["class_names"]) == CLASS_NAMES
