"""Matches the classes of a data set with the classes of weights."""

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
# Lists of ImageNet's class names differ ("tench", "tench, Tinca tinca", "n01440764 tench"), but all of them have these
# words at these indices. Class folders in alphabetical order have other words there.
_IMAGENET_WORDS = {0: "tench", 1: "goldfish", 6: "stingray", 999: "toilet"}


class ClassMatch(NamedTuple):
    """Which class of a data set each class of a network stands for."""

    labels: Int[np.ndarray, "num_classes"]
    """For each class of the weights, the label of the same class in the data, or -1 if the data lack it."""
    notes: tuple[str, ...]
    """Messages for the user about the match."""

    @property
    def is_one_to_one(self) -> bool:
        """Whether the weights and the data have exactly the same classes, in any order."""
        return np.array_equal(np.sort(self.labels), np.arange(len(self.labels)))


def find_classes(class_names: Sequence[str], data: str, weights: Weights, path: str) -> ClassMatch:
    """Match the classes of data with the classes of weights by their names.

    The Unicode form of a name does not matter. A name that several classes of the weights share stands for all of them.
    Classes are matched by their order in two cases only, if both sides have the same number of classes: if the weights
    have no class names, or if one side has ImageNet's 1,000 names and the other 1,000 WordNet identifiers (n01440764),
    whose sorted order is the order of ImageNet's classes.

    Args:
        class_names: Class names of the data; some classes of the weights may be missing.
        data: Name of the data in messages.
        weights: The weights.
        path: Name of the weights in messages.

    Raises:
        DataError: If a class cannot be found.
    """
    names, count = weights.class_names, weights.model.num_classes
    if names is None:
        if len(class_names) != count:
            raise DataError(f"{path} has no class names and {count} classes, but {data} has {len(class_names)} classes")
        note = f"{path} has no class names: its {count} classes are assumed to be those of {data}, in the same order"
        return ClassMatch(np.arange(count), (note,))
    wanted, names = ([unicodedata.normalize("NFC", name) for name in side] for side in (class_names, names))
    if names == wanted:
        return ClassMatch(np.arange(count), ())
    indices = defaultdict(list)
    for index, name in enumerate(names):
        indices[name].append(index)
    if missing := [name for name in wanted if name not in indices]:
        for ids, others, whose in ((wanted, names, data), (names, wanted, path)):
            if _is_wordnet(ids) and _is_imagenet(others):
                note = f"the WordNet identifiers of {whose} are matched with ImageNet's class names by their order"
                by_id = np.argsort(ids)  # the index in ids of ImageNet's first class, of its second, ...
                return ClassMatch(by_id if ids is wanted else np.argsort(by_id), (note,))
        raise DataError(
            f"{len(missing)} of the {len(wanted)} classes of {data} are not among the {count} of {path}: "
            f"{listing(map(repr, missing))}; use the names in {path}: {listing(map(repr, names))}"
        )
    if len(set(wanted)) < len(wanted):
        shared = listing(repr(name) for name in sorted(set(wanted)) if wanted.count(name) > 1)
        raise DataError(f"{data} has several classes with the same name: {shared}; {path} cannot tell them apart")
    labels, notes = np.full(count, -1), []
    for label, name in enumerate(wanted):
        labels[indices[name]] = label
        if len(indices[name]) > 1:
            notes.append(f"{path} has {len(indices[name])} classes named {name!r}: each of them counts as correct")
    return ClassMatch(labels, tuple(notes))


def _is_wordnet(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names) == 1000 and all(map(_WORDNET_ID.fullmatch, names))


def _is_imagenet(names: Sequence[str]) -> bool:
    return len(names) == 1000 and all(word in names[i].casefold() for i, word in _IMAGENET_WORDS.items())
