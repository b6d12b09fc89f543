"""The exported file, as a program with JAX alone runs it, and the command that writes it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference
import torch
from jax import export as jax_export
from jax import numpy as jnp
from proof import relative_error
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet
from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD
from flax_googlenet.commands.cli import main
from flax_googlenet.model import GoogLeNet

# float32, relative to the largest value, fold and program together: worst measured 1.0e-6.
RTOL = 5e-6


@pytest.fixture(scope="module")
def small_state_dict() -> dict[str, np.ndarray]:
    return {key: tensor.numpy() for key, tensor in reference.random_checkpoint(num_classes=10).items()}


@pytest.fixture(scope="module")
def small(small_state_dict: dict[str, np.ndarray]) -> tuple[GoogLeNet, Any]:
    return GoogLeNet(num_classes=10, transform_input=True), flax_googlenet.from_torchvision(small_state_dict)


@pytest.fixture(scope="module")
def small_torch(small_state_dict: dict[str, np.ndarray]) -> TorchGoogLeNet:
    return reference.build(small_state_dict, transform_input=True, dtype=torch.float64)


@pytest.fixture(scope="module")
def any_size(small: tuple[GoogLeNet, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "g.stablehlo"
    flax_googlenet.export(path, *small)
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """uint8 [2, 16, 19, 3], parts of the two photographs."""
    return np.stack([photograph[150:166, 200:219] for photograph in reference.photographs()])


def normalised(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)


def logits_of(network: TorchGoogLeNet, images: np.ndarray) -> np.ndarray:
    return reference.stages(network, images.astype(np.float64))["fc"]


def read(path: Path) -> jax_export.Exported:
    return jax_export.deserialize(bytearray(path.read_bytes()))


def run_with_jax_alone(code: str, folder: Path) -> None:
    """Runs ``code`` where flax and this library cannot be imported, with 64 bits off and warnings as errors."""
    prologue = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "flax_googlenet"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
"""
    epilogue = "\nassert not any(name.split('.')[0] in ('flax', 'flax_googlenet') for name in sys.modules)\n"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", prologue + code + epilogue], cwd=folder, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


# The file.


@pytest.mark.slow
def test_jax_alone_computes_torchvisions_logits(
    state_dict: dict[str, np.ndarray], variables: dict[str, Any], photographs: np.ndarray, tmp_path: Path
) -> None:
    model = GoogLeNet(transform_input=True)
    flax_googlenet.export(tmp_path / "g.stablehlo", model, variables)
    inputs = {"two": photographs, "one": photographs[:1, 60:80, 60:90]}
    np.savez(tmp_path / "images.npz", **inputs)
    code = """
import numpy
from jax import export
with open("g.stablehlo", "rb") as file:
    predict = export.deserialize(bytearray(file.read())).call
numpy.savez("logits.npz", **{name: predict(images) for name, images in numpy.load("images.npz").items()})
"""
    run_with_jax_alone(code, tmp_path)
    with np.load(tmp_path / "logits.npz") as file:
        logits = dict(file)
    network = reference.build(state_dict, transform_input=True, dtype=torch.float64)
    for name, images in inputs.items():
        assert relative_error(logits[name], logits_of(network, images)) < RTOL


@pytest.mark.slow
def test_the_file_takes_images_of_the_smallest_size(
    small_torch: TorchGoogLeNet, any_size: Path, random_images: Callable[..., np.ndarray]
) -> None:
    images = random_images(3, 15, 15).astype(np.float32)
    assert relative_error(read(any_size).call(images), logits_of(small_torch, images)) < RTOL


def test_too_small_images_are_refused_by_the_file(any_size: Path) -> None:
    with pytest.raises(ValueError, match="refining shapes") as error:
        read(any_size).call(np.zeros((1, 14, 20, 3), np.float32))
    assert "constraint h >= 15" in str(error.value.__cause__)


@pytest.mark.slow
def test_the_file_names_its_platforms(small: tuple[GoogLeNet, Any], any_size: Path, tmp_path: Path) -> None:
    assert read(any_size).platforms == ("cpu", "cuda", "tpu")
    flax_googlenet.export(tmp_path / "g", *small, ["rocm", "cpu"])
    assert set(read(tmp_path / "g").platforms) == {"rocm", "cpu"}


def test_several_platforms_share_the_weights_in_the_file(
    small: tuple[GoogLeNet, Any], any_size: Path, tmp_path: Path
) -> None:
    flax_googlenet.export(tmp_path / "g", *small, ["tpu"])
    assert any_size.stat().st_size < 1.01 * (tmp_path / "g").stat().st_size


@pytest.mark.slow
def test_the_same_input_makes_the_same_bytes_with_no_path_in_them(
    small: tuple[GoogLeNet, Any], any_size: Path, tmp_path: Path
) -> None:
    option = jax.config.values["jax_traceback_in_locations_limit"]
    model, variables = small
    params = {name: block for name, block in variables["params"].items() if not name.startswith("aux")}
    flax_googlenet.export(tmp_path / "g", model.clone(aux_logits=False), {**variables, "params": params})
    data = (tmp_path / "g").read_bytes()
    assert data == any_size.read_bytes()  # which was made from variables with auxiliary heads
    for path in ("model.py", "linear.py", "site-packages", str(Path(flax_googlenet.__file__).parent)):
        assert path.encode() not in data
    assert jax.config.values["jax_traceback_in_locations_limit"] == option


