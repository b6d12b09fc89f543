"""The folder of a run: one run at a time, and what must stay the same when it is continued."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flax_googlenet.commands.results import open_results
from flax_googlenet.training.checkpoints import save_checkpoint, write_manifest
from flax_googlenet.training.recipe import Recipe, RecipeError
from flax_googlenet.training.run_folder import WorkdirError, WorkdirInUseError, claim, resume_run, save_run
from flax_googlenet.training.stopping import RunCounts
from flax_googlenet.weights.checkpoint import CheckpointError
from flax_googlenet.weights.download import fetch

# One run at a time.

HOLD = """
import sys, time
from flax_googlenet.training.run_folder import claim
with claim(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that claims the folder, and wait until it has."""
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
def test_a_file_system_without_locks_stops_nothing_and_gives_one_warning_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)  # as on NFS or Lustre; no such file system can be made for a test
    row = {"image": "a.jpg", "predictions": [{"index": 1, "label": None, "probability": 0.5}]}
    warnings: list[str] = []
    with claim(tmp_path / "run", warnings.append):
        pass
    for name in ("answers.csv", "answers.parquet"):
        with open_results(tmp_path / name, "w", 1, warnings.append) as results:
            results.append([row])
        assert (tmp_path / name).stat().st_size > 0
    (tmp_path / "old.bin.partial").write_bytes(b"whole")
    fetch(
        "http://localhost/old.bin",
        tmp_path / "old.bin",
        sha256=hashlib.sha256(b"whole").hexdigest(),
        max_bytes=9,
        warn=warnings.append,
    )
    assert (tmp_path / "old.bin").read_bytes() == b"whole"
    files = ("run/.lock", "answers.csv", "answers.parquet.part", "old.bin.partial")
    assert warnings == [
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


# What must stay the same when a run is continued.

STATE: Any = {"weights": np.arange(6, dtype=np.float32)}  # any tree will do
COUNTS = RunCounts(step=7, unreadable=["a.jpg"], not_finite=2, not_finite_in_a_row=1, best_step=4, best_accuracy=0.1)


def identity(data: str = "digits", **fields: Any) -> dict[str, Any]:
    return {"recipe": dataclasses.asdict(Recipe(**fields)), "data": [data, data], "weights": None}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    (tmp_path / "recipe.json").write_text(Recipe().to_json())
    (tmp_path / "best.safetensors").touch()
    save_run(tmp_path, COUNTS, STATE, identity(), keep=1)
    return tmp_path


def refusal(workdir: Path, wanted: dict[str, Any], kind: type[Exception] = WorkdirError) -> str:
    with pytest.raises(kind) as caught:
        resume_run(workdir, STATE, wanted, False, pytest.fail)
    return str(caught.value)


def test_what_was_counted_comes_back_with_the_state(workdir: Path, tmp_path: Path) -> None:
    found = resume_run(workdir, STATE, identity(), False, pytest.fail)
    assert found is not None
    assert found[0] == COUNTS
    np.testing.assert_array_equal(found[1]["weights"], STATE["weights"])  # type: ignore[index]
    assert resume_run(tmp_path / "another", STATE, identity(), False, pytest.fail) is None


def test_best_weights_that_were_removed_are_no_longer_the_best(workdir: Path) -> None:
    (workdir / "best.safetensors").unlink()
    found = resume_run(workdir, STATE, identity(), False, pytest.fail)
    assert found is not None
    assert found[0] == dataclasses.replace(COUNTS, best_step=0, best_accuracy=0.0)


def test_a_checkpoint_of_a_version_that_did_not_know_the_best_evaluation_is_continued(tmp_path: Path) -> None:
    extra = {"identity": identity(), "tally": {"unreadable": ["a.jpg"], "not_finite": 2, "not_finite_in_a_row": 1}}
    save_checkpoint(tmp_path / "checkpoints", 7, STATE, extra)
    found = resume_run(tmp_path, STATE, identity(), False, pytest.fail)
    assert found is not None
    assert found[0] == dataclasses.replace(COUNTS, best_step=0, best_accuracy=0.0)


def test_another_recipe_or_other_data_are_refused_without_override(workdir: Path) -> None:
    message = refusal(workdir, identity(label_smoothing=0.2, keep=7))
    assert "holds a run with label_smoothing 0.1, now 0.2: choose another folder, or set override" in message
    assert "holds a run with other data: choose another folder" in refusal(workdir, identity("photos"))
    assert resume_run(workdir, STATE, identity(keep=7), False, pytest.fail) is not None  # which changes no bit
    messages: list[str] = []
    found = resume_run(workdir, STATE, identity("photos", label_smoothing=0.2), True, messages.append)
    assert found is not None
    past = {"trained_on": "digits", "recipe": json.loads(Recipe().to_json())}
    assert found[0] == dataclasses.replace(COUNTS, best_step=0, best_accuracy=0.0, trained_before=[past])
    (warning,) = messages
    assert warning.startswith("warning: the run was trained on other data before")


def test_a_run_of_an_earlier_version_is_continued_with_the_defaults_of_newer_fields(tmp_path: Path) -> None:
    earlier = identity(epochs=3)
    del earlier["recipe"]["nesterov"]
    (tmp_path / "recipe.json").write_text(json.dumps(earlier["recipe"]))
    save_run(tmp_path, COUNTS, STATE, earlier, keep=1)
    assert resume_run(tmp_path, STATE, identity(epochs=3), False, pytest.fail) is not None
    assert "a run with nesterov True, now False" in refusal(tmp_path, identity(epochs=3, nesterov=False))


def test_a_recipe_that_makes_another_state_is_refused_even_with_override(workdir: Path) -> None:
    state = {**STATE, "average": STATE["weights"]}
    with pytest.raises(WorkdirError) as caught:
        resume_run(workdir, state, identity(average_decay=0.9), True, pytest.fail)
    assert str(caught.value) == f"{workdir} holds a run with average_decay None, now 0.9: choose another folder"
    with pytest.raises(CheckpointError, match=r"missing: .*average"):  # whatever else has made another state
        resume_run(workdir, state, identity(), True, pytest.fail)


def test_a_damaged_recipe_is_named(workdir: Path) -> None:
    (workdir / "recipe.json").write_bytes(b"\xff\xfe")
    assert f"{workdir}/recipe.json: not a recipe that to_json wrote" in refusal(workdir, identity(), RecipeError)


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_a_recipe_that_is_no_file_is_named(kind: str, workdir: Path) -> None:
    recipe = workdir / "recipe.json"
    recipe.unlink()
    if kind == "folder":
        recipe.mkdir()
    elif kind == "pipe":
        os.mkfifo(recipe)
    else:
        recipe.symlink_to("none")
    assert f"cannot read {recipe}: " in refusal(workdir, identity())


def test_checkpoints_of_a_later_version_are_refused(workdir: Path) -> None:
    step = workdir / "checkpoints" / "step_00000007"
    content = json.loads((step / "extra.json").read_text())
    content["extra"]["tally"]["colour"] = 1
    (step / "extra.json").write_text(json.dumps(content))
    (step / "manifest.sha256").unlink()
    write_manifest(step)
    with pytest.raises(CheckpointError, match=r"step 7 is of another version of flax_googlenet: .*colour"):
        resume_run(workdir, STATE, identity(), False, pytest.fail)


def test_if_all_checkpoints_are_damaged_each_is_reported(workdir: Path) -> None:
    (workdir / "checkpoints" / "step_00000007" / "extra.json").unlink()
    messages: list[str] = []
    with pytest.raises(CheckpointError, match="all are damaged"):
        resume_run(workdir, STATE, identity(), False, messages.append)
    assert len(messages) == 1
    assert "extra.json" in messages[0]
