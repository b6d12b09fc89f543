"""What ends a run before its end: a signal, or too many images and steps that fail; and what a run counts."""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.images.preprocessing import ImageError
from flax_googlenet.training.datasets import Dataset

ALWAYS_ALLOWED = 3
"""Number of unreadable images that never stop a run, however small the data, unless ``max_corrupt`` is 0."""

NOT_FINITE_LIMIT = 5
"""Number of steps in a row without a finite loss and gradient after which a run stops."""


class TrainingStopped(GoogLeNetError, RuntimeError):  # noqa: N818  it is no error where a signal stopped the run
    """A training ended before its end. The same call of ``train`` continues it from its last checkpoint.

    Attributes:
        path: The last checkpoint, a folder in ``checkpoints/`` of the run's folder, or None if there is none yet.
        signal: The signal that stopped the training, which saved a checkpoint first; or None if an error stopped it.
    """

    def __init__(self, message: str, path: Path | None = None, signal: signal.Signals | None = None) -> None:
        super().__init__(message)
        self.path, self.signal = path, signal


class StopRequestedError(GoogLeNetError):
    """A signal asked a run to stop, in this process or in another one of the run."""


class TooManyFailuresError(GoogLeNetError, RuntimeError):
    """So many steps or images of a run failed that going on makes no sense."""


@dataclasses.dataclass
class RunCounts:
    """What a run has counted so far. Each checkpoint stores it."""

    step: int = 0
    """Number of batches seen, which is also the position in the data."""
    unreadable: list[str] = dataclasses.field(default_factory=list)
    """Names of the training images that could not be read, and were replaced by others."""
    not_finite: int = 0
    """Number of steps that were skipped because their loss or gradient was not finite."""
    not_finite_in_a_row: int = 0
    """Number of such steps since the last finite one."""
    best_step: int = 0
    """Step of the first evaluation with the best accuracy, or 0 before the first evaluation."""
    best_accuracy: float = 0.0
    """Accuracy of that evaluation."""
    trained_before: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Earlier trainings of the weights that the run started from, as ``past_trainings`` returns them."""

    def add_accuracy(self, accuracy: float) -> bool:
        """Count an evaluation of the current step, and return whether its accuracy is the best so far."""
        # A resumed run repeats the evaluation of the step that it continues from. That must change nothing.
        is_best = self.best_step == 0 or accuracy > self.best_accuracy
        if is_best:
            self.best_step, self.best_accuracy = self.step, accuracy
        return is_best

    def add_finite(self, finite: bool, report: Callable[[str], None]) -> None:
        """Count whether the loss and the gradient of the current step were finite.

        Raises:
            TooManyFailuresError: If they were not in ``NOT_FINITE_LIMIT`` steps in a row.
        """
        self.not_finite_in_a_row = 0 if finite else self.not_finite_in_a_row + 1
        if finite:
            return
        self.not_finite += 1
        report(f"step {self.step} is skipped: its loss or gradient is not finite")
        if self.not_finite_in_a_row >= NOT_FINITE_LIMIT:
            raise TooManyFailuresError(
                f"loss or gradient was not finite in {NOT_FINITE_LIMIT} steps in a row: try a lower learning_rate"
            )

    def add_unreadable(
        self, dataset: Dataset, indices: Iterable[int], max_corrupt: float, report: Callable[[str], None]
    ) -> None:
        """Count training images that could not be read, each of them once.

        Args:
            dataset: The training images.
            indices: The places of the unreadable images in it.
            max_corrupt: The share of the dataset that may be unreadable. Unless it is 0, ``ALWAYS_ALLOWED`` images may
                be unreadable in any case: a thousandth of 200 images would be none.
            report: Called with the reason for each image that was not counted before.

        Raises:
            TooManyFailuresError: If more images are unreadable than that.
        """
        for index in indices:
            name = dataset.name(index)
            if name not in self.unreadable:
                self.unreadable.append(name)
                report(f"{_reason(dataset, index)}; another image takes its place")
        if len(self.unreadable) > max(max_corrupt * len(dataset), ALWAYS_ALLOWED if max_corrupt else 0):
            raise TooManyFailuresError(
                f"{len(self.unreadable)} of {len(dataset)} images cannot be read, more than max_corrupt "
                f"({max_corrupt:.2%}) allows: {', '.join(self.unreadable[:10])}; remove them, or raise max_corrupt"
            )


def _reason(dataset: Dataset, index: int) -> str:
    """Return why an image cannot be read, by trying once more."""
    try:
        dataset.read(index)
    except ImageError as error:
        return str(error)
    return f"{dataset.name(index)} could not be read at first"


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a wish to stop, which a run notices between two steps.

    In the ``with`` block, the first Ctrl-C and any SIGTERM only set ``received``. A second Ctrl-C has its usual effect.
    Only the main thread can handle signals: in another thread the block changes nothing.

    Args:
        patience: The number of seconds that a wait for the next batch may last after a signal.
    """

    received: signal.Signals | None = None
    """The last signal, or None if none came."""

    def __init__(self, patience: float = 0.0) -> None:
        self._patience, self._since = patience, 0.0

    def end_wait(self) -> bool:
        """Return whether a wait for the next batch must end because of a signal."""
        return self.received is not None and time.monotonic() - self._since >= self._patience

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:  # a shell script starts its background jobs with SIGINT ignored
                signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self._since = time.monotonic()
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
            # Written past Python's files, as the interrupted code may hold their locks. On a terminal the message
            # replaces the line of progress, which is drawn again below.
            with suppress(OSError, AttributeError):  # standard error is closed, or is no file
                descriptor = sys.stderr.fileno()
                erase_line = b"\r\x1b[2K" if os.isatty(descriptor) else b""
                os.write(descriptor, erase_line + b"stopping after this step; Ctrl-C again ends at once\n")
