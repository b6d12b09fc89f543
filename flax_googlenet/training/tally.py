"""What a run counts, and when that is too much."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.images.preprocessing import ImageError
from flax_googlenet.training.datasets import Dataset

ALWAYS_ALLOWED = 3
"""Number of unreadable images that stop no run, however small the data, unless the recipe allows none at all."""

NOT_FINITE_LIMIT = 5
"""Steps in a row whose loss or gradient is not finite, after which a run stops."""


class TooMuchError(GoogLeNetError, RuntimeError):
    """A run had better stop."""


@dataclasses.dataclass
class Tally:
    """Checkpoints hold it; its methods tell what a person should know of a step, and raise a TooMuchError."""

    step: int = 0
    """Batches seen, and so the position in the data, too."""
    unreadable: list[str] = dataclasses.field(default_factory=list)
    """Names of the training images in whose place others were read."""
    not_finite: int = 0
    """Steps that were left out, as their loss or gradient was not finite."""
    not_finite_in_a_row: int = 0
    best_step: int = 0
    """Step of the evaluation with the best accuracy; 0 before the first evaluation. Of equals it is the first one."""
    best_accuracy: float = 0.0
    trained_before: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The trainings before this one that made its first weights, as ``past_trainings`` returns them."""

    def add_accuracy(self, accuracy: float) -> bool:
        """Counts an evaluation; returns whether its accuracy is the best so far."""
        # A resumed run repeats the evaluation of the step from which it goes on: that must change nothing.
        is_best = self.best_step == 0 or accuracy > self.best_accuracy
        if is_best:
            self.best_step, self.best_accuracy = self.step, accuracy
        return is_best

    def add_finite(self, finite: bool, tell: Callable[[str], None]) -> None:
        """Counts whether loss and gradient of the step were finite."""
        self.not_finite_in_a_row = 0 if finite else self.not_finite_in_a_row + 1
        if finite:
            return
        self.not_finite += 1
        tell(f"step {self.step} is left out: its loss or gradient is not finite")
        if self.not_finite_in_a_row >= NOT_FINITE_LIMIT:
            raise TooMuchError(
                f"loss or gradient was not finite in {NOT_FINITE_LIMIT} steps in a row: try a lower learning_rate"
            )

    def add_unreadable(
        self, dataset: Dataset, indices: Iterable[int], max_corrupt: float, tell: Callable[[str], None]
    ) -> None:
        """Counts the images at the indices, each once however often it is met.

        ``max_corrupt`` is the share of the dataset that may be unreadable. Unless it is 0, ``ALWAYS_ALLOWED`` images
        may be unreadable in any case: a thousandth of 200 images would be none.
        """
        for index in indices:
            name = dataset.name(index)
            if name not in self.unreadable:
                self.unreadable.append(name)
                tell(f"{_reason(dataset, index)}; another image takes its place")
        if len(self.unreadable) > max(max_corrupt * len(dataset), ALWAYS_ALLOWED if max_corrupt else 0):
            raise TooMuchError(
                f"{len(self.unreadable)} of {len(dataset)} images cannot be read, more than max_corrupt "
                f"({max_corrupt:.2%}) allows: {', '.join(self.unreadable[:10])}; remove them, or raise "
                "--recipe.max-corrupt"
            )


def _reason(dataset: Dataset, index: int) -> str:
    try:
        dataset.read(index)
    except ImageError as error:
        return str(error)
    return f"{dataset.name(index)} could not be read at first"
