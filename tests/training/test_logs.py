"""The log of a run: what its files hold at any moment and after a resume, and what a person sees."""

import json
import os
import pty
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from flax_googlenet.training.logs import RunLog, Speed, draw_curves

METRICS = {"loss": 0.5, "accuracy": 0.25, "learning_rate": 0.1, "images_per_second": 40.0}


def records(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run(workdir: Path, start: int, stop: int, total: int = 10) -> None:
    """Record the steps from ``start`` + 1 to ``stop``, and an evaluation of each even step, ``start`` included."""
    with RunLog(workdir, total, start, report=print) as log:
        for step in range(start, stop + 1):
            if step > start:
                log.train(step, {"loss": 1 / step, "accuracy": 1 - 1 / step})
            if step > 0 and step % 2 == 0:
                log.evaluated(step, {"loss": 2 / step, "accuracy": 1 - 2 / step})


def events(path: Path) -> Iterator[Event]:
    """Read the events of a file as TensorBoard does, and check both checksums of each."""
    data = path.read_bytes()
    while data:
        length = struct.unpack("<Q", data[:8])[0]
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(body)
        yield Event.FromString(body)
        data = data[16 + length :]


# The files.

FORGED = "".join(
    f"{line}\n"
    for line in (
        *("[]", "3", "null", '{"step": 3}', '{"split": "train"}', '{"split": "train", "step": "3"}', "[" * 10**5),
        *('{"split": "train", "step": true}', '{"split": [], "step": 3}', '{"split": "train", "step": -1, "loss": 1}'),
        *(f'{{"split": "train", "step": 3, "loss": {loss}}}' for loss in ('"x"', "[1]", "1" * 400, "NaN", "1e999")),
    )
)


def test_a_record_is_in_the_file_when_the_method_returns(tmp_path: Path) -> None:
    with RunLog(tmp_path, 2, report=print) as log:
        log.train(1, METRICS)
        assert records(tmp_path) == [{"split": "train", "step": 1, **METRICS}]
        log.evaluated(1, {"loss": np.float32(0.1), "accuracy": np.float64(1), "count": np.int32(7)})
        assert records(tmp_path)[1] == {
            "split": "held_out",
            "step": 1,
            "loss": float(np.float32(0.1)),  # not a digit is lost
            "accuracy": 1,
            "count": 7,
        }


@pytest.mark.parametrize("num_classes", [5, 6])
def test_messages_have_top5_if_it_can_be_wrong_and_the_files_always(tmp_path: Path, num_classes: int) -> None:
    messages: list[str] = []
    with RunLog(tmp_path, 1, report=messages.append, num_classes=num_classes) as log:
        log.train(1, {"accuracy": 0.5, "top5": 1.0})
        log.evaluated(1, {"accuracy": 0.5, "top5": 1.0})
    assert ["top-5" in message for message in messages] == [num_classes > 5] * 2
    assert [record["top5"] for record in records(tmp_path)] == [1, 1]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, 2, report=print) as log:
        log.train(1, {"loss": float("nan"), "grad_norm": float("inf"), "finite": False})
    assert records(tmp_path) == [{"split": "train", "step": 1, "loss": None, "grad_norm": None, "finite": 0}]


@pytest.mark.parametrize(
    "rest",
    ["", '{"split": "train", "st', "\0" * 50 + "\n", FORGED],
    ids=["stopped", "killed in a line", "a block that never reached the disk", "what no run has written"],
)
def test_a_resumed_run_leaves_the_file_of_one_never_stopped(tmp_path: Path, rest: str) -> None:
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", 0, 10)
    run(tmp_path / "resumed", 0, 7)
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
        file.write(rest)
    run(tmp_path / "resumed", 4, 10)  # the last checkpoint was that of step 4
    whole, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
    assert len(whole.splitlines()) == 15


def test_tensorboard_gets_every_record_and_forgets_those_that_a_resume_repeats(tmp_path: Path) -> None:
    run(tmp_path, 0, 6)
    run(tmp_path, 4, 10)
    first, second = (list(events(path)) for path in sorted(tmp_path.glob("events.out.tfevents.*")))
    for start, found in ((0, first), (4, second)):
        assert found[0].file_version == "brain.Event:2"
        # From this step on, TensorBoard drops what it has.
        assert (found[1].step, found[1].session_log.status) == (start + 1, SessionLog.START)
    shown = [event for event in first[2:] if event.step <= 4] + second[2:]
    points = [((event.step, value.tag), value.simple_value) for event in shown for value in event.summary.value]
    scalars = dict(points)
    assert len(scalars) == len(points) == 10 * 2 + 5 * 2  # each once, the evaluation of step 4, too
    assert scalars[8, "train/loss"] == np.float32(1 / 8)
    assert scalars[8, "held_out/accuracy"] == np.float32(1 - 2 / 8)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: as on a full disk, a write stops halfway and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_gives_one_warning_stops_nothing_and_leaves_complete_lines(
    tmp_path: Path,
) -> None:
    messages: list[str] = []
    with RunLog(tmp_path, 10, report=messages.append) as log:
        log.train(1, METRICS)
        for step in (2, 3):
            with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 20):
                log.train(step, METRICS)
        assert [record["step"] for record in records(tmp_path)] == [1]
        log.train(4, METRICS)
    assert [record["step"] for record in records(tmp_path)] == [1, 4]
    assert [event.step for event in events(next(tmp_path.glob("events.*")))] == [0, 1, 1, 4]
    assert len([message for message in messages if message.startswith("warning: cannot write the metrics")]) == 1


