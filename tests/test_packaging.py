"""What a package index gets: the sdist and the wheel build, install and run, and their page has no broken link."""

import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import numpy as np
import pytest
import reference
import safetensors.torch
import scipy.special
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the sdist alone, as an installer builds it."""
    run("tar", "-xf", sdist, cwd=sdist.parent)  # tarfile warns without a filter, which Python 3.11.2 does not know
    source = sdist.parent / sdist.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", sdist.parent, cwd=source)
    return next(sdist.parent.glob("*.whl"))


def test_the_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    # Also those that are not committed yet.
    files = run(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", "flax_googlenet", cwd=ROOT
    ).splitlines()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(files)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel, and with the packages of this environment except PyTorch.

    So the tests need no network connection.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    packages = folder / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("torch", "functorch", "flax_googlenet")):
            (packages / path.name).symlink_to(path)
    site_packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(str(packages))
    return python


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_runs_there(python: Path, tmp_path: Path) -> None:
    script = (
        "import flax_googlenet as g, flax_googlenet.training as t; "
        "[getattr(m, name) for m in (g, t) for name in m.__all__]; print(g.__file__, g.__version__)"
    )
    file, version = run(python, "-I", "-c", script, cwd=tmp_path).split()
    assert Path(file).is_relative_to(python.parents[1])
    command = python.with_name("flax-googlenet")
    assert run(command, "--version", cwd=tmp_path).split() == ["flax-googlenet", version]
    assert "classify" in run(command, "--help", cwd=tmp_path)


LOGITS = """
import importlib.util, jax, numpy as np
jax.config.update("jax_enable_x64", True)
import flax_googlenet
assert not (importlib.util.find_spec("torch") or importlib.util.find_spec("torchvision"))
model = flax_googlenet.GoogLeNet(num_classes=10, dtype="float64", param_dtype="float64")
apply = jax.jit(model.apply)
for name in ("zip.pth", "legacy.pth", "model.safetensors"):
    variables = flax_googlenet.from_torchvision(flax_googlenet.read_state_dict(name))
    variables = jax.tree.map(lambda x: x.astype("float64"), variables)
    np.save(f"{name}.npy", apply(variables, np.load("images.npy")).logits)
"""


@pytest.mark.slow
def test_without_pytorch_its_files_give_torchvisions_logits(
    python: Path, tmp_path: Path, random_images: Callable[..., np.ndarray]
) -> None:
    tensors = reference.random_checkpoint(num_classes=10)
    torch.save(tensors, tmp_path / "zip.pth")
    torch.save(tensors, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    images = random_images(2, 64, 64)
    np.save(tmp_path / "images.npy", images)
    run(python, "-I", "-c", LOGITS, cwd=tmp_path)
    state_dict = {key: tensor.numpy() for key, tensor in tensors.items()}
    network = reference.build(state_dict, transform_input=False, dtype=torch.float64)
    expected = reference.stages(network, images)["fc"]
    for name in ("zip.pth", "legacy.pth", "model.safetensors"):
        actual = np.load(tmp_path / f"{name}.npy")
        assert np.abs(actual - expected).max() <= 1e-12 * np.abs(expected).max()  # measured: 8e-15


CLASSIFY = """
import sys
from flax_googlenet.commands.cli import main
from flax_googlenet.weights.pretrained import PRETRAINED
PRETRAINED["imagenet"] = PRETRAINED["imagenet"]._replace(sha256=sys.argv[1])
sys.exit(main(["classify", "photo.png", "--json", "--top", "1"]))
"""


@pytest.mark.slow
def test_without_a_clone_and_pytorch_classify_answers_as_torchvisions_network_does(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are random; those of ImageNet would have to be downloaded."""
    tensors = reference.random_checkpoint()
    torch.save(tensors, tmp_path / "googlenet-1378be20.pth")
    digest = hashlib.sha256((tmp_path / "googlenet-1378be20.pth").read_bytes()).hexdigest()
    photograph = Image.fromarray(reference.photographs()[0])
    photograph.save(tmp_path / "photo.png")
    monkeypatch.setenv("FLAX_GOOGLENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", str(tmp_path))
    (answer,) = json.loads(run(python, "-I", "-c", CLASSIFY, digest, cwd=tmp_path))["predictions"]

    state_dict = {key: tensor.numpy() for key, tensor in tensors.items()}
    network = reference.build(state_dict, transform_input=True, dtype=torch.float32)
    images = reference.IMAGENET.transforms()(photograph).permute(1, 2, 0)[None].contiguous().numpy()
    logits = reference.stages(network, images)["fc"][0]
    index = int(logits.argmax())
    assert (answer["index"], answer["label"]) == (index, reference.IMAGENET.meta["categories"][index])
    np.testing.assert_allclose(answer["probability"], scipy.special.softmax(logits)[index], rtol=2e-5)  # measured: 1e-6


def test_the_page_of_a_package_index_has_no_link_that_needs_the_repository(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = message_from_bytes(archive.read(metadata))
    assert message["Description-Content-Type"] == "text/markdown"
    description = str(message.get_payload())
    assert "# flax-googlenet" in description
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", description))
