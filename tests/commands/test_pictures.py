"""``flax-googlenet explain``, ``visualize`` and ``dream``: the pictures that they write, and wrong arguments."""

from pathlib import Path

import numpy as np
import pytest
import reference
from PIL import Image

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.commands import cli

NAMES = ["cat", "dog", "\U00013080"]  # few fonts have Egyptian hieroglyphs
WEIGHTS = ("--weights", "weights.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a network for small images, and a photograph."""
    folder = tmp_path_factory.mktemp("pictures")
    state_dict = reference.random_checkpoint(num_classes=3)
    variables = flax_googlenet.from_torchvision(
        {name: tensor.numpy() for name, tensor in state_dict.items() if not name.startswith("aux")}
    )
    metadata = {"class_names": NAMES, "recipe": {"image_size": 32}}
    flax_googlenet.save(folder / "weights.safetensors", GoogLeNet(num_classes=3, aux_logits=False), variables, metadata)
    Image.fromarray(reference.photographs()[1][:50, :70]).save(folder / "flower.png")
    return folder


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)


def pixels(file: str) -> np.ndarray:
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"), np.int64)


@pytest.mark.slow
def test_explain_shows_the_photograph_and_a_heat_for_each_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "flower.png", *WEIGHTS, "--stage", "mixed3a", "--top", "9"]) == 0
    captured = capsys.readouterr()
    assert all(f"{name} " in captured.out for name in NAMES)
    picture = pixels("explanation.png")
    assert picture.shape[1] > 3 * picture.shape[0]  # four panels
    photograph, *heats = (np.ptp(panel, axis=2) > 32 for panel in np.array_split(picture, 4, axis=1))  # is coloured
    assert photograph.mean() > 0.2
    assert all(0.01 < heat.mean() < 0.5 for heat in heats)  # over the photograph in grey


@pytest.mark.slow
def test_visualize_draws_a_grid_of_the_channels_and_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["visualize", "mixed3a", "--channels", "3", "17", "40", *WEIGHTS, "--steps", "5", "--size", "32"]
    assert cli.main([*command, "--output", "first.png"]) == 0
    assert "3, 17, 40" in capsys.readouterr().out
    picture = pixels("first.png")
    assert picture.shape == (70, 70, 3)  # two by two images with a gap of 6 pixels
    assert (picture[38:, 38:] == 255).all()
    assert (picture[:32, :32] != picture[:32, 38:]).any()
    assert cli.main([*command, "--output", "second.png"]) == 0
    np.testing.assert_array_equal(pixels("second.png"), picture)


@pytest.mark.slow
def test_dream_keeps_the_size_and_changes_the_pixels() -> None:
    command = ["dream", "flower.png", *WEIGHTS, "--stage", "mixed3a", "--octaves", "2", "--steps", "2"]
    assert cli.main(command) == 0
    change = np.abs(pixels("dream.png") - pixels("flower.png"))
    assert change.shape == (50, 70, 3)
    assert 1 < change.mean() < 30


@pytest.mark.parametrize(
    ("command", "status", "named"),
    [
        ("explain flower.png --output heat.jpg", 2, "heat.jpg"),
        ("explain flower.png --stage mixed6a", 2, "mixed5a"),
        ("explain flower.png --top 0", 2, "--top"),
        ("explain flower.png --top 101", 2, "100"),
        pytest.param("explain flower.png --stage fc --weights weights.safetensors", 2, "fc", marks=pytest.mark.slow),
        pytest.param(
            "explain flower.png --stage norm1 --weights weights.safetensors", 2, "norm1", marks=pytest.mark.slow
        ),
        ("explain nothing.png --weights nothing.safetensors", 3, "nothing.png"),
        ("visualize mixed6a --channels 1", 2, "mixed5a"),
        ("visualize mixed3a --channels 9999999999 --weights weights.safetensors --size 32", 2, "0 to 255"),
        ("visualize mixed3a --channels", 2, "--channels"),
        ("visualize mixed3a --channels 1 --seed 4294967296", 2, "--seed"),
        ("visualize mixed3a --channels 1 --size 400000 --weights weights.safetensors", 3, "--size"),  # 2 TB
        ("visualize mixed3a --channels 1 --size 14 --weights weights.safetensors", 2, "size"),
        ("dream flower.png --output no/folder.png", 3, "no/folder.png"),
        ("dream flower.png --steps 0", 2, "--steps"),
        ("dream flower.png --seed -1", 2, "--seed"),
        ("dream flower.png --stage norm1 --weights weights.safetensors", 2, "norm1"),
        ("dream weights.safetensors --weights weights.safetensors", 3, "weights.safetensors"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    command: str, status: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command.split()) == status
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert {path.name for path in Path().iterdir()} == {"weights.safetensors", "flower.png"}


def test_a_picture_that_is_too_small_for_a_dream_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (14, 30)).save("tiny.png")
    assert cli.main(["dream", "tiny.png", *WEIGHTS]) == 3
    assert "tiny.png" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["visualize mixed3a --channels 1", "dream flower.png"])
def test_weights_that_are_not_finite_give_no_picture(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, variables = flax_googlenet.load("weights.safetensors")
    variables["params"]["conv1"]["bn"]["bias"] = variables["params"]["conv1"]["bn"]["bias"] * np.nan
    flax_googlenet.save("damaged.safetensors", model, variables)
    assert cli.main([*command.split(), "--weights", "damaged.safetensors"]) == 3
    assert "damaged.safetensors" in capsys.readouterr().err
    assert {path.name for path in Path().glob("*.png")} == {"flower.png"}


@pytest.mark.parametrize("command", ["explain flower.png", "visualize mixed3a --channels 1", "dream flower.png"])
def test_a_folder_in_the_place_of_the_picture_is_refused_before_the_weights_are_read(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder.png").mkdir()
    assert cli.main([*command.split(), "--weights", "missing.safetensors", "--output", "folder.png"]) == 3
    assert "folder.png" in capsys.readouterr().err
