"""One run at a time in a folder, whatever ends the one before."""

import errno
import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from download import fetch

from flax_googlenet.commands.results import open_results
from flax_googlenet.training.run_folder import WorkdirInUseError, claim

HOLD = """
import sys, time
from flax_googlenet.training.run_folder import claim
with claim(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that has the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


def test_a_second_run_is_refused_with_the_process_of_the_first_until_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    with hold(folder) as process:
        for _ in range(2):  # being refused changes nothing
            with (
                pytest.raises(WorkdirInUseError, match=f"{folder} is in use by process {process.pid} on "),
                claim(folder),
            ):
                pytest.fail("claimed twice")
        process.send_signal(signal.SIGKILL)
    with claim(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_stops_nothing_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)  # as on NFS or Lustre; no such file system can be made for a test
    row = {"image": "a.jpg", "predictions": [{"index": 1, "label": None, "probability": 0.5}]}
    said: list[str] = []
    with claim(tmp_path / "run", said.append):
        pass
    for name in ("answers.csv", "answers.parquet"):
        with open_results(tmp_path / name, "w", 1, said.append) as results:
            results.append([row])
        assert (tmp_path / name).stat().st_size > 0
    (tmp_path / "old.bin.partial").write_bytes(b"whole")
    fetch(
        "http://localhost/old.bin",
        tmp_path / "old.bin",
        sha256=hashlib.sha256(b"whole").hexdigest(),
        max_bytes=9,
        warn=said.append,
    )
    assert (tmp_path / "old.bin").read_bytes() == b"whole"
    files = ("run/.lock", "answers.csv", "answers.parquet.part", "old.bin.partial")
    assert said == [
        f"{tmp_path / name} is on a file system without locks: start no second run that writes there" for name in files
    ]


def test_another_error_of_a_lock_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / ".lock"))), claim(tmp_path):
        pytest.fail("claimed")


def test_a_folder_is_free_after_the_block_even_one_that_raised(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="of the run"), claim(tmp_path):
            raise RuntimeError("of the run")
    with claim(tmp_path), pytest.raises(WorkdirInUseError, match=f"process {os.getpid()} "), claim(tmp_path):
        pytest.fail("claimed twice")  # one process, two runs


def test_a_worker_process_that_outlives_its_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    code = """
import subprocess, sys, time
from flax_googlenet.training.run_folder import claim
with claim(sys.argv[1]):
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        run.kill()
    with claim(tmp_path):
        os.kill(worker, signal.SIGTERM)  # it was still there
