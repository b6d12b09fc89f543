"""The classes of data are found among those of weights, by name or by order, or named."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
import reference

import flax_googlenet
from flax_googlenet.evaluation.confusion import Score
from flax_googlenet.training.classes import find_classes
from flax_googlenet.training.datasets import DataError
from flax_googlenet.weights.checkpoint import Weights

NAMES = ["flower", "goat", "temple", "zebra"]
IMAGENET = list(reference.IMAGENET.meta["categories"])
WORDNET = [f"n{1440764 + 37 * i:08}" for i in range(1000)]  # in ImageNet's order
ACCENTED = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]


def named(class_names: Sequence[str] | None, num_classes: int | None = None) -> Weights:
    model = flax_googlenet.GoogLeNet(num_classes=num_classes or len(class_names or []))
    return Weights(model, {}, {"class_names": class_names}, "")


@pytest.mark.parametrize(
    ("names", "classes", "wanted"),
    [
        (NAMES, ["zebra", "flower"], [1, -1, -1, 0]),
        (["n01440764", "n02102040", "n02979186"], ["n01440764", "n02979186"], [0, -1, 1]),  # WordNet's are names, too
        (WORDNET, WORDNET[::-1], [*range(999, -1, -1)]),
        (ACCENTED[:1], ACCENTED[1:], [0]),
        (ACCENTED[1:], ACCENTED[:1], [0]),
        (IMAGENET, ["zebra", "tench"], [1 if name == "tench" else 0 if name == "zebra" else -1 for name in IMAGENET]),
    ],
)
def test_classes_are_found_by_name(names: list[str], classes: list[str], wanted: list[int]) -> None:
    match = find_classes(classes, "data", named(names), "weights")
    assert match.labels.tolist() == wanted
    assert match.notes == ()
    assert match.is_one_to_one == (len(names) == len(classes))


@pytest.mark.parametrize(
    ("weights", "classes", "wanted", "note"),
    [
        (
            named(None, 3),
            ["b", "a", "c"],
            [0, 1, 2],
            "has no class names: its 3 classes are assumed to be those of",
        ),
        (named(IMAGENET), WORDNET, [*range(1000)], "identifiers of data are matched with ImageNet's class names"),
        (named(IMAGENET), WORDNET[::-1], [*range(999, -1, -1)], "identifiers of data are matched with ImageNet's"),
        (named(WORDNET[1:] + WORDNET[:1]), IMAGENET, [*range(1, 1000), 0], "identifiers of weights are matched with"),
    ],
)
def test_classes_are_found_by_their_order_where_they_have_no_names_or_are_imagenets(
    weights: Weights, classes: list[str], wanted: list[int], note: str
) -> None:
    match = find_classes(classes, "data", weights, "weights")
    assert match.labels.tolist() == wanted
    assert match.is_one_to_one
    (said,) = match.notes
    assert note in said


def test_a_name_that_two_classes_share_stands_for_both() -> None:
    match = find_classes(["crane", "goat"], "data", named(["crane", "goat", "crane", "maillot"]), "weights")
    assert match.labels.tolist() == [0, 1, 0, -1]
    assert match.notes == ("weights has 2 classes named 'crane': each of them counts as correct",)
    assert not match.is_one_to_one
    score = Score(match.labels, 2)
    score.add(np.array([0, 0, 0, 1]), np.eye(4)[[0, 2, 3, 2]])
    assert score.matrix.tolist() == [[2, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("weights", "classes", "message"),
    [
        (named(["daisy", "rose", "tulip"]), WORDNET[:3], "3 of the 3 classes of data are not among the 3 of weights"),
        (
            named(WORDNET[:3]),
            WORDNET[1:4],
            f"not among the 3 of weights: '{WORDNET[3]}'; use the names in weights: '{WORDNET[0]}', ",
        ),
        (named(WORDNET), [*WORDNET[1:], "n09999999"], "1 of the 1000 classes of data are not among"),
        (named([f"class {i}" for i in range(1000)]), WORDNET, "1000 of the 1000 classes of data are not among"),
        (named(IMAGENET), WORDNET[:999], "999 of the 999 classes of data are not among the 1000 of weights"),
        (named(None, 4), WORDNET[:3], "weights has no class names and 4 classes, but data has 3 classes"),
        (named(["a", "b", "c"]), ["a", "a", "b"], "data has several classes with the same name: 'a'"),
    ],
)
def test_classes_that_cannot_be_found_are_named(weights: Weights, classes: list[str], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        find_classes(classes, "data", weights, "weights")
