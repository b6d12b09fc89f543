"""The metrics of a run: in ``metrics.jsonl``, for TensorBoard and in messages step by step, at the end as curves."""

import io
import json
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from scipy.ndimage import uniform_filter1d

from flax_googlenet.files import read_regular_file, write_atomically

METRICS = "metrics.jsonl"
CURVES = "curves.png"
TRAIN, HELD_OUT = "train", "held_out"
_MAX_METRICS_BYTES = 2**32  # 10 million steps

_SHOWN = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.2%}",
    "top5": "top-5 {:.2%}",
    "learning_rate": "rate {:.2g}",
    "images_per_second": "{:.1f} images/s",
}
"""The metrics that messages show. The files hold all of them."""

_SECONDS_BETWEEN_MESSAGES = 10.0

Progress = Callable[[int, int, str], None]
"""Shows how far a run is: called with the number of the step, the number of all steps, and the metrics in words."""


class RunLog:
    """Records the metrics of a run in its folder while its ``with`` block lasts, and reports them.

    ``metrics.jsonl`` gets one line for each record: ``{"split": "train" or "held_out", "step": int, name: float}``,
    with null for values that are not finite. TensorBoard reads the same folder. Once ``train`` or ``evaluated`` has
    returned, the record is in its file, whatever kills the process afterwards; ``sync`` waits until it is on the disk.
    If the disk is full, a message says so and the run goes on.

    Args:
        workdir: The folder of the run, which exists.
        total_steps: The step at which the run ends.
        start_step: The step at which it starts. Records of a run that went further than its last checkpoint are
            dropped: those of later steps, and the evaluation of this step, with which the run begins. So the metrics of
            a step must be recorded before its checkpoint, and an evaluation after it.
        report: Called with messages.
        progress: Called after each step. Without it, the progress is reported in a message every ten seconds.
        num_classes: Number of classes. With five or fewer, top-5 is always right, and messages leave it out.

    Raises:
        OSError: On entering, if the files cannot be opened.
    """

    def __init__(
        self,
        workdir: Path,
        total_steps: int,
        start_step: int = 0,
        *,
        report: Callable[[str], None],
        progress: Progress | None = None,
        num_classes: int = 1000,
    ) -> None:
        self._workdir, self._start_step, self._total_steps = workdir, start_step, total_steps
        self._report = report
        self._progress = progress or self._report_progress
        self._shown = {name: text for name, text in _SHOWN.items() if name != "top5" or num_classes > 5}
        self._disk_failed = False
        self._next_message = 0.0
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        path = self._workdir / METRICS
        self._evaluation_before = _drop_records(self._start_step, path)
        events = self._workdir / f"events.out.tfevents.{time.time_ns()}"
        with ExitStack() as stack:
            self._lines = stack.enter_context(open(path, "ab", buffering=0))
            self._events = stack.enter_context(open(events, "xb", buffering=0))
            _append(self._events, _event(file_version="brain.Event:2"))
            # TensorBoard drops the steps from this one on that it has read from earlier files.
            _append(self._events, _event(step=self._start_step + 1, session_log={"status": "START"}))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, which its batch gave with the parameters before the step."""
        self._record(TRAIN, step, metrics)
        self._progress(step, self._total_steps, self._text(metrics))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics that the held-out images gave with the parameters after a step."""
        self._record(HELD_OUT, step, metrics)
        self._report(f"step {step}: held out: {self._text(metrics)}")

    def sync(self) -> None:
        """Wait until all records are on the disk. A run calls it before a checkpoint, as it will not repeat them."""
        with suppress(OSError):  # a record that cannot be written is reported when it is made
            os.fsync(self._lines.fileno())

    def _report_progress(self, step: int, total: int, text: str) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        if now >= self._next_message or step == total:
            self._next_message = now + _SECONDS_BETWEEN_MESSAGES
            first_step, start = self._first
            if first_step < step < total:  # the first step's own time is that of compiling and of filling the input
                seconds = round((now - start) / (step - first_step) * (total - step))
                text += f", {timedelta(seconds=seconds)} left"
            self._report(f"step {step}/{total}: {text}")

    def _text(self, metrics: Mapping[str, float]) -> str:
        return ", ".join(text.format(metrics[name]) for name, text in self._shown.items() if name in metrics)

    def _record(self, split: str, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        record = {"split": split, "step": step} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        try:
            _append(self._lines, json.dumps(record, allow_nan=False).encode() + b"\n")
            if record != self._evaluation_before:  # TensorBoard has this one, and cannot drop it alone
                scalars = [{"tag": f"{split}/{name}", "simple_value": value} for name, value in values.items()]
                _append(self._events, _event(step=step, summary={"value": scalars}))
            self._disk_failed = False
        except OSError as error:
            if not self._disk_failed:  # once is enough
                self._report(f"warning: cannot write the metrics: {error.strerror}; the run goes on without them")
            self._disk_failed = True


class Speed:
    """Measures how fast a run is, and how often its devices waited for images.

    Args:
        batch_size: The number of images in a step, over all processes.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._steps, self._seconds, self._waits = -1, 0.0, 0

    def add(self, seconds: float, waited: bool) -> dict[str, float]:
        """Count a step. The first one is not counted, because its time includes the start of the input.

        Args:
            seconds: How long the step took.
            waited: Whether the devices had finished before the next batch was ready.

        Returns:
            ``images_per_second``, unless it is the first step.
        """
        self._steps += 1
        if self._steps == 0:
            return {}
        self._seconds += seconds
        self._waits += waited
        return {"images_per_second": self._batch_size / seconds}

    def __str__(self) -> str:
        rate = self._steps * self._batch_size / self._seconds
        return f"{rate:.0f} images a second; the devices waited for images in {self._waits} of {self._steps} steps"


def draw_curves(workdir: Path, best: tuple[int, str] | None = None) -> Path:
    """Draw loss and accuracy over the steps, in training and on the held-out images, from ``metrics.jsonl``.

    Args:
        workdir: The folder of the run.
        best: The step of the best evaluation, which a vertical line marks, and the label of this line.

    Returns:
        The picture, ``curves.png`` in the same folder.

    Raises:
        OSError: If the metrics are missing or cannot be read, or if the picture cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend and keep figures alive
    from matplotlib.ticker import LogLocator, NullFormatter

    records = [record for _, record in _records(workdir / METRICS)]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, color in ((TRAIN, "#0072b2"), (HELD_OUT, "#d55e00")):  # Okabe and Ito's, for the colour-blind, too
            points = [(record["step"], record.get(name)) for record in records if record["split"] == split]
            steps, values = np.array(points, np.float64).reshape(-1, 2).T  # [n]; null is NaN, a gap in the curve
            if split == TRAIN:
                axes.plot(steps, values, color=color, alpha=0.25, lw=0.8)
                axes.plot(steps, _smooth(values), color=color, label="training, batch by batch and smoothed")
            else:
                axes.plot(steps, values, color=color, marker="o", ms=4, label="held out")
        if best:
            axes.axvline(best[0], color="#d55e00", lw=1, ls=":", label=f"best: {best[1]}")
        axes.set(xlabel="step", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yscale("log")  # a first loss of 70 would flatten all others on a linear one
    low, high = figure.axes[0].get_ylim()
    # Labels at 2 and 5 help on a short axis. On one of many decades, LogLocator would draw no label at all with them.
    figure.axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    figure.axes[0].yaxis.set_major_formatter("{x:g}")
    figure.axes[0].yaxis.set_minor_formatter(NullFormatter())
    figure.axes[1].set_ylim(-0.01, 1.01)  # lines at 0 and 100 % keep their full width
    figure.axes[1].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    write_atomically(workdir / CURVES, picture.getvalue())
    return workdir / CURVES


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the moving average over a fortieth of the values, fewer at the ends: [n] -> [n]. NaN is left out."""
    width = 2 * (len(values) // 80) + 1
    means = uniform_filter1d(np.nan_to_num(values), width, mode="constant")  # with 0 for NaN and beyond the ends
    shares = uniform_filter1d(np.isfinite(values).astype(float), width, mode="constant")  # of finite values
    return np.divide(means, shares, out=np.full_like(values, np.nan), where=shares > 0)


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line and its record. Lines that are no record are skipped: a kill or a power cut can damage some.

    Raises:
        OSError: If the file cannot be read, or is not a regular file.
    """
    for line in read_regular_file(path, _MAX_METRICS_BYTES).splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if line.endswith(b"\n") and isinstance(record, dict) and _is_record(**record):
            yield line, record


def _is_record(split: Any = None, step: Any = None, **values: Any) -> bool:
    return (
        split in (TRAIN, HELD_OUT)
        and type(step) is int
        and 0 <= step < 2**31
        # An integer in JSON can be too large for a float. null stands for a value that is not finite.
        and all(x is None or (type(x) in (int, float) and abs(x) <= sys.float_info.max) for x in values.values())
    )


def _drop_records(start_step: int, path: Path) -> dict[str, Any] | None:
    """Drop the records that a run from this step on makes again; return the evaluation of the step if there was one."""

    def stays(record: Mapping[str, Any]) -> bool:
        return record["step"] < start_step or (record["step"] == start_step and record["split"] == TRAIN)

    if not path.exists():
        return None
    records = list(_records(path))
    write_atomically(path, b"".join(line for line, record in records if stays(record)))
    return next((record for _, record in records if record["step"] == start_step and not stays(record)), None)


def _append(file: BinaryIO, data: bytes) -> None:
    """Append all of the data to an unbuffered file, or none of it."""
    end = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise


def _event(**fields: Any) -> bytes:
    """Return a record of a TensorBoard file. tensorboardX's own writer hangs for ever once the disk is full."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))
