"""What commands print and draw, and where nobody reads it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from flax_googlenet.commands.terminal import Messages, draws_progress


@pytest.mark.parametrize("name", ["a\\", "a\\\\", "[b]\\[x]", "\\[/]", "a:cat:.jpg"])
def test_a_message_shows_a_name_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Messages().fail(name)
    assert capsys.readouterr().err == f"error: {name}\n"


def test_the_work_goes_on_where_nobody_reads_standard_error_any_more() -> None:
    script = """if True:
        from flax_googlenet.commands.terminal import message_console, write_output
        console = message_console()
        for i in range(2):
            console.print("a message")
            write_output("a result")"""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert (process.returncode, process.stdout) == (0, b"a resulta result")


@pytest.mark.parametrize(
    ("variables", "encoding", "is_drawn"),
    [
        ({}, "utf-8", True),
        ({"TERM": "dumb"}, "utf-8", False),
        ({"TTY_COMPATIBLE": "0"}, "utf-8", False),
        ({"TTY_INTERACTIVE": "0"}, "utf-8", False),
        ({"JPY_PARENT_PID": "1", "FORCE_COLOR": "1"}, "utf-8", False),  # as Jupyter sets them
        ({}, "latin-1", False),
    ],
)
def test_bars_are_drawn_on_terminals_that_can_show_them(
    variables: dict[str, str], encoding: str, is_drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JPY_PARENT_PID", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    ours, theirs = os.openpty()
    with open(theirs, "w", encoding=encoding) as terminal:
        assert draws_progress(Console(file=terminal)) == is_drawn
    os.close(ours)


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_no_variable_has_bars_drawn_into_a_pipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, "1")
    assert not draws_progress(Console(file=io.StringIO()))


def test_neither_a_closed_standard_output_nor_the_backend_of_a_notebook_stops_a_command(tmp_path: Path) -> None:
    code = """
from flax_googlenet.commands.terminal import prepare_process, write_output
prepare_process()
assert open("answers.csv").fileno() != 1
write_output("nobody reads this")
import matplotlib.figure
"""
    (tmp_path / "answers.csv").touch()
    environment = os.environ | {"MPLBACKEND": "module://missing"}
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr) == (0, "")
