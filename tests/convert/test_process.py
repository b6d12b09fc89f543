"""Ctrl-C, as real signals to real processes: it always ends them, quietly, and leaves nothing half-written."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import port_weights
import pytest

MESSAGE = "interrupted: no output is half-written\n"
SCRIPT = port_weights.__file__


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    folders = (str(Path(SCRIPT).parent), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def on_a_terminal(*arguments: str, moment: float, cwd: Path) -> tuple[int, str]:
    """Return the status and the screen of a command that is interrupted ``moment`` seconds after its first word."""
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=cwd, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        screen = b""
        while b"starting" not in screen:
            screen += os.read(ours, 1000)
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        try:
            while data := os.read(ours, 1000):
                screen += data
        except OSError:  # what Linux raises when the other side is closed
            pass
    os.close(ours)
    return process.returncode, screen.decode().replace("\r\n", "\n")


@pytest.mark.slow
@pytest.mark.parametrize("moment", [*np.linspace(0, 3, 12).round(2).tolist(), 8.0])
def test_ctrl_c_ends_the_command_at_any_moment(moment: float, tmp_path: Path) -> None:
    status, screen = on_a_terminal("random", moment=moment, cwd=tmp_path)
    assert status == 130
    assert screen.endswith("\x1b[?25h" + MESSAGE)  # the spinner hides the cursor, and this shows it again
    assert "Traceback" not in screen
    assert "None" not in screen  # in place of an unknown number of runs
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost(tmp_path: Path) -> None:
    code = """
import gc, signal
from process import ends_on_ctrl_c
gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))
with ends_on_ctrl_c(as_json=False):
    gc.collect()
"""
    process = run(code, tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", MESSAGE)


def test_where_ctrl_c_raises_no_callback_of_the_garbage_collector_runs(tmp_path: Path) -> None:
    code = """
import gc
from process import cleans_up, ends_on_ctrl_c
gc.callbacks.append(lambda *_: print("collected"))
with ends_on_ctrl_c(as_json=False), cleans_up():
    lists = [[] for _ in range(100_000)]  # far more than cause a collection
    gc.callbacks.pop()
assert gc.isenabled()
"""
    process = run(code, tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_ctrl_c_while_the_output_is_written_leaves_nothing_beside_it(tmp_path: Path) -> None:
    code = """
import os, signal
from flax_googlenet.files import write_atomically
from process import cleans_up, ends_on_ctrl_c
os.fsync = lambda fd: signal.raise_signal(signal.SIGINT)  # when the data is written but not yet renamed
with ends_on_ctrl_c(as_json=True), cleans_up():
    write_atomically("new", b"contents")
"""
    process = run(code, tmp_path)
    assert (process.returncode, process.stderr) == (130, MESSAGE)
    assert json.loads(process.stdout) == {"status": 130, "error": "interrupted"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_in_a_download_without_a_hash_leaves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/model.pth"
        environment = {**os.environ, "TMPDIR": str(scratch), "TORCH_HOME": str(tmp_path)}
        command = [sys.executable, SCRIPT, url]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome")
                while process.poll() is None and not list(scratch.rglob("*.partial")):
                    time.sleep(0.01)
                process.send_signal(signal.SIGINT)
                assert process.stderr is not None
                assert process.stderr.read() == MESSAGE
                assert process.wait() == 130
    assert list(scratch.iterdir()) == []


PORTING = """
from process import cleans_up, ends_on_ctrl_c
with ends_on_ctrl_c(as_json=False):
    signal.raise_signal(signal.SIGINT)
    with cleans_up():
        signal.raise_signal(signal.SIGINT)
"""
TRAINING = """
import sys
from flax_googlenet.__main__ import main
from flax_googlenet.training.stopping import StopSignals
sys.argv = ["flax-googlenet", "--version"]
main()
signal.raise_signal(signal.SIGINT)
with StopSignals() as signals:
    signal.raise_signal(signal.SIGINT)
assert signals.received is None
"""


@pytest.mark.parametrize("code", [PORTING, TRAINING])
def test_a_job_that_is_to_ignore_ctrl_c_goes_on_ignoring_it(code: str, tmp_path: Path) -> None:
    # A shell script starts its background jobs in this way.
    ignoring = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = run(f"{ignoring}{code}print('done')", tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.splitlines()[-1] == "done"
