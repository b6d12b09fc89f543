"""How commands end: by which status, and with which message when nobody expected the error or JAX cannot start."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import port_weights
import pytest

from flax_googlenet.commands import cli, status
from flax_googlenet.commands.status import CommandError, CrashError, UsageError, describe_crash, exit_status
from flax_googlenet.commands.train import display
from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.inference.export import ExportError
from flax_googlenet.training import TrainingStopped
from flax_googlenet.weights.checkpoint import CheckpointError

CLASSIFY = ("-m", "flax_googlenet", "classify", "photo.jpg")
EXPORT = ("-m", "flax_googlenet", "export", "--weights", "weights.safetensors", "--output", "out")
TRAIN = ("-m", "flax_googlenet", "train", "digits", "--workdir", "run")
PORT = (port_weights.__file__, "random")


def run(cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TMPDIR": str(cwd)} | variables
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for below in kind.__subclasses__():
        yield from subclasses(below)


def test_the_table_of_statuses_names_exceptions_that_exist() -> None:
    known = {*subclasses(GoogLeNetError), OSError, BrokenPipeError}
    assert status.STATUSES.keys() <= {kind.__name__ for kind in known}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UsageError("a"), 2),
        (ExportError("a"), 2),
        (CommandError("a"), 3),
        (CheckpointError("a"), 3),
        (PermissionError(), 3),
        (TrainingStopped("a"), 4),
        (CrashError("a"), 70),
        (ValueError(), 70),
        (BrokenPipeError(), 141),
    ],
)
def test_an_error_ends_a_command_with_the_status_of_its_kind(error: Exception, expected: int) -> None:
    assert exit_status(error) == expected


@pytest.mark.parametrize("command", [CLASSIFY, TRAIN, PORT])
def test_an_unexpected_error_ends_with_status_70_and_one_line_that_names_the_file_of_its_traceback(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    process = run(tmp_path, *command, JAX_ENABLE_X64="perhaps")  # which no code of ours expects
    assert (process.returncode, process.stdout) == (70, "")
    (path,) = tmp_path.iterdir()
    message = r"error: unexpected ValueError: invalid truth value 'perhaps' .*; the traceback is in (.*), please report"
    *lines, error = process.stderr.splitlines()
    found = re.match(message, error)
    assert found
    assert found[1] == str(path)
    assert lines == ([cli.STARTING] if command is TRAIN else [])  # before JAX is imported, as it fails here
    report = path.read_text()
    assert "Traceback (most recent call last)" in report
    assert "perhaps" in report.splitlines()[-1]


def test_a_crash_of_a_run_leaves_its_traceback_in_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("flax_googlenet.training.run.resume_run")  # a defect
    assert cli.main(["train", "digits", "--workdir", str(tmp_path)]) == 70
    (path,) = tmp_path.glob("*crash*")
    said = capsys.readouterr().err.splitlines()[-1]
    assert "unexpected NameError: name 'resume_run' is not defined" in said
    assert f"the traceback is in {path}" in said


def test_a_traceback_that_cannot_be_written_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = describe_crash(ValueError("two\nlines"), tmp_path / "missing")
    assert said == "unexpected ValueError: two; please report it with the traceback above"
    assert "ValueError: two\nlines\n" in capsys.readouterr().err


def test_a_run_shows_names_as_they_are_and_goes_on_where_nobody_reads_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with display() as shown:
        shown["report"]("a:cat:[b]\x1b.jpg")
    assert capsys.readouterr().err == "a:cat:[b]\\x1b.jpg\n"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with display() as shown:
            shown["report"]("a message")


def test_a_traceback_holds_no_password_of_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["port_weights.py", "https://user:secret@host/a.pth?key=secret"])
    said = describe_crash(ValueError("no https://user:secret@host/b.pth?key=secret"), tmp_path)
    (path,) = tmp_path.iterdir()
    assert said.startswith("unexpected ValueError: no https://host/b.pth; ")
    assert "'https://host/a.pth'" in (report := path.read_text())
    assert "secret" not in report


@pytest.mark.parametrize("command", ["classify", "evaluate", "export", "train", "port_weights.py"])
def test_the_help_of_each_command_documents_the_status_of_a_crash(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        port_weights.main(["--help"]) if command == "port_weights.py" else cli.main([command, "--help"])
    assert re.search(r"70 +an unexpected error", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "platform"), [(CLASSIFY, "cuda"), (EXPORT, "cuad"), (TRAIN, "tpu"), (PORT, "gpu")])
@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="this machine has a GPU")
def test_a_platform_that_is_not_there_is_refused_by_name_with_status_3(
    command: tuple[str, ...], platform: str, tmp_path: Path
) -> None:
    process = run(tmp_path, *command, JAX_PLATFORMS=platform)
    assert (process.returncode, process.stdout) == (3, ""), process.stderr
    error = process.stderr.splitlines()[-1]
    assert error.startswith(f"error: JAX cannot start with JAX_PLATFORMS={platform}: ")
    assert "unset it" in error
    assert list(tmp_path.iterdir()) == []
