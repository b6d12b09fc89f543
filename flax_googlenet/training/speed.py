"""Images a second, of the input alone and of the steps alone: which one limits a run."""

import time
from collections import deque
from collections.abc import Iterator

from flax_googlenet.training.data import Batch

_SECONDS, _IMAGES = 1.0, 2048  # for which the input is measured, at most


class Speed:
    """Measures a run; ``batch_size`` is that of all processes together."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._input = float("nan")
        self._steps, self._seconds, self._starved = 0, 0.0, 0

    def of_input(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Measures how fast batches come while nothing else is computed; returns all of them."""
        taken = deque([next(batches)])  # the first one starts threads or worker processes
        start = time.perf_counter()
        while True:
            taken.append(next(batches))
            seconds = time.perf_counter() - start
            if seconds > _SECONDS or len(taken) * self._batch_size > _IMAGES:
                break
        self._input = (len(taken) - 1) * self._batch_size / seconds
        return _all_of(taken, batches)

    def add(self, seconds: float, starved: bool) -> None:
        """Counts a step, and whether the devices were done before the next batch was there."""
        if starved:
            self._starved += 1
        else:
            self._steps, self._seconds = self._steps + 1, self._seconds + seconds

    def __str__(self) -> str:
        steps = f"{self._steps * self._batch_size / self._seconds:.0f}" if self._steps else "more"
        limit = "input is" if self._starved > self._steps else "steps are"
        return (
            f"images a second: {self._input:.0f} by the input alone, {steps} by the steps alone; the {limit} the limit"
        )


def _all_of(taken: deque[Batch], rest: Iterator[Batch]) -> Iterator[Batch]:
    while taken:
        yield taken.popleft()  # and keep none of them
    yield from rest
