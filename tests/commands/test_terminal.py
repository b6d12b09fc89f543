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


@pytest.mark.parametrize(("unread", "other"), [("stderr", "stdout"), ("stdout", "stderr")])
def test_the_work_goes_on_where_nobody_reads_a_console_any_more(unread: str, other: str) -> None:
    script = f"""if True:
        import sys
        from flax_googlenet.commands.terminal import make_console
        console = make_console(file=sys.{unread})
        for i in range(2):
            console.print("a message")
            print("a result", file=sys.{other})"""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, "-c", script], **{unread: writer, other: subprocess.PIPE})
    os.close(writer)
    assert (process.returncode, getattr(process, other)) == (0, b"a result\na result\n")


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
