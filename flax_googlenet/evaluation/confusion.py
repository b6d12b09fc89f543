"""The accuracies and the confusion matrix, and a picture of it that is readable with ten classes or a thousand."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int

from flax_googlenet.errors import printable
from flax_googlenet.files import write_atomically
from flax_googlenet.images.fonts import find_fonts

OTHER = "another class"

_MAX_NUMBERED = 20  # with more classes, the cells have no numbers
_MAX_NAMED = 60  # with more classes, the rows and columns have no names
_MAX_CELLS = 100  # with more classes, a cell stands for several
_LONGEST_NAME = 24  # characters; longer names are cut
_PAIRS = 20  # how many confusions are listed


class Score:
    """The counts of right and wrong answers, and the accuracies that follow from them.

    Args:
        label_of_class: For each class of the network, its label in the data, or -1 if the data lacks it.
        num_classes: Number of classes of the data.
    """

    def __init__(self, label_of_class: Int[np.ndarray, "m"], num_classes: int) -> None:
        self._column = np.where(label_of_class < 0, num_classes, label_of_class)
        self._matrix = np.zeros((num_classes, num_classes + 1), np.int64)
        self._in_top5 = 0

    def add(self, labels: Int[np.ndarray, "n"], probabilities: Float64[np.ndarray, "n m"]) -> None:
        """Count the answers for n images, whose labels are classes of the data.

        Of equally likely classes, the first one is the answer.
        """
        top5 = self._column[np.argsort(-probabilities, axis=1, kind="stable")[:, :5]]
        np.add.at(self._matrix, (labels, top5[:, 0]), 1)
        self._in_top5 += int((top5 == labels[:, None]).any(1).sum())

    @property
    def matrix(self) -> np.ndarray:
        """int [n, n]: how many images of the row's class were taken for the column's class.

        If the network has classes that the data lacks, there is one more column, for such answers.
        """
        has_others = self._column.max() == len(self._matrix)
        return self._matrix if has_others else self._matrix[:, :-1]

    @property
    def count(self) -> int:
        """Number of images counted."""
        return int(self._matrix.sum())

    @property
    def top1(self) -> float:
        """Share of images whose likeliest class is right."""
        return float(np.trace(self._matrix) / self.count)

    @property
    def top5(self) -> float:
        """Share of images whose right class is among the five likeliest."""
        return self._in_top5 / self.count

    @property
    def balanced_accuracy(self) -> float:
        """The mean, over the classes that have images, of the fraction of right answers."""
        counts = self._matrix.sum(1)
        return float(np.mean(np.diagonal(self._matrix)[counts > 0] / counts[counts > 0]))


def draw_confusion(path: Path, matrix: Int[np.ndarray, "n n_or_more"], class_names: Sequence[str]) -> list[str]:
    """Draw which classes are taken for which, and list the pairs that are confused most often.

    A class whose name no installed font can draw is shown as its number, as ``class 17``.

    Args:
        path: The PNG file to write.
        matrix: The confusion matrix, as ``Score.matrix`` has it.
        class_names: The class names of the rows.

    Returns:
        The class names that are shown as numbers.

    Raises:
        OSError: If the picture cannot be written.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend and keep figures alive

    names = [_short(name) for name in class_names]
    fonts, undrawable = find_fonts(set("".join(names)))
    numbered = {i: f"class {i}" for i, name in enumerate(names) if undrawable.intersection(name)}
    names = [numbered.get(i, name) for i, name in enumerate(names)]
    columns = [*names, OTHER][: matrix.shape[1]]
    per_cell = -(-len(names) // _MAX_CELLS)  # classes
    cells = _sum_blocks(matrix, per_cell)
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)

    side = np.clip(0.35 * len(columns), 4, 9)  # inches
    figure = Figure(figsize=(side + 5, side + 2.5), layout="constrained")
    axes = figure.subplots()
    # Not a linear scale, on which a confusion of one image in fifty would be white; and no smoothing between cells.
    extent = (-0.5, per_cell * shares.shape[1] - 0.5, per_cell * shares.shape[0] - 0.5, -0.5)
    picture = axes.imshow(shares, "Blues", norm=PowerNorm(0.4, 0, 1), interpolation="nearest", extent=extent)
    ticks = [0, 0.01, 0.05, 0.2, 0.5, 1]
    legend = "share of the row's images" + (f"; a cell is {per_cell} by {per_cell} classes" if per_cell > 1 else "")
    figure.colorbar(picture, ax=axes, location="top", format="{x:.0%}", ticks=ticks, aspect=40, label=legend)
    axes.set(xlabel="answer", ylabel="class")
    if len(names) <= _MAX_NAMED:
        size = 9 if len(names) <= _MAX_NUMBERED else 7
        axes.set_xticks(range(len(columns)), columns, rotation=90, parse_math=False, fontsize=size, fontfamily=fonts)
        axes.set_yticks(range(len(names)), names, parse_math=False, fontsize=size, fontfamily=fonts)
    if len(names) <= _MAX_NUMBERED:
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize=8)
    lines = [
        f"{matrix[row, column]} of {matrix[row].sum()}: {names[row]} \N{RIGHTWARDS ARROW} {columns[column]}"
        for row, column in _most_confused(matrix)
    ]
    text = "\n".join(["confused most often", "", *lines] if lines else ["nothing is confused"])
    text_box = axes.text(1.04, 1, text, transform=axes.transAxes, va="top", fontsize=8, parse_math=False)
    text_box.set(linespacing=1.4, fontfamily=fonts)

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())
    return [class_names[i] for i in numbered]


def _sum_blocks(matrix: np.ndarray, side: int) -> np.ndarray:
    """Sum the square blocks of a matrix: int [n, m] -> int [ceil(n / side), ceil(m / side)]."""
    rows = np.add.reduceat(matrix, np.arange(0, matrix.shape[0], side), axis=0)
    return np.add.reduceat(rows, np.arange(0, matrix.shape[1], side), axis=1)


def _most_confused(matrix: np.ndarray) -> np.ndarray:
    """Return the places off the diagonal with the highest counts, the highest first: int [up to _PAIRS, 2]."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    places = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    return np.stack(np.unravel_index(places[wrong.flat[places] > 0], wrong.shape), axis=1)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
