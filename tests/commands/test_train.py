"""The command line of ``flax-googlenet train``: which recipe, and what is refused before anything is trained."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flax_googlenet
from flax_googlenet.architecture import BLOCKS
from flax_googlenet.commands import cli
from flax_googlenet.training.recipe import PRESETS
from flax_googlenet.training.run_folder import claim


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
    assert f"--preset {'|'.join(PRESETS)} Recipe" in shown
    for name in ("epochs", "batch_size", "learning_rate", "weight_decay", "held_out"):
        assert f"--recipe.{name.replace('_', '-')}" in shown
    assert f"Number of passes over the training images. (default: {PRESETS[preset].epochs})" in shown
    assert f"Dropout rate before the last layer. (default: {PRESETS[preset].dropout})" in shown


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--recipe.epochs=0", "Error parsing recipe: epochs must be at least 1"),
        ("--recipe.frozen=conv9", "frozen must name blocks among conv1, conv2"),
        (
            "--recipe.colour=red",
            "error: --recipe.colour=red is no argument of this command: flax-googlenet train --help",
        ),
        (
            "--recipe.lr=1",
            "--recipe.lr=1 is no argument of this command: did you mean --recipe.learning-rate? flax-",
        ),
        ("--batch_siz=8", "--batch_siz=8 is no argument of this command: did you mean --recipe.batch-size? flax-goo"),
        ("--weihgts=FILE", "--weihgts=FILE is no argument of this command: did you mean --weights? flax-goo"),
        ("photos", "error: photos is no argument of this command: flax-googlenet train --help lists all"),
        ("--preset=alexnet", "--preset alexnet: must be one of paper, bvlc, imagenet, finetune, small, digits"),
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


def test_an_option_without_its_value_gets_the_usage_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "digits", "--workdir"])
    said = capsys.readouterr().err
    assert "--workdir" in said
    assert "flax-googlenet train --help" in said


@pytest.mark.parametrize("arguments", [["train", "digits", "--workdir", "run"], ["evaluate", "digits"]])
def test_a_missing_package_of_the_extra_is_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)  # what Python itself does for a module that must not be there
    assert cli.main(arguments) == 3
    advice = 'install flax-googlenet with its extra "train": pip install "flax-googlenet[train]"'
    assert capsys.readouterr().err.splitlines()[-1] == f"error: grain is not installed: {advice}"


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command says, in one line and with status 3."""

    def refusal(*arguments: str) -> str:
        assert cli.main(["train", *arguments, "--workdir", str(tmp_path / "run")]) == 3
        captured = capsys.readouterr()
        starting, error = captured.err.splitlines()
        assert (captured.out, starting) == ("", cli.STARTING)
        existed = {"in use", "cannot write"}  # a run that is refused leaves no folder
        assert any(words in error for words in existed) or not (tmp_path / "run").exists()
        return error

    return refusal


def test_data_that_are_not_there_are_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    said = refusal(str(tmp_path / "photos"))
    assert f"error: {tmp_path}/photos: no such folder; expected a folder with train/ and val/" in said


def test_weights_that_are_none_are_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "photo.jpg").write_bytes(bytes(100))
    said = refusal("digits", "--weights", str(tmp_path / "photo.jpg"))
    assert "photo.jpg is not a checkpoint of flax_googlenet" in said


def test_frozen_blocks_that_the_weights_have_not_are_refused(
    tmp_path: Path, variables: dict[str, Any], refusal: Callable[..., str]
) -> None:
    params = {name: block for name, block in variables["params"].items() if not name.startswith("aux")}
    stats = {name: block for name, block in variables["batch_stats"].items() if not name.startswith("aux")}
    model = flax_googlenet.GoogLeNet(aux_logits=False)
    flax_googlenet.save(tmp_path / "small.safetensors", model, {"params": params, "batch_stats": stats})
    said = refusal("digits", "--weights", str(tmp_path / "small.safetensors"), "--recipe.frozen", "fc", "aux1")
    assert "frozen: the weights have no aux1" in said


def test_a_recipe_that_freezes_all_blocks_is_refused(refusal: Callable[..., str]) -> None:
    assert "nothing would train: leave out fc" in refusal("digits", "--recipe.frozen", *BLOCKS)


def test_more_batches_to_accumulate_than_there_are_are_refused(refusal: Callable[..., str]) -> None:
    said = refusal("digits", "--recipe.accumulate=10000")
    assert "takes 10000: set accumulate to 528 or less" in said
    assert "1438 images make 528 steps, and a change of the weights " in said


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (2000, "1438 images are less than a batch of 2000: choose a batch_size of 1438 or less"),
        (1, "BatchNorm cannot train on one image of 32x32 pixels at a time: choose a batch_size of 2 or more"),
    ],
)
def test_a_batch_that_is_too_large_or_too_small_is_refused_with_the_size_to_choose(
    size: int, message: str, refusal: Callable[..., str]
) -> None:
    assert message in refusal("digits", f"--recipe.batch-size={size}")


def test_a_run_in_use_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    with claim(tmp_path / "run"):
        assert f"{tmp_path}/run is in use by process {os.getpid()}" in refusal("digits")


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    assert f"{tmp_path}/run: it is not a folder; choose another --workdir" in refusal("digits")


def refused(workdir: Path, *arguments: str, **variables: str) -> str:
    """The same, in a process of its own."""
    command = [sys.executable, "-m", "flax_googlenet", "train", *arguments, "--workdir", str(workdir)]
    process = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (3, ""), process.stderr
    starting, error = process.stderr.splitlines()
    assert starting == cli.STARTING
    assert not workdir.exists()
    return error


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path / "run", "digits", JAX_NUM_CPU_DEVICES="3", JAX_PLATFORMS="cpu")
    assert "a batch of 32 cannot be shared evenly by 3 cpu: choose a batch_size of 30, or another multiple" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "coordinator_address should be defined"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1"}, "127.0.0.1 is not a host and a port, such as 10.0.0.1:1234"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234", "JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID=two is not a number"),
    ],
)
def test_a_distributed_run_without_others_is_refused(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    said = refused(tmp_path / "run", "digits", "--distributed", JAX_PLATFORMS="cpu", **variables)
    assert f"{message}. Start it by srun or mpirun" in said
