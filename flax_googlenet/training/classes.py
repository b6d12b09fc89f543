"""Finds the classes of a data set among those of a file of weights."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flax_googlenet.errors import listing
from flax_googlenet.training.datasets import DataError
from flax_googlenet.weights.checkpoint import Weights

_WORDNET_ID = re.compile(r"n\d{8}")
# Lists of ImageNet's class names differ ("tench", "tench, Tinca tinca", "n01440764 tench"), but all have these words at
# these places. The alphabetical order of class folders has other words there.
_IMAGENET_WORDS = {0: "tench", 1: "goldfish", 6: "stingray", 999: "toilet"}


class ClassMatch(NamedTuple):
    """Which class of a data set each class of a network stands for."""

    wanted: Int[np.ndarray, "num_classes"]
    """For each class of the weights, the class of the data that it stands for, or -1 for none."""
    notes: tuple[str, ...]
    """What a person should know about the match: sentences."""

    @property
    def is_one_to_one(self) -> bool:
        """Whether the weights and the data have exactly the same classes, in whatever order."""
        return np.array_equal(np.sort(self.wanted), np.arange(len(self.wanted)))


def find_classes(wanted: Sequence[str], data: str, weights: Weights, path: str) -> ClassMatch:
    """Finds the classes of data among those of weights, by their names.

    Names are equal whatever their Unicode form. A name that several classes of the weights share stands for all of
    them. The order of the classes counts in two cases only, if both sides have the same number of classes: where the
    weights have no class names, and where one side has ImageNet's 1,000 names and the other 1,000 WordNet identifiers
    (n01440764), whose order is that of ImageNet's classes.

    Args:
        wanted: the class names of the data. They may be fewer than those of the weights.
        data, path: what to call the data and the weights in messages.
        weights: the weights.

    Raises:
        DataError: if a class cannot be found.
    """
    names, count = weights.class_names, weights.model.num_classes
    if names is None:
        if len(wanted) != count:
            raise DataError(f"{path} has no class names and {count} classes, but {data} has {len(wanted)} classes")
        note = f"{path} has no class names: its {count} classes are taken in the order of those of {data}"
        return ClassMatch(np.arange(count), (note,))
    wanted, names = ([unicodedata.normalize("NFC", name) for name in side] for side in (wanted, names))
    if names == wanted:
        return ClassMatch(np.arange(count), ())
    places = defaultdict(list)
    for place, name in enumerate(names):
        places[name].append(place)
    if missing := [name for name in wanted if name not in places]:
        for ids, others, whose in ((wanted, names, data), (names, wanted, path)):
            if _is_wordnet(ids) and _is_imagenet(others):
                note = f"the WordNet identifiers of {whose} are matched with ImageNet's class names by their order"
                by_id = np.argsort(ids)  # where ImageNet's first class stands, its second, ...
                return ClassMatch(by_id if ids is wanted else np.argsort(by_id), (note,))
        raise DataError(
            f"{len(missing)} of the {len(wanted)} classes of {data} are not among the {count} of {path}: "
            f"{listing(map(repr, missing))}; use the names in {path}: {listing(map(repr, names))}"
        )
    if len(set(wanted)) < len(wanted):
        twice = sorted({name for name in wanted if wanted.count(name) > 1})
        shared = f"{data} has several classes with the same name: {listing(map(repr, twice))}"
        raise DataError(f"{shared}; {path} cannot tell them apart")
    found, notes = np.full(count, -1), []
    for label, name in enumerate(wanted):
        found[places[name]] = label
        if len(places[name]) > 1:
            notes.append(f"{path} has {len(places[name])} classes with the name {name!r}: each of them counts as right")
    return ClassMatch(found, tuple(notes))


def _is_wordnet(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names) == 1000 and all(map(_WORDNET_ID.fullmatch, names))


def _is_imagenet(names: Sequence[str]) -> bool:
    return len(names) == 1000 and all(word in names[i].casefold() for i, word in _IMAGENET_WORDS.items())
