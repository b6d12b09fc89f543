"""What a package index gets: the sdist and the wheel build, install and run, and their page has no broken link."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

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
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
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


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_runs_there(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    # The dependencies are those of this environment: the test needs no network connection.
    site_packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    script = (
        "import flax_googlenet as g, flax_googlenet.training as t; "
        "[getattr(m, name) for m in (g, t) for name in m.__all__]; print(g.__file__, g.__version__)"
    )
    file, version = run(python, "-I", "-c", script, cwd=tmp_path).split()
    assert Path(file).is_relative_to(site_packages)
    command = tmp_path / "venv" / "bin" / "flax-googlenet"
    assert run(command, "--version", cwd=tmp_path).split() == ["flax-googlenet", version]
    assert "classify" in run(command, "--help", cwd=tmp_path)


def test_the_page_of_a_package_index_has_no_link_that_needs_the_repository(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = message_from_bytes(archive.read(metadata))
    assert message["Description-Content-Type"] == "text/markdown"
    description = str(message.get_payload())
    assert "# flax-googlenet" in description
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", description))
