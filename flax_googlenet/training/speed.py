"""Images a second, of the input alone and of the steps alone: which one limits a run."""

import time
from collections.abc import Iterator

from flax_googlenet.training.data import Batch

_SECONDS = 0.5  # for which the input is measured, at least


class Speed:
    """Measures a run; ``batch_size`` is that of all processes together."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._steps, self._seconds, self._starved = 0, 0.0, 0
        self._is_first = True

    def add(self, seconds: float, starved: bool) -> float | None:
        """Counts a step.

        Args:
            seconds: How long the step took.
            starved: Whether the devices were done before the next batch was there.

        Returns:
            Images per second; None for the first step, whose time has the start of the input and of the devices in it,
            and which counts nowhere.
        """
        if self._is_first:
            self._is_first = False
            return None
        if starved:
            self._starved += 1
        else:
            self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        return self._batch_size / seconds

    def compare(self, batches: Iterator[Batch], ahead: int) -> str:
        """A line for the person, for which it takes more batches: when no step is to come.

        Args:
            batches: the input.
            ahead: how many of them may have been made before they are asked for.
        """
        alone = input_speed(batches, ahead) * self._batch_size
        steps = f"{self._steps * self._batch_size / self._seconds:.0f}" if self._steps else "more"
        limit = "input is" if self._starved > self._steps else "steps are"
        return f"images a second: {alone:.0f} by the input alone, {steps} by the steps alone; the {limit} the limit"


def input_speed(batches: Iterator[Batch], ahead: int) -> float:
    """Batches a second while nothing else is computed; arguments as for ``Speed.compare``."""
    for _ in range(ahead):
        next(batches)
    count, start = 0, time.perf_counter()
    while count < ahead or time.perf_counter() - start < _SECONDS:
        next(batches)
        count += 1
    return count / (time.perf_counter() - start)
