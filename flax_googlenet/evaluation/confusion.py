"""The confusion matrix: counted, and as a picture that is readable with ten classes and with a thousand."""

import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int

from flax_googlenet.errors import printable
from flax_googlenet.files import write_atomically

OTHER = "another class"

_MAX_NUMBERED = 20  # classes up to which each cell has its number
_MAX_NAMED = 60  # classes up to which rows and columns have their names
_MAX_CELLS = 100  # rows: with more classes than that, a cell stands for several
_LONGEST_NAME = 24
_PAIRS = 20


class Score:
    """Counts right and wrong answers.

    Args:
        wanted: for each class of the network, the class of the data that it stands for, or -1 for none.
        num_classes: how many classes the data has.
    """

    def __init__(self, wanted: Int[np.ndarray, "m"], num_classes: int) -> None:
        self._column = np.where(wanted < 0, num_classes, wanted)
        self._matrix = np.zeros((num_classes, num_classes + 1), np.int64)
        self._in_top5 = 0

    def add(self, labels: Int[np.ndarray, "n"], probabilities: Float64[np.ndarray, "n m"]) -> None:
        """Counts answers; labels are classes of the data. Of equally likely classes the first one is the answer."""
        top5 = self._column[np.argsort(-probabilities, axis=1, kind="stable")[:, :5]]
        np.add.at(self._matrix, (labels, top5[:, 0]), 1)
        self._in_top5 += int((top5 == labels[:, None]).any(1).sum())

    @property
    def matrix(self) -> np.ndarray:
        """int [n, n]: images of the row's class, answered as the column's; with one column more for other answers."""
        has_others = self._column.max() == len(self._matrix)
        return self._matrix if has_others else self._matrix[:, :-1]

    @property
    def count(self) -> int:
        return int(self._matrix.sum())

    @property
    def top1(self) -> float:
        return float(np.trace(self._matrix) / self.count)

    @property
    def top5(self) -> float:
        return self._in_top5 / self.count

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the classes' recalls: of each class that has images, the fraction of right answers."""
        counts = self._matrix.sum(1)
        return float(np.mean(np.diagonal(self._matrix)[counts > 0] / counts[counts > 0]))


def draw_confusion(path: Path, matrix: Int[np.ndarray, "n n_or_more"], class_names: Sequence[str]) -> list[str]:
    """Draw which classes are taken for which, and list the pairs that are confused most often.

    A class whose name no installed font can draw is shown as its number, as ``class 17``.

    Args:
        path: the picture, a PNG.
        matrix: how many images of the class of the row were taken for that of the column. One column more than there
            are rows counts answers that are none of the classes.
        class_names: of the rows.

    Returns:
        The class names that are shown as numbers.

    Raises:
        OSError: if the picture cannot be written.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend and keep figures alive

    names = [_short(name) for name in class_names]
    fonts, undrawable = _find_fonts(set("".join(names)))
    numbered = {i: f"class {i}" for i, name in enumerate(names) if undrawable.intersection(name)}
    names = [numbered.get(i, name) for i, name in enumerate(names)]
    columns = [*names, OTHER][: matrix.shape[1]]
    in_cell = -(-len(names) // _MAX_CELLS)
    cells = _sum_blocks(matrix, in_cell)
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)

    side = np.clip(0.35 * len(columns), 4, 9)  # inches
    figure = Figure(figsize=(side + 5, side + 2.5), layout="constrained")
    axes = figure.subplots()
    # Rare confusions count: on a linear scale one image in fifty would be white. No cell is smoothed into the next.
    extent = (-0.5, in_cell * shares.shape[1] - 0.5, in_cell * shares.shape[0] - 0.5, -0.5)
    picture = axes.imshow(shares, "Blues", norm=PowerNorm(0.4, 0, 1), interpolation="nearest", extent=extent)
    ticks = [0, 0.01, 0.05, 0.2, 0.5, 1]
    legend = "share of the images of the row" + (f"; a cell is {in_cell} classes by {in_cell}" if in_cell > 1 else "")
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


def _find_fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Find fonts for characters that the usual font lacks, as Chinese, Japanese and Korean ones.

    The font files themselves are looked at, because matplotlib's own list is a cache, which knows nothing of fonts that
    were installed since.

    Returns:
        Names of font families, of which matplotlib takes for each character the first one that has it; and the
        characters that no font has.
    """
    from matplotlib import font_manager

    # Blanks, the joiners of Persian words, and the variation selectors of emoji have no outline in any font.
    blank = {c for c in characters if unicodedata.category(c) in ("Zs", "Cf") or "\ufe00" <= c <= "\ufe0f"}
    characters = characters - blank
    usual = font_manager.FontProperties()
    families, missing = [*usual.get_family()], characters - _drawable(characters, font_manager.findfont(usual))
    files = font_manager.findSystemFonts() if missing else []
    drawable = {file: _drawable(missing, file) for file in files if "LastResort" not in file}  # macOS: has only boxes
    # Of fonts with as many of the characters, one that looks like the usual font.
    for file in sorted(drawable, key=lambda file: (-len(drawable[file]), "Sans" not in file, "Regular" not in file)):
        if drawable[file] & missing:
            font_manager.fontManager.addfont(file)
            families.append(font_manager.get_font(file).family_name)
            missing -= drawable[file]
    return families, missing


def _drawable(characters: set[str], file: str) -> set[str]:
    """Return which of the characters a font has outlines for; emoji are often bitmaps, which matplotlib cannot draw."""
    from matplotlib.font_manager import get_font

    def has_outline(character: str) -> bool:
        if not font.get_char_index(ord(character)):
            return False
        font.load_char(ord(character))
        return len(font.get_path()[0]) > 0

    try:
        font = get_font(file)
        return {character for character in characters if has_outline(character)}
    except (OSError, RuntimeError):  # damaged, or bitmaps alone
        return set()


def _sum_blocks(matrix: np.ndarray, side: int) -> np.ndarray:
    """int [n, m] -> int [ceil(n / side), ceil(m / side)]"""
    rows = np.add.reduceat(matrix, np.arange(0, matrix.shape[0], side), axis=0)
    return np.add.reduceat(rows, np.arange(0, matrix.shape[1], side), axis=1)


def _most_confused(matrix: np.ndarray) -> np.ndarray:
    """int [up to _PAIRS, 2]: the places off the diagonal with the highest counts, the highest first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    places = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    return np.stack(np.unravel_index(places[wrong.flat[places] > 0], wrong.shape), axis=1)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
