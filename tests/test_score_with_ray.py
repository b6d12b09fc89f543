"""``examples/score_with_ray.py`` in a real local Ray, whose processes are killed in the middle of their work.

It needs Ray, the extra ``ray``.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import reference
from PIL import Image
from pyarrow import parquet
from serving import serve_objects

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.commands.cli import main

pytest.importorskip("ray", reason='Ray is not installed: pip install -e ".[ray]"')

ROOT = Path(__file__).parents[1]
LOG = "ray.log"  # in the working folder
UNREADABLE = {"photos/cut.jpg": "cut off", "photos/empty.jpg": "is empty", "photos/text.jpg": "not an image"}

# Four slots, so that reading and writing have some beside the workers on a machine with two cores.
DRIVER = """
import json, sys, ray, tyro
ray.init(num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, _temp_dir=sys.argv[1])
from score_with_ray import score
for arguments in json.loads(sys.argv[2]):
    tyro.cli(score, args=arguments)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: the weights of a network for images of 32x32 pixels, 160 images, and 3 damaged ones."""
    tensors = reference.random_checkpoint(num_classes=10)
    state_dict = {name: tensor.numpy() for name, tensor in tensors.items() if not name.startswith("aux")}
    model, variables = GoogLeNet(num_classes=10, aux_logits=False), flax_googlenet.from_torchvision(state_dict)
    flax_googlenet.save(tmp_path / "weights.safetensors", model, variables, {"recipe": {"image_size": 32}})
    (tmp_path / "photos").mkdir()
    add_images(tmp_path / "photos", 0, 160)
    whole = (tmp_path / "photos" / "0.jpg").read_bytes()
    for path, content in zip(UNREADABLE, (whole[: len(whole) // 2], b"", b"a letter"), strict=True):
        (tmp_path / path).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_images(folder: Path, start: int, stop: int) -> None:
    for i in range(start, stop):
        photograph = reference.photographs()[i % 2][i % 300 : i % 300 + 60, i : i + 50]
        Image.fromarray(photograph).save(folder / f"{i}.jpg")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the example in a Ray of its own, for one command line or more, with files of four rows."""
    temporary = tempfile.mkdtemp(prefix="ray")  # pytest's folders have names that are too long for Ray's sockets
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command_lines: list[str]) -> subprocess.Popen[bytes]:
        options = ["--weights", "weights.safetensors", "--rows-per-file", "4"]
        jobs = json.dumps([[*arguments, *options] for arguments in command_lines])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # Ray would write a token into the user's home
            "RAY_worker_niceness": "0",
        }
        command = [sys.executable, "-c", DRIVER, temporary, jobs]
        with open(LOG, "w") as log:  # into a pipe that nobody reads, Ray would soon wait
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
    shutil.rmtree(temporary)


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait() == 0, Path(LOG).read_text()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        if process.poll() is not None:
            pytest.fail(Path(LOG).read_text())
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill every process of a Ray, as a power cut does."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family)


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes that have a network."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if "BatchPredictor" in " ".join(child.cmdline()) else []
    return found


def done(output: str) -> int:
    """Return the number of complete files of rows."""
    return sum(".pending" not in path.name for path in Path(output, "done").glob("*.parquet"))


def rows(output: str) -> list[dict[str, object]]:
    files = sorted(Path(output, "rows").glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def answers_of_classify(output: str) -> dict[str, object]:
    assert main(["classify", "photos", "--weights", "weights.safetensors", "--output", output]) == 1
    return {row["image"]: row["predictions"] for row in parquet.read_table(output).to_pylist()}


def test_each_image_has_one_row_with_the_answer_of_classify_after_any_kill(
    folder: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """A worker is killed, and Ray goes on; then the whole of Ray is killed, and the next run goes on."""
    process = start(["photos", "scores", "--workers", "2"])
    wait_for(lambda: done("scores") >= 5 and len(workers(process)) == 2, process)
    victim, survivor = workers(process)
    victim.kill()  # kill -9
    assert done("scores") < 30
    assert survivor.is_running()
    finish(process)
    expected = answers_of_classify("first.parquet")
    answers = {row["image"]: row["predictions"] for row in rows("scores") if row["error"] is None}
    assert answers == expected
    assert len(rows("scores")) == len(expected) + len(UNREADABLE) == 163
    for row in rows("scores"):
        assert row["error"] is None or (UNREADABLE[row["image"]] in row["error"] and row["predictions"] is None)

    files = {file: file.read_bytes() for file in Path("scores", "rows").iterdir()}
    add_images(folder / "photos", 160, 240)
    done_before = done("scores")
    process = start(["photos", "scores", "--workers", "2"])
    wait_for(lambda: done("scores") >= done_before + 5, process)
    kill_all(process)
    assert done("scores") < done_before + 15
    finish(start(["photos", "scores", "--workers", "2"]))
    answers = {row["image"]: row["predictions"] for row in rows("scores") if row["error"] is None}
    assert answers == answers_of_classify("second.parquet")
    assert len(rows("scores")) == 243
    assert all(file.read_bytes() == content for file, content in files.items())


def test_images_come_from_parquet_and_from_an_object_store(
    folder: Path, start: Callable[..., subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow

    names = [f"photos/{i}.jpg" for i in range(8)]
    contents = [(folder / name).read_bytes() for name in names]
    parquet.write_table(pyarrow.table({"image": names, "bytes": contents}), "bytes.parquet")
    parquet.write_table(pyarrow.table({"path": [str(folder / name) for name in names]}), "paths.parquet")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "password")
    with serve_objects("bucket", dict(zip(names, contents, strict=True)) | {"photos/.hidden.jpg": b""}) as query:
        jobs = {"of_bytes": "bytes.parquet", "of_paths": "paths.parquet", "of_objects": f"s3://bucket/photos?{query}"}
        finish(start(*([source, output, "--stage", "avgpool"] for output, source in jobs.items())))
    features = {row["image"]: row["features"] for row in rows("of_bytes")}
    assert features.keys() == set(names)
    assert np.array(list(features.values())).shape == (8, 1024)
    assert {row["image"]: row["features"] for row in rows("of_paths")} == {
        str(folder / name): value for name, value in features.items()
    }
    assert {row["image"]: row["features"] for row in rows("of_objects")} == {
        f"s3://bucket/{name}": value for name, value in features.items()
    }


def test_a_parquet_file_with_other_columns_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow

    monkeypatch.syspath_prepend(ROOT / "examples")
    from score_with_ray import score

    parquet.write_table(pyarrow.table({"image": ["x"], "pixels": [b"x"]}), "pixels.parquet")
    with pytest.raises(SystemExit, match=r"^pixels\.parquet needs .* path, or image and bytes, and has image, pixels$"):
        score("pixels.parquet", "scores", weights="weights.safetensors")


def test_rows_of_other_weights_are_never_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    from score_with_ray import score

    (folder / "scores").mkdir()
    (folder / "scores" / "run.json").write_text(json.dumps({"weights": "0123", "top": 5, "stage": None}))
    with pytest.raises(SystemExit, match=r"run\.json .* name another"):
        score("photos", "scores", weights="weights.safetensors")
