"""Every command takes pretrained weights by their name, and ``classify`` takes them where there are no others."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import reference
import torch
from PIL import Image
from serving import serve

from flax_googlenet.commands.cli import main
from flax_googlenet.weights.pretrained import PRETRAINED

NAME = "googlenet-1378be20.pth"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with an empty cache and an empty mirror beside it."""
    for folder in ("here", "mirror"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("FLAX_GOOGLENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "command",
    [
        "classify photo.png --weights imagenet",
        "evaluate imagenet digits",
        "export --weights imagenet --output googlenet.stablehlo",
        "summary --weights imagenet",
        "summary --weights bvlc",
        "train digits --workdir run --weights imagenet",
    ],
)
def test_every_command_takes_pretrained_weights_by_their_name(
    command: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save("photo.png")
    (here / "imagenet").mkdir()  # a folder of data, perhaps
    assert main(command.split()) == 3
    error = capsys.readouterr().err
    name = "bvlc_googlenet.caffemodel" if "bvlc" in command else NAME
    assert f"cannot read {tmp_path / 'mirror' / name}: No such file or directory; set FLAX_GOOGLENET_MIRROR" in error
    assert {path.name for path in here.iterdir()} == {"imagenet", "photo.png"}


def test_classify_without_weights_takes_imagenet_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save("photo.png")
    assert main(["classify", "photo.png"]) == 3
    error = capsys.readouterr().err
    assert "no --weights, and no googlenet-imagenet.safetensors or googlenet-random.safetensors in this folder" in error
    assert "taking imagenet" in error
    assert f"{NAME}: No such file or directory" in error


@pytest.mark.usefixtures("here")
def test_a_download_is_announced_with_its_place_and_happens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO()
    state_dict = reference.random_checkpoint()
    torch.save({key: tensor for key, tensor in state_dict.items() if not key.startswith("aux")}, file)
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    monkeypatch.setitem(PRETRAINED, "imagenet", PRETRAINED["imagenet"]._replace(sha256=digest))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(file.getvalue()) as server:
        monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", server.url.removesuffix("/model.pth"))
        assert main(["summary", "--weights", "imagenet", "--json"]) == 0
    screen = capsys.readouterr()
    assert screen.err == f"downloading the weights imagenet, once: they are kept in {tmp_path / 'cache'}\n"
    assert json.loads(screen.out)["parameters"] == 6_624_904
    assert main(["summary", "--weights", "imagenet", "--json"]) == 0
    assert capsys.readouterr() == (screen.out, "")
