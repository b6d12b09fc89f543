"""The figures of a run: on the screen, in ``metrics.jsonl`` and for TensorBoard as it goes, and then as a picture."""

import io
import json
import math
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flax_googlenet.commands.terminal import draws_progress, message_console
from flax_googlenet.errors import printable
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
"""The metrics that the screen shows; the files have all of them."""

_SECONDS_BETWEEN_LINES = 10.0  # without a terminal, between two lines about training


class RunLog:
    """Tells the metrics of a run, for as long as its ``with`` block lasts.

    On a terminal a progress bar shows the latest ones; elsewhere lines do, at most one in ten seconds about training.
    ``metrics.jsonl`` gets one line for each record, ``{"split": "train" or "held_out", "step": int, name: float}``,
    where null stands for what is not finite. TensorBoard reads the folder, too. A line is in its file when the method
    returns, and stays there whatever kills the process; ``sync`` waits until the disk has it. A full disk is said, and
    stops nothing.

    Args:
        workdir: the folder of the run; it is there.
        total_steps: at which the run ends.
        start_step: at which it starts. Records of a run that went further than its last checkpoint are dropped: those
            of later steps, and the evaluation of this one, with which the run begins. So what is recorded in training
            must be recorded before the checkpoint of its step, and an evaluation after it.

    Raises:
        OSError: on entering, if the files cannot be opened.
    """

    def __init__(self, workdir: Path, total_steps: int, start_step: int = 0) -> None:
        self._workdir, self._start_step = workdir, start_step
        self._exit = ExitStack()
        self._disk_failed = False
        self._next_line = 0.0
        self._console = message_console()
        self._progress = Progress(
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not draws_progress(self._console),
            redirect_stdout=False,
            # The seconds over which rich averages the speed. With its default of 30, one evaluation would make the
            # time left jump to hours.
            speed_estimate_period=3600,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step)

    def __enter__(self) -> Self:
        from tensorboardX.proto.event_pb2 import SessionLog

        path = self._workdir / METRICS
        self._evaluation_before = _drop_records(self._start_step, path)
        events = self._workdir / f"events.out.tfevents.{time.time_ns()}"
        with ExitStack() as stack:
            self._lines = stack.enter_context(open(path, "ab", buffering=0))
            self._events = stack.enter_context(open(events, "xb", buffering=0))
            _append(self._events, _event(file_version="brain.Event:2"))
            # TensorBoard forgets the steps from this one on in the files before.
            _append(self._events, _event(step=self._start_step + 1, session_log=SessionLog(status=SessionLog.START)))
            stack.enter_context(self._progress)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records what the step that made the parameters those of ``step`` saw of its own batch."""
        self._record(TRAIN, step, metrics)
        text = _text(metrics)
        self._progress.update(self._task, completed=step, description=text)
        total = self._progress.tasks[0].total
        if self._progress.disable and (time.monotonic() >= self._next_line or step == total):
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            task = self._progress.tasks[0]  # its time left is None before the second step, and 0 after the last
            left = f", {TimeRemainingColumn().render(task)} left" if task.time_remaining else ""
            self._console.print(f"step {step}/{total}: {text}{left}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records what the parameters of ``step`` do on the held-out data."""
        self._record(HELD_OUT, step, metrics)
        self._console.print(f"step {step}: held out: {_text(metrics)}")

    def sync(self) -> None:
        """Waits until the disk has all records: before a checkpoint, after which a run does not make them again."""
        with suppress(OSError):  # what cannot be written is said when it is recorded
            os.fsync(self._lines.fileno())

    def message(self, text: str) -> None:
        """Says something beside the metrics, on the screen alone."""
        self._console.print(escape(printable(text)))

    def _record(self, split: str, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        record = {"split": split, "step": step} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        try:
            _append(self._lines, json.dumps(record, allow_nan=False).encode() + b"\n")
            if record != self._evaluation_before:  # TensorBoard has it, and could not forget this one alone
                summary = _scalars({f"{split}/{name}": value for name, value in values.items()})
                _append(self._events, _event(step=step, summary=summary))
            self._disk_failed = False
        except OSError as error:
            if not self._disk_failed:  # once is enough
                self.message(f"warning: cannot write the metrics: {error.strerror}; the run goes on without")
            self._disk_failed = True


def draw_curves(workdir: Path, best: tuple[int, str] | None = None) -> Path:
    """Draws loss and accuracy by step, in training and on the held-out data, from ``metrics.jsonl``.

    Args:
        workdir: the folder of the run.
        best: the step of the best evaluation, to be marked by a line, and the words for it.

    Returns:
        The picture, ``curves.png`` in the same folder.

    Raises:
        OSError: if there are no metrics, they cannot be read, or the picture cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend and keep figures alive
    from matplotlib.ticker import LogLocator, NullFormatter

    records = [record for _, record in _records(workdir / METRICS)]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, color in ((TRAIN, "#0072b2"), (HELD_OUT, "#d55e00")):  # Okabe and Ito's, for the colour-blind too
            points = [(record["step"], record.get(name)) for record in records if record["split"] == split]
            steps, values = np.array(points, np.float64).reshape(-1, 2).T  # null becomes NaN, a gap in the curve
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
    figure.axes[0].set_yscale("log")  # a first loss of 70 would flatten what follows
    low, high = figure.axes[0].get_ylim()
    # Labels at 2 and 5 help on a short axis. On one of many decades, LogLocator would draw no label at all with them.
    figure.axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    figure.axes[0].yaxis.set_major_formatter("{x:g}")
    figure.axes[0].yaxis.set_minor_formatter(NullFormatter())
    figure.axes[1].set_ylim(-0.01, 1.01)  # lines at 0 and at 100 % are seen in full width
    figure.axes[1].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    write_atomically(workdir / CURVES, picture.getvalue())
    return workdir / CURVES


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of a window of a fortieth of the values around each; shorter at the ends, and without NaN."""
    half = len(values) // 80
    ends = np.cumsum(np.concatenate([[0.0], np.nan_to_num(values, nan=0.0)]))
    counts = np.cumsum(np.concatenate([[0.0], np.isfinite(values)]))
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (ends[last] - ends[first]) / np.maximum(count, 1), np.nan)


def _text(metrics: Mapping[str, float]) -> str:
    return ", ".join(text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics)


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each line and its record, without lines that are no record of a run: a kill or power cut can damage them.

    Raises:
        OSError: if the file cannot be read, or is not a regular file.
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
        # Integers in JSON have no limit, floats have. null stands for a value that is not finite.
        and all(x is None or (type(x) in (int, float) and abs(x) <= sys.float_info.max) for x in values.values())
    )


def _drop_records(start_step: int, path: Path) -> dict[str, Any] | None:
    """Drop what a run that starts at the step records anew; return the evaluation of this step, if it was there."""

    def stays(record: Mapping[str, Any]) -> bool:
        return record["step"] < start_step or (record["step"] == start_step and record["split"] == TRAIN)

    if not path.exists():
        return None
    records = list(_records(path))
    write_atomically(path, b"".join(line for line, record in records if stays(record)))
    return next((record for _, record in records if record["step"] == start_step and not stays(record)), None)


def _append(file: BinaryIO, data: bytes) -> None:
    """Writes all of the data at the end of an unbuffered file, or nothing."""
    end = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise


def _event(**fields: Any) -> bytes:
    """One record of a TensorBoard file. Not by tensorboardX's writer, which waits for ever once the disk is full."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))


def _scalars(values: Mapping[str, float]) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