@pytest.mark.slow
def test_uint8_images_are_scaled_and_normalised_inside(
    small: tuple[GoogLeNet, Any], small_torch: TorchGoogLeNet, pixels: np.ndarray, tmp_path: Path
) -> None:
    flax_googlenet.export(tmp_path / "g", *small, uint8=True)
    program = read(tmp_path / "g")
    assert program.in_avals[0].dtype == np.uint8
    assert relative_error(program.call(pixels), logits_of(small_torch, normalised(pixels))) < RTOL


@pytest.mark.slow
def test_the_gradient_is_in_the_file_on_request(
    small: tuple[GoogLeNet, Any], small_torch: TorchGoogLeNet, any_size: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    flax_googlenet.export(tmp_path / "g", *small, size=(16, 19), gradient=True)
    images, predict = normalised(pixels), read(tmp_path / "g").call
    rng = np.random.default_rng(0)
    weights, direction = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 10), images.shape))
    gradient = jax.jit(jax.grad(lambda images: (weights * predict(images)).sum()))(images)

    tensor = torch.from_numpy(images.astype(np.float64)).requires_grad_()
    (torch.from_numpy(weights) * small_torch(tensor.permute(0, 3, 1, 2))).sum().backward()
    error = np.sum((np.asarray(gradient) - tensor.grad.numpy()) * direction)
    assert abs(error) < RTOL * np.linalg.norm(gradient)  # measured 4e-7
    with pytest.raises(ValueError, match="No VJP is available"):
        jax.eval_shape(jax.grad(lambda images: read(any_size).call(images).sum()), images)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "images"), [(jnp.bfloat16, "float32"), (jnp.float64, "float64")])
def test_the_file_computes_in_the_models_dtype(
    small: tuple[GoogLeNet, Any], dtype: Any, images: str, tmp_path: Path
) -> None:
    model, variables = small
    flax_googlenet.export(tmp_path / "g", model.clone(dtype=dtype, precision="highest"), variables, size=(32, 32))
    program = read(tmp_path / "g")
    assert program.in_avals[0].dtype == images
    assert program.out_avals[0].dtype == dtype
    assert "precision = [HIGHEST, HIGHEST]" in program.mlir_module()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platforms": ("cpu", "gpu")}, r"some of cpu, cuda, rocm, tpu, got \('cpu', 'gpu'\)"),
        ({"platforms": ()}, r"some of cpu, cuda, rocm, tpu, got \(\)"),
        ({"platforms": "cpu"}, "some of cpu, cuda, rocm, tpu, got 'cpu'"),
        ({"top": 0}, "top must be from 1 to 10, the number of classes, got 0"),
        ({"top": 11}, "top must be from 1 to 10, the number of classes, got 11"),
        ({"size": (14, 40)}, "size must be at least 15 by 15, got 14 by 40"),
        ({"gradient": True}, "add size"),
        ({"gradient": True, "uint8": True}, "leave out uint8"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_written(
    small: tuple[GoogLeNet, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        flax_googlenet.export(tmp_path / "g", *small, **options)
    assert not list(tmp_path.iterdir())


# The command.


@pytest.fixture
def weights(small: tuple[GoogLeNet, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    flax_googlenet.save(tmp_path / "weights.safetensors", *small)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "weights.safetensors"


@pytest.mark.slow
def test_the_command_prints_the_lines_that_run_its_file_and_top_is_numpys(
    small_torch: TorchGoogLeNet, weights: Path, pixels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--platforms", "cpu", "--uint8", "--top", "2", "--size", "16", "19"]
    assert main(["export", "--weights", str(weights), "--output", "it's.stablehlo", *options]) == 0
    told, _, lines = capsys.readouterr().out.partition("\n\n")
    assert told.startswith("wrote it's.stablehlo: 22.4 MB, for cpu.")
    assert lines.endswith("probabilities, indices = predict(images)  # uint8 RGB [N, 16, 19, 3]\n")
    assert lines.count("\n") == 3

    np.save("pixels.npy", pixels)
    run = "numpy.savez('answers.npz', probabilities=probabilities, indices=indices)"
    run_with_jax_alone(f"import numpy; images = numpy.load('pixels.npy')\n{lines}{run}", weights.parent)
    with np.load("answers.npz") as file:
        answers = dict(file)
    exponentials = np.exp(logits_of(small_torch, normalised(pixels)))
    expected = exponentials / exponentials.sum(1, keepdims=True)
    order = np.argsort(-expected)[:, :2]
    assert answers["indices"].dtype == np.int32
    np.testing.assert_array_equal(answers["indices"], order)
    assert answers["probabilities"].dtype == np.float32
    assert relative_error(answers["probabilities"], np.take_along_axis(expected, order, 1)) < RTOL


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--output", "g", "--top", "11"], 2, "top must be from 1 to 10"),
        (["--output", "g", "--platforms", "gpu"], 2, "platforms must be some of"),
        (["--output", "g", "--gradient"], 2, "add size"),
        (["--output", "g", "--weights", "no.safetensors"], 3, "cannot read no.safetensors: No such file"),
        (["--output", "g", "--weights", "other.safetensors"], 3, "other.safetensors is not a checkpoint"),
        (["--output", "no/g"], 3, "cannot write no/g: there is no folder no"),
        (["--output", "."], 3, "cannot write .: "),
        (["--output", "link"], 2, "link is the file of weights"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line_and_by_the_status(
    weights: Path, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.safetensors").write_bytes(b"not one")
    content = weights.read_bytes()
    Path("link").symlink_to(weights)
    before = set(os.listdir())
    assert main(["export", "--weights", str(weights), *arguments]) == status
    assert weights.read_bytes() == content
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert set(os.listdir()) == before
