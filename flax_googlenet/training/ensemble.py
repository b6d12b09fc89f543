"""Weights, or several together, asked about images: the mean of their softmax over crops and networks."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.special import softmax

from flax_googlenet.files import Weights
from flax_googlenet.images import Fail, read_ahead
from flax_googlenet.inference import Predictor, make_predictor
from flax_googlenet.status import CommandError, Status
from flax_googlenet.training.crops import crops
from flax_googlenet.training.datasets import Dataset
from flax_googlenet.training.recipe import Recipe, RecipeError

_WORDNET_ID = re.compile(r"n\d{8}")
_LISTED = 5  # classes that an error lists


class Network(NamedTuple):
    """One of an ensemble."""

    predict: Predictor
    order: np.ndarray
    """int [num_classes]: where the classes of the first network of the ensemble stand among this one's."""


def answers(
    networks: Sequence[Network], dataset: Dataset, num_crops: int, size: int, batch_size: int, fail: Fail
) -> Iterator[tuple[list[int], Float64[np.ndarray, "n num_classes"]]]:
    """The probabilities of the classes, the mean over the crops of an image and over the networks.

    Threads read and crop the next images while the networks compute.

    Args:
        networks: one or more.
        dataset: the images.
        num_crops: 1, 10 or 144 of each image.
        size: height and width of a crop.
        batch_size: crops to compute at once; but never less than those of an image.
        fail: takes the message about an image that cannot be read.

    Yields:
        Places of images in the dataset, in order and without those that cannot be read, and float64 [n, num_classes].

    Raises:
        CommandError: if an answer is not finite.
    """
    in_batch = max(1, batch_size // num_crops)

    def read(index: int) -> np.ndarray:
        return crops(dataset.read(index), num_crops, size)

    images = read_ahead(iter(range(len(dataset))), read, 2 * in_batch, fail)
    while batch := list(itertools.islice(images, in_batch)):
        views = np.concatenate([views for _, views in batch])
        total = sum(
            softmax(np.asarray(network.predict(views), np.float64), axis=1)[:, network.order] for network in networks
        )
        if not np.isfinite(total).all():
            raise CommandError(Status.NOT_DONE, "the weights are wrong: their answers are not finite")
        yield [index for index, _ in batch], np.mean(np.split(total / len(networks), len(batch)), axis=1)


def find_classes(wanted: Sequence[str], data: str, weights: Weights, path: str) -> np.ndarray:
    """Where the wanted classes stand among those of the weights: int [len(wanted)].

    They go by name. Where the weights have no names, or the wanted names are WordNet's identifiers (n01440764), whose
    order is that of ImageNet's classes, they go by their order, if they are as many.

    Args:
        wanted: names of classes.
        data, path: what to call the data and the weights in a message.
        weights: the weights.

    Raises:
        CommandError: if a class cannot be found.
    """
    names, count = weights.class_names, weights.model.num_classes
    if names is None or names == list(wanted) or all(map(_WORDNET_ID.fullmatch, wanted)):
        if len(wanted) != count:
            reason = f"{data} has {len(wanted)} classes and {path} has {count}, which cannot be matched by name"
            raise CommandError(Status.NOT_DONE, reason)
        return np.arange(count)
    if problems := [repr(name) for name in wanted if names.count(name) != 1]:
        listing = ", ".join(problems[:_LISTED]) + (", ..." if len(problems) > _LISTED else "")
        raise CommandError(
            Status.NOT_DONE,
            f"{len(problems)} of the {len(wanted)} classes of {data} are not among the {count} of {path}, or not once: "
            f"{listing}; name the folders as the weights do: {names[0]!r}, ...",
        )
    return np.array([names.index(name) for name in wanted])


def make_networks(ensemble: Mapping[str, Weights]) -> list[Network]:
    """Weights by path -> networks for ``answers``; raises a CommandError unless all have the same classes."""
    networks = []
    first_path, first = next(iter(ensemble.items()))
    for path, weights in ensemble.items():
        if weights.model.num_classes != first.model.num_classes:
            counts = f"{first_path} has {first.model.num_classes} classes and {path} has {weights.model.num_classes}"
            raise CommandError(Status.NOT_DONE, f"{counts}: they are no ensemble")
        names = first.class_names or weights.class_names
        order = find_classes(names, first_path, weights, path) if names else np.arange(weights.model.num_classes)
        networks.append(Network(make_predictor(weights.model, weights.variables), order))
    return networks


def image_size(ensemble: Mapping[str, Weights]) -> int:
    """The size that the networks were trained for; raises a CommandError unless it is one."""
    sizes = {path: weights.image_size for path, weights in ensemble.items()}
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise CommandError(Status.NOT_DONE, f"the weights are for images of different sizes: {listing}")
    return next(iter(sizes.values()))


def recipe_of(metadata: Mapping[str, Any]) -> Recipe | None:
    """That of the run which made the weights; metadata is free: anything else under its name is none."""
    try:
        return Recipe.from_json(json.dumps(metadata["recipe"]))
    except (KeyError, RecipeError):
        return None