# The messages.


def test_metrics_are_reported_at_most_once_in_ten_seconds_and_at_the_end(tmp_path: Path) -> None:
    lines: list[str] = []
    with RunLog(tmp_path, 1000, report=lines.append) as log:
        for step in range(1, 1001):
            log.train(step, METRICS)
        log.evaluated(1000, {"loss": 0.1, "accuracy": 0.98, "top5": 1.0, "count": 300})
    assert lines[0] == "step 1/1000: loss 0.5000, accuracy 25.00%, rate 0.1, 40.0 images/s"  # no time left as yet
    assert lines[-2:] == [
        "step 1000/1000: loss 0.5000, accuracy 25.00%, rate 0.1, 40.0 images/s",
        "step 1000: held out: loss 0.1000, accuracy 98.00%, top-5 100.00%",
    ]
    assert len(lines) <= 5  # not one for each of a thousand steps


SCRIPT = f"""
import sys, time
from pathlib import Path
from flax_googlenet.commands.train import display
from flax_googlenet.training.logs import RunLog
with display() as shown, RunLog(Path(sys.argv[1]), 20, **shown) as log:
    for step in range(1, 13):
        log.train(step, {METRICS})
        time.sleep(0.05)
    shown["report"]("a message")
"""


@pytest.mark.slow
def test_on_a_terminal_a_bar_shows_the_figures_and_the_time_left(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    screen = b""
    try:
        while chunk := os.read(ours, 65536):
            screen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = screen.decode()
    for part in ("12/20", "loss 0.5000, accuracy 25.00%, rate 0.1, 40.0 images/s", " \x1b[36m0:00:0", "a message"):
        assert part in text, part


# The picture.


def test_the_curves_are_drawn_from_the_file(tmp_path: Path) -> None:
    run(tmp_path, 0, 10)
    assert draw_curves(tmp_path) == tmp_path / "curves.png"
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"), np.int32)
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        drawn = (abs(picture - color).max(-1) < 8).any(0)
        half = len(drawn) // 2
        assert drawn[:half].any()  # loss
        assert drawn[half:].any()  # accuracy


def test_a_first_loss_of_70_leaves_the_others_room(tmp_path: Path) -> None:
    with RunLog(tmp_path, 40, report=print) as log:
        for step in range(1, 41):
            log.train(step, {"loss": 70.0 if step == 1 else 3 * 0.9**step, "accuracy": 0.5})
            log.evaluated(step, {"loss": 3 * 0.9**step, "accuracy": 0.5})
    picture = np.asarray(Image.open(draw_curves(tmp_path)).convert("RGB"), np.int32)
    rows = np.flatnonzero((abs(picture[:, : picture.shape[1] // 2] - (0xD5, 0x5E, 0x00)).max(-1) < 8).any(1))
    rows = rows[rows > 100]  # below the legend
    assert np.ptp(rows) > 0.3 * len(picture)


def test_losses_over_many_decades_have_labels(tmp_path: Path) -> None:
    with RunLog(tmp_path, 2, report=print) as log:
        log.train(1, {"loss": 1.0, "accuracy": 0.5})
        log.evaluated(2, {"loss": 1e9, "accuracy": 0.5})
    dark = np.asarray(Image.open(draw_curves(tmp_path)).convert("L")) < 100
    axis = np.flatnonzero(dark.mean(0) > 0.5)[0]  # the first column that is a line
    rows = dark[:, 40 : axis - 12].any(1).astype(np.int8)  # right of the word "loss", left of the ticks
    assert (np.diff(rows) == 1).sum() >= 4


def test_curves_of_a_run_without_evaluations_or_finite_losses_are_drawn_too(tmp_path: Path) -> None:
    with RunLog(tmp_path, 2, report=print) as log:
        log.train(1, {"loss": float("nan"), "accuracy": 0.5})
    assert draw_curves(tmp_path).exists()


# The speed.


def test_the_first_step_does_not_count_for_the_speed() -> None:
    speed = Speed(batch_size=8)
    assert speed.add(seconds=30.0, waited=True) == {}
    for waited in (False, True, True, False):
        assert speed.add(seconds=0.5, waited=waited) == {"images_per_second": 16.0}
    assert str(speed) == "16 images a second; the devices waited for images in 2 of 4 steps"
