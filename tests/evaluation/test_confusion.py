"""The counts of answers against scikit-learn's, and the picture of the confusion matrix."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image
from sklearn import metrics

from flax_googlenet.evaluation.confusion import Score, draw_confusion


def test_top5_and_the_confusion_matrix_are_counted_by_hand() -> None:
    wanted = np.array([-1, -1, 1, -1, -1, -1, 0, -1])  # the data has two of the network's eight classes
    score = Score(wanted, num_classes=2)
    #                 0    1    2    3    4    5    6    7
    likely_2 = [0.0, 0.0, 0.6, 0.0, 0.0, 0.1, 0.3, 0.0]
    likely_1 = [0.1, 0.3, 0.0, 0.1, 0.1, 0.1, 0.1, 0.2]  # class 6 is the sixth: of equals the first ones come first
    score.add(np.array([0, 1]), np.array([likely_2, likely_2]))
    score.add(np.array([0]), np.array([likely_1]))
    assert score.matrix.tolist() == [[0, 1, 1], [0, 1, 0]]  # the last column is for the network's other classes
    assert (score.count, score.top1, score.top5) == (3, 1 / 3, 2 / 3)


def test_the_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    wanted = np.array([3, -1, 0, 2, 4, 1, -1, -1])  # the data has five of the network's eight classes
    labels = rng.choice(4, size=300, p=[0.7, 0.2, 0.07, 0.03])  # its last one has no image
    probabilities = rng.dirichlet(np.ones(8), size=300)
    score = Score(wanted, num_classes=5)
    for batch in np.split(np.arange(300), [7, 100]):
        score.add(labels[batch], probabilities[batch])
    right, answers = np.argsort(wanted)[3:][labels], probabilities.argmax(1)  # classes of the network
    columns = [*np.argsort(wanted)[3:], 1, 6, 7]
    matrix = metrics.confusion_matrix(right, answers, labels=columns)[:5]
    np.testing.assert_array_equal(score.matrix, np.c_[matrix[:, :5], matrix[:, 5:].sum(1)])
    assert score.top1 == pytest.approx(metrics.accuracy_score(right, answers), rel=1e-15)
    top5 = metrics.top_k_accuracy_score(right, probabilities, k=5, labels=range(8))
    assert score.top5 == pytest.approx(top5, rel=1e-15)
    with warnings.catch_warnings(action="ignore"):  # answers that are no class of the data
        recall = metrics.balanced_accuracy_score(right, answers)
    assert score.balanced_accuracy == pytest.approx(recall, rel=1e-15)


@pytest.mark.parametrize("classes", [2, 10, 50, 1000])
def test_the_picture_shows_every_right_answer_whatever_the_number_of_classes(tmp_path: Path, classes: int) -> None:
    names = [f"thing $x_{i}$\x1b or so, with a long name" for i in range(classes)]
    draw_confusion(tmp_path / "confusion.png", 7 * np.eye(classes, dtype=np.int64), names)
    picture = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB"), np.int32)
    dark = (abs(picture - np.array([8, 48, 107])).max(-1) < 8)[200:]  # the darkest blue, below the scale
    rows, columns = dark.any(1), dark.any(0)
    assert rows.sum() > 0.9 * (np.flatnonzero(rows).max() - np.flatnonzero(rows).min())
    assert columns.sum() > 0.9 * (np.flatnonzero(columns).max() - np.flatnonzero(columns).min())
    assert max(picture.shape) < 2500


def write_font(path: Path, character: str) -> None:
    """A font whose only glyph is a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(character): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path.parent.mkdir(parents=True)
    font.save(path)


def test_a_name_is_drawn_in_whatever_installed_font_has_it_and_is_a_number_where_none_has(tmp_path: Path) -> None:
    # Two Chinese characters that no usual font has; letters with a blank and a selector that have no outline anywhere.
    names = ["\U00030000", "caf\u00e9\u3000\u2764\ufe0f", "\U0003134a"]
    write_font(tmp_path / "fonts" / "squares.ttf", names[0])
    script = f"""if True:
        import numpy as np
        from pathlib import Path
        from flax_googlenet.evaluation.confusion import draw_confusion
        print(ascii(draw_confusion(Path("confusion.png"), np.diag([1, 1, 1]), {names!r})))"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == f"{names[2:]!a}\n"
    black = np.asarray(Image.open(tmp_path / "confusion.png").convert("L")) < 30  # the darkest blue has 43
    assert np.lib.stride_tricks.sliding_window_view(black, (12, 12)).all((2, 3)).any()
