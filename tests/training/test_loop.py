"""Runs as processes: stopped and resumed they end in the same bits, shared among devices in the same losses."""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import port_weights
import pytest
import torch
from jax import numpy as jnp
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet
from flax_googlenet.architecture import BLOCKS
from flax_googlenet.commands import cli
from flax_googlenet.training.data import eval_batches
from flax_googlenet.training.recipe import PRESETS, Recipe
from flax_googlenet.training.run import _print, _way_out
from flax_googlenet.training.splits import open_data

CLASSES, PER_CLASS = 3, 16  # 36 images to train on, 12 held out
RECIPE = ("epochs=3", "batch-size=8", "held-out=0.25", "learning-rate=0.01", "checkpoint-every=5")
FROZEN = BLOCKS[: BLOCKS.index("inception5b")]  # a third of the time to compile; 5b has BatchNorm, too
SHORT = dataclasses.replace(
    PRESETS["digits"], epochs=3, batch_size=8, held_out=0.25, learning_rate=0.01, checkpoint_every=5
)
STEPS = 12
TIMES = ("images_per_second", "input_seconds")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of digits."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for label in range(CLASSES):
        (folder / str(label)).mkdir()
        for i, pixels in enumerate(digits.images[digits.target == label][:PER_CLASS]):
            Image.fromarray((pixels * 15).astype(np.uint8)).save(folder / str(label) / f"{i}.png")
    return folder


class Training:
    """``flax-googlenet train`` in a process of its own."""

    def __init__(self, data: Path, weights: Path) -> None:
        self.data, self.weights = data, weights

    def start(
        self,
        workdir: Path,
        *options: str,
        recipe: Sequence[str] = (),
        data: Path | None = None,
        weights: Path | None = None,
        before: str = "",
        **variables: str,
    ) -> subprocess.Popen[str]:
        """Start it, after the Python code ``before`` has run in its process."""
        fields = [f"--recipe.{field}" for field in (*RECIPE, *recipe)]
        code = f"{before}\nfrom flax_googlenet.__main__ import main\nraise SystemExit(main())"
        command = [sys.executable, "-c", code, "train", str(data or self.data), "--workdir", str(workdir)]
        command += ["--preset", "digits", "--weights", str(weights or self.weights)]
        return subprocess.Popen(
            [*command, *fields, "--recipe.frozen", *FROZEN, *options],
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, workdir: Path, *options: str, **arguments: Any) -> tuple[int, str]:
        """Run it to its end, and return its status and its messages."""
        process = self.start(workdir, *options, **arguments)
        _, messages = process.communicate(timeout=600)  # the longest takes 4 minutes
        return process.returncode, messages


