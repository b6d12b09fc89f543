"""The words of the command line: help that fits the terminal, and what is said of arguments that are wrong."""

import re
import subprocess
import sys
from contextlib import suppress

import pytest

from flax_googlenet.commands import cli
from flax_googlenet.training.recipe import PRESETS


def words(text: str) -> list[str]:
    """The words in alphabetical order, without the lines of boxes."""
    return sorted(word for word in text.split() if not re.fullmatch(r"[-+|•─│╭╮╰╯]+", word))


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in cli.SUBCOMMANDS if name != "train"), *(["train", "--preset", name] for name in PRESETS)],
    ids=" ".join,
)
def test_help_fits_the_terminal_and_breaks_no_word(
    command: list[str], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(columns: int) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with suppress(SystemExit):
            assert cli.main([*command, "--help"]) == 0
        return capsys.readouterr().out

    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    assert words(text) == words(shown(1000))


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_help_needs_no_extra_and_does_not_wait_for_jax_and_numpy(name: str) -> None:
    extras = ("grain", "matplotlib", "optax", "orbax", "sklearn", "tensorboardX")
    missing = dict.fromkeys(("jax", "flax", "numpy", *extras))
    code = f"import sys; sys.modules.update({missing}); from flax_googlenet.__main__ import main; sys.exit(main())"
    process = subprocess.run([sys.executable, "-c", code, name, "--help"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert f"usage: flax-googlenet {name}" in process.stdout
    assert ("--recipe.learning-rate" in process.stdout) == (name == "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clasify", "a.jpg"], f"clasify is no command: the commands are {', '.join(cli.SUBCOMMANDS)}"),
        ([], f"a command is missing: the commands are {', '.join(cli.SUBCOMMANDS)}"),
        (
            ["classify", "a.jpg", "--wieghts", "x"],
            "--wieghts is no argument of this command: did you mean --weights? "
            "flax-googlenet classify --help lists all",
        ),
    ],
)
def test_a_wrong_word_gets_one_line_with_what_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
