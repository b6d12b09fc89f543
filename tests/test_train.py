"""The command line of ``flax-googlenet train``: which recipe, and what is refused before anything is trained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flax_googlenet import cli
from flax_googlenet.training.recipe import PRESETS


@pytest.mark.parametrize(
    ("arguments", "preset"),
    [
        (["digits", "--workdir", "run"], "digits"),
        (["--workdir", "digits", "photos"], "imagenet"),
        (["photos", "--workdir", "run", "--weights", "digits"], "finetune"),
        (["digits", "--workdir", "run", "--preset", "paper"], "paper"),
    ],
)
def test_help_shows_the_recipe_that_the_command_line_asks_for(
    arguments: list[str], preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", *arguments, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in ("epochs", "batch_size", "learning_rate", "weight_decay", "held_out"):
        assert f"--recipe.{name.replace('_', '-')}" in shown
    assert f"How often every image is seen. (default: {PRESETS[preset].epochs})" in shown
    assert f"The rate before the last layer. (default: {PRESETS[preset].dropout})" in shown


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--recipe.epochs=0", "epochs must be at least 1"),
        ("--recipe.frozen=conv9", "frozen must name blocks among conv1, conv2"),
        ("--recipe.colour=red", "--recipe.colour"),
        ("--preset=alexnet", "--preset alexnet: must be one of paper, imagenet, finetune, digits"),
    ],
)
def test_what_makes_no_sense_ends_with_status_2(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["train", "digits", "--workdir", str(tmp_path / "run"), option])
    except SystemExit as end:  # tyro's own way
        assert isinstance(end.code, int)
        status = end.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def refused(workdir: Path, *arguments: str, **variables: str) -> str:
    """What the command says, in one line and with status 3."""
    command = [sys.executable, "-m", "flax_googlenet", "train", *arguments, "--workdir", str(workdir)]
    process = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (3, "", 1), process.stderr
    return process.stderr


def test_data_that_are_not_there_are_refused(tmp_path: Path) -> None:
    said = refused(tmp_path / "run", str(tmp_path / "photos"))
    assert f"error: {tmp_path}/photos: no such folder; expected one of a folder of train/ and val/" in said


def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(bytes(100))
    said = refused(tmp_path / "run", "digits", "--weights", str(tmp_path / "photo.jpg"))
    assert "photo.jpg is not a checkpoint of flax_googlenet" in said


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path / "run", "digits", JAX_NUM_CPU_DEVICES="3", JAX_PLATFORMS="cpu")
    assert "a batch of 32 cannot be shared evenly by 3 cpu" in said


def test_a_distributed_run_without_others_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path / "run", "digits", "--distributed", JAX_PLATFORMS="cpu")
    assert "--distributed: coordinator_address should be defined. Start it by srun or mpirun" in said