@pytest.fixture(scope="module")
def train(data: Path, variables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Training:
    weights = tmp_path_factory.mktemp("weights") / "random.safetensors"
    # Without auxiliary heads: two thirds of the parameters, which every checkpoint would hold.
    without = {
        kind: {name: block for name, block in blocks.items() if not name.startswith("aux")}
        for kind, blocks in variables.items()
    }
    model = flax_googlenet.GoogLeNet(aux_logits=False, transform_input=True)  # as the weights of ImageNet have it
    flax_googlenet.save(weights, model, without, {"source": "random"})
    return Training(data, weights)


@pytest.fixture(scope="module")
def complete(train: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped, with its messages in the file ``messages``."""
    workdir = tmp_path_factory.mktemp("complete")
    status, messages = train(workdir)
    (workdir / "messages").write_text(messages)
    assert status == 0, messages
    return workdir


def records(workdir: Path) -> list[dict[str, Any]]:
    """Return the records of the metrics, without the times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def losses(workdir: Path) -> np.ndarray:
    return np.array([record["loss"] for record in records(workdir) if record["split"] == "train"])


def last_step(workdir: Path) -> int:
    """Return the last step in the metrics, which a run may be writing."""
    metrics = workdir / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    return max(map(int, re.findall(r'"split": "train", "step": (\d+),', text)), default=0)


def wait_for_step(step: int, workdir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while last_step(workdir) < step:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_bits(workdir: Path, complete: Path) -> None:
    assert records(workdir) == records(complete)
    for name in ("model.safetensors", "best.safetensors", f"checkpoints/step_{last_step(complete):08}/extra.json"):
        assert (workdir / name).read_bytes() == (complete / name).read_bytes(), name


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# A run from its beginning to its end.


@pytest.mark.slow
def test_a_run_leaves_metrics_checkpoints_curves_and_weights(complete: Path) -> None:
    metrics = records(complete)
    assert [m["step"] for m in metrics if m["split"] == "train"] == list(range(1, STEPS + 1))
    assert [m["step"] for m in metrics if m["split"] == "held_out"] == [4, 8, 12]
    assert sorted(path.name for path in (complete / "checkpoints").iterdir()) == ["step_00000010", "step_00000012"]
    Image.open(complete / "curves.png").verify()
    metadata = flax_googlenet.load_metadata(complete / "model.safetensors")
    assert metadata["class_names"] == [str(label) for label in range(CLASSES)]
    assert metadata["recipe"] == json.loads((complete / "recipe.json").read_text())
    assert metadata["accuracy"] == metrics[-1]["accuracy"]
    best = max((m for m in metrics if m["split"] == "held_out"), key=lambda m: m["accuracy"])  # of equals the first
    expected = metadata | {name: best[name] for name in ("step", "accuracy", "loss", "top5")}
    expected["epoch"] = best["step"] // 4
    assert flax_googlenet.load_metadata(complete / "best.safetensors") == expected


@pytest.mark.slow
def test_the_first_messages_list_the_classes_and_images_and_say_what_happens_to_the_head(
    complete: Path, train: Training
) -> None:
    assert (complete / "messages").read_text().splitlines()[:6] == [
        cli.STARTING,
        "3 classes: 0, 1, 2; 12 images each",
        "36 images to train on, 12 held out, 12 steps, 1 cpu",
        f"the head of {train.weights} is replaced by a new one: its 1000 classes have no names, and {train.data} has 3",
        f"warning: the weights of {train.weights} are random: the training starts from nothing",
        "warning: the frozen blocks stay random: start from trained weights, or freeze no block",
    ]


@pytest.mark.slow
def test_the_last_messages_have_the_speed_the_accuracy_and_the_next_commands(complete: Path, data: Path) -> None:
    speeds, best, accuracy, evaluate, port = (complete / "messages").read_text().splitlines()[-5:]
    assert re.fullmatch(r"\d+ images a second; the devices waited for images in \d+ of 11 steps", speeds)
    at_best = flax_googlenet.load_metadata(complete / "best.safetensors")
    assert (
        best
        == f"the best weights are {complete}/best.safetensors: {at_best['accuracy']:.2%} after epoch {at_best['epoch']}"
    )
    assert f"{records(complete)[-1]['accuracy']:.2%}" in accuracy
    assert evaluate == f"  flax-googlenet evaluate {complete}/model.safetensors {data}"
    to_torchvision = f"{complete}/model.safetensors --to-torchvision FILE.pth"
    assert port == f"  python convert/port_weights.py {to_torchvision}  # in the repository"


@pytest.mark.slow
def test_the_result_goes_back_to_torchvision_which_gives_the_same_accuracy(
    complete: Path, data: Path, tmp_path: Path
) -> None:
    assert port_weights.main([str(complete / "model.safetensors"), "--to-torchvision", str(tmp_path / "back.pth")]) == 0
    network = TorchGoogLeNet(CLASSES, aux_logits=False, transform_input=True, init_weights=False).eval()
    network.load_state_dict(torch.load(tmp_path / "back.pth"))
    _, held_out = open_data(str(data), held_out=0.25, seed=0)
    (batch,) = eval_batches(held_out, Recipe(batch_size=len(held_out), image_size=32), fail=pytest.fail)
    with torch.no_grad():
        classes = network(torch.from_numpy(batch["image"].transpose(0, 3, 1, 2))).argmax(1).numpy()
    metadata = flax_googlenet.load_metadata(complete / "model.safetensors")
    assert (classes == batch["label"]).mean() == metadata["accuracy"]


# Stopped and resumed.


HANGS = """
import itertools, threading
from flax_googlenet.training.datasets import Dataset
read, count = Dataset.read, itertools.count()
def read_or_hang(self, *arguments):
    if next(count) >= 48:  # two batches are made, even where four threads make one each
        threading.Event().wait()
    return read(self, *arguments)
Dataset.read = read_or_hang
"""


def stop(train: Training, workdir: Path, number: signal.Signals, hangs: bool = False) -> tuple[int, str]:
    """Send a signal to a run after its first step, and return its status and its messages."""
    before = last_step(workdir)  # of one that was not killed: all of it is in the checkpoint
    process = train.start(workdir, before=HANGS if hangs else "")
    wait_for_step(before + 1, workdir, process)
    time.sleep(hangs)  # until it waits for images
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert "Traceback" not in messages
    return process.returncode, messages


@pytest.mark.slow
def test_a_run_stopped_by_ctrl_c_sigterm_and_a_kill_ends_in_the_bits_of_one_never_stopped(
    train: Training, complete: Path, tmp_path: Path
) -> None:
    status, messages = stop(train, tmp_path, signal.SIGINT)
    assert status == 130
    assert "stopping after this step; Ctrl-C again ends at once" in messages

    status, more = stop(train, tmp_path, signal.SIGTERM, hangs=True)
    assert status == 143
    for text in (messages, more):  # the message names the step of the checkpoint
        step = int(text.splitlines()[-1].removeprefix("stopped after step ").split(" of 12; ")[0])
        assert (f"continuing from the checkpoint of step {step}" in more) == (text is messages)
    assert (tmp_path / "checkpoints" / f"step_{step:08}").is_dir()

    status, _ = stop(train, tmp_path, signal.SIGKILL)
    assert status == -signal.SIGKILL
    status, messages = train(tmp_path)
    assert status == 0, messages
    assert_same_bits(tmp_path, complete)


@pytest.mark.slow
def test_a_call_that_a_signal_stopped_is_continued_by_the_same_call_and_stops_early_out_of_patience(
    train: Training, tmp_path: Path
) -> None:
    frozen = BLOCKS[: BLOCKS.index("fc")]  # and the head at a rate of 0: the accuracy never changes
    recipe = dataclasses.replace(SHORT, frozen=frozen, learning_rate=0.0, patience=1)
    run = functools.partial(flax_googlenet.training.train, train.data, tmp_path, recipe, weights=train.weights)
    with pytest.raises(flax_googlenet.training.TrainingStopped) as caught:
        run(progress=lambda step, total, text: signal.raise_signal(signal.SIGTERM))
    assert caught.value.signal is signal.SIGTERM
    assert caught.value.path == tmp_path / "checkpoints" / "step_00000001"

    messages: list[str] = []
    result = run(report=messages.append)
    assert "continuing from the checkpoint of step 1" in messages
    assert result.stopped_early
    first, second = (record for record in records(tmp_path) if record["split"] == "held_out")
    assert (first["step"], second["step"], last_step(tmp_path)) == (4, 8, 8)  # of 12
    assert result.metrics == {name: second[name] for name in ("loss", "accuracy", "top5")}
    best = f"{first['accuracy']:.2%} after epoch 1"
    assert f"stopping early after epoch 2: the best accuracy is still {best}" in messages
    assert (tmp_path / "checkpoints" / "step_00000008").is_dir()
    assert flax_googlenet.load_metadata(result.best_weights)["epoch"] == 1
    assert flax_googlenet.load_metadata(result.weights)["epoch"] == 2


# What goes wrong in a run.


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_names_its_last_checkpoint(train: Training, tmp_path: Path) -> None:
    process = train.start(tmp_path, recipe=["workers=1", "checkpoint-every=1"])
    wait_for_step(1, tmp_path, process)
    children = "".join(path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")).split()
    (worker,) = (child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 4, messages
    error = messages.splitlines()[-1]
    assert "a worker process that reads images was killed by SIGKILL, as the kernel does when memory runs out" in error
    assert error.endswith(f"; the last checkpoint is {tmp_path}/checkpoints/step_{last_step(tmp_path):08}")


@pytest.mark.slow
def test_data_without_a_readable_image_stop_the_run(
    train: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(train.data, tmp_path / "data")
    for path in data.glob("*/*"):
        path.write_bytes(b"no image")
    weights = ["--weights", str(train.weights), "--recipe.batch-size=8", "--recipe.frozen", *FROZEN]
    assert cli.main(["train", str(data), "--workdir", str(tmp_path / "run"), *weights]) == 4
    messages = capsys.readouterr().err.splitlines()[-1]
    assert " images in a row cannot be read, starting with " in messages
    assert messages.endswith("; there is no checkpoint yet")


def test_the_message_about_too_little_memory_names_the_way_out() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros(2**45, jnp.float32).block_until_ready()
    assert _way_out(caught.value).startswith("the devices' memory is too small: choose a smaller batch_size, with acc")


@pytest.fixture(scope="module")
def troubled(train: Training, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    """Corrupt files of a run whose results cannot be written either, and its messages."""
    folder = tmp_path_factory.mktemp("troubled")
    data = shutil.copytree(train.data, folder / "data")
    corrupt = sorted((data / "1").iterdir())
    for path in corrupt:
        path.write_bytes(path.read_bytes()[:60])
    process = train.start(folder / "run", recipe=["max-corrupt=0.34"], data=data)  # 12 of 36 are corrupt
    while not (folder / "run" / "metrics.jsonl").exists():  # once it has begun: it checks these places first
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    (folder / "run" / "checkpoints").write_text("a file where the folder should be")
    (folder / "run" / "model.safetensors").mkdir()
    _, messages = process.communicate(timeout=600)
    assert process.returncode == 4, messages
    return corrupt, messages


@pytest.mark.slow
def test_a_corrupt_image_is_named_once(troubled: tuple[list[Path], str]) -> None:
    corrupt, messages = troubled
    assert [messages.count(f"{path} is damaged") for path in corrupt] == [1] * PER_CLASS  # held-out ones included
    assert "left out of the training: 12 unreadable images and 0 steps that were not finite" in messages


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_saved_is_reported_and_does_not_count(troubled: tuple[list[Path], str]) -> None:
    _, messages = troubled
    warnings = [line for line in messages.splitlines() if line.startswith("warning: ") and " was not saved: " in line]
    assert len(warnings) == 3  # of steps 5, 10 and 12
    assert all(line.endswith("; there is no checkpoint yet") for line in warnings)


@pytest.mark.slow
def test_weights_that_cannot_be_written_are_reported_with_the_last_checkpoint(troubled: tuple[list[Path], str]) -> None:
    _, messages = troubled
    error = messages.splitlines()[-1]
    assert re.search(r"/run/model\.safetensors: .*; there is no checkpoint yet", error)


@pytest.mark.slow
def test_losses_that_are_not_finite_are_skipped_and_5_in_a_row_stop_the_run_with_its_last_checkpoint(
    train: Training, complete: Path, tmp_path: Path
) -> None:
    model, variables = flax_googlenet.load(complete / "model.safetensors")
    variables["params"]["fc"]["bias"] = variables["params"]["fc"]["bias"] + np.float32(np.inf)
    flax_googlenet.save(tmp_path / "infinite.safetensors", model, variables)
    # The learning rate is that of the test above, so that both have one program.
    recipe = dataclasses.replace(SHORT, frozen=BLOCKS[: BLOCKS.index("fc")], learning_rate=0.0, checkpoint_every=2)
    messages: list[str] = []
    with pytest.raises(flax_googlenet.training.TrainingStopped, match="not finite in 5 steps in a row") as caught:
        flax_googlenet.training.train(
            train.data, tmp_path / "run", recipe, weights=tmp_path / "infinite.safetensors", report=messages.append
        )
    assert [message for message in messages if " is skipped: " in message] == [
        f"step {step} is skipped: its loss or gradient is not finite" for step in range(1, 6)
    ]
    assert [record["loss"] for record in records(tmp_path / "run") if record["split"] == "train"] == [None] * 5
    assert caught.value.path == tmp_path / "run" / "checkpoints" / "step_00000004"
    assert caught.value.path.is_dir()
    assert caught.value.signal is None


def test_a_call_with_the_name_of_a_preset_or_with_variables_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(flax_googlenet.training.RecipeError, match=r"PRESETS\['finetune'\], not a str"):
        flax_googlenet.training.train("digits", tmp_path / "run", "finetune")
    with pytest.raises(flax_googlenet.CheckpointError, match=r"not a tuple: .*flax_googlenet\.save"):
        flax_googlenet.training.train("digits", tmp_path / "run", weights=(flax_googlenet.GoogLeNet(), {}))
    assert not (tmp_path / "run").exists()


def test_a_message_with_any_file_name_is_printed_on_one_line_of_utf8(capfd: pytest.CaptureFixture[str]) -> None:
    _print("photos/caf\udce9\n.jpg is damaged")
    assert capfd.readouterr().out == r"photos/caf\xe9\x0a.jpg is damaged" + "\n"


def test_a_path_is_a_folder_and_only_the_string_digits_is_the_embedded_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(flax_googlenet.training.DataError, match=r"\./digits"):
        flax_googlenet.training.train(Path("digits"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Devices and processes.


@pytest.fixture(scope="module")
def two_devices(train: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two devices."""
    workdir = tmp_path_factory.mktemp("two_devices")
    status, messages = train(workdir, JAX_NUM_CPU_DEVICES="2")
    assert status == 0, messages
    assert "2 cpu" in messages
    return workdir


def together(train: Training, workdir: Path, count: int = 2, **variables: str) -> list[subprocess.Popen[str]]:
    """Start processes that train together."""
    address = f"127.0.0.1:{free_port()}"
    return [
        train.start(
            workdir,
            "--distributed",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(i),
            **variables,
        )
        for i in range(count)
    ]


@pytest.mark.slow
def test_two_devices_give_the_losses_of_one(two_devices: Path, complete: Path) -> None:
    # float32, summed in another order; measured after 12 steps: 7e-7.
    np.testing.assert_allclose(losses(two_devices), losses(complete), rtol=5e-6)


@pytest.mark.fault
@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_give_the_losses_of_two_devices_though_one_is_killed_and_all_start_again(
    victim: int, train: Training, two_devices: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    logs = tmp_path_factory.mktemp("logs")
    processes = together(train, tmp_path, TMPDIR=str(logs))
    wait_for_step(6, tmp_path, processes[0])
    processes[victim].kill()
    processes[victim].communicate()
    survivor = processes[1 - victim]
    _, error = survivor.communicate(timeout=60)
    assert survivor.returncode == 4, error
    assert "stack trace" not in error
    if "JAX ended this process" in error:  # JAX may notice first that the coordinator is gone
        assert error.endswith("start all of them again, to go on from the last checkpoint\n")
        (log,) = logs.glob("flax-googlenet-jax-*.txt")
        assert str(log) in error
        assert "coordination service" in log.read_text()
    else:
        assert "another process of the run is gone: start all of them again (" in error
        assert "; the last checkpoint is " in error

    processes = together(train, tmp_path)
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    assert "2 cpu of 2 processes" in messages[0]
    assert "continuing from the checkpoint of step 5" in messages[0]
    assert_same_bits(tmp_path, two_devices)


@pytest.mark.fault
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(train: Training, tmp_path: Path) -> None:
    processes = together(train, tmp_path)
    wait_for_step(4, tmp_path, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    messages = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], messages
    assert "stopped after step " in messages[0]


@pytest.mark.fault
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_process_that_waits_for_the_others_handles_signals(
    number: signal.Signals, status: int, train: Training, tmp_path: Path
) -> None:
    port = free_port()
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    process = train.start(tmp_path / "run", "--distributed", **variables)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(number)
    _, messages = process.communicate(timeout=10)
    assert (process.returncode, messages) == (status, f"{cli.STARTING}\n")


@pytest.mark.fault
def test_sigterm_before_the_first_step_ends_one_process_at_once_and_then_the_other(
    train: Training, tmp_path: Path
) -> None:
    first, second = together(train, tmp_path)
    while "images to train on" not in first.stderr.readline():
        assert first.poll() is None
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=10)
    assert second.returncode == -signal.SIGTERM
    _, messages = first.communicate(timeout=90)
    assert first.returncode == 4, messages
    assert "another process of the run is gone" in messages.splitlines()[-1]


# The heavy loop, by `pytest -m fault`.


@pytest.mark.fault
def test_50_kills_of_them_20_during_saves_change_no_bit(train: Training, tmp_path: Path) -> None:
    recipe = ["epochs=40", "checkpoint-every=1"]
    start = time.monotonic()
    status, messages = train(tmp_path / "complete", recipe=recipe)
    assert status == 0, messages
    seconds = time.monotonic() - start
    one_step = seconds / last_step(tmp_path / "complete")  # mostly its checkpoint
    workdir, rng = tmp_path / "killed", random.Random(0)

    def half_written() -> set[Path]:
        return set(workdir.glob("checkpoints/.step_*.tmp"))

    during_saves = 0
    for kill in range(50):
        before = half_written()
        process = train.start(workdir, recipe=recipe)
        if kill % 2:
            while not half_written() - before:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.001)
            time.sleep(rng.uniform(0, one_step / 2))
        else:
            time.sleep(rng.uniform(0, seconds / 10))  # importing, restoring, compiling, training, evaluating
        assert process.poll() is None, process.stderr and process.stderr.read()
        process.kill()
        process.communicate()
        during_saves += bool(half_written() - before)
        print(f"kill {kill + 1}: {during_saves} during saves, after step {last_step(workdir)}", flush=True)
    assert during_saves >= 20
    status, messages = train(workdir, recipe=recipe)
    assert status == 0, messages
    assert_same_bits(workdir, tmp_path / "complete")
