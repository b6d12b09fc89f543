"""The answers of one network, or of several together: the mean of their softmax over crops and networks."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int
from scipy.special import softmax

from flax_googlenet.commands.status import CommandError, Status
from flax_googlenet.evaluation.crops import crops
from flax_googlenet.images.files import Fail, read_ahead
from flax_googlenet.inference.predictor import Predictor, make_predictor
from flax_googlenet.training.classes import ClassMatch, find_classes
from flax_googlenet.training.datasets import DataError, Dataset
from flax_googlenet.weights.checkpoint import Weights


class Network(NamedTuple):
    """One network of an ensemble."""

    name: str
    """What to call it in messages."""
    predict: Predictor
    order: Int[np.ndarray, "num_classes"]
    """Where the classes of the ensemble's answers stand among this network's."""


def answers(
    networks: Sequence[Network], dataset: Dataset, num_crops: int, size: int, batch_size: int, fail: Fail
) -> Iterator[tuple[list[int], Float64[np.ndarray, "n num_classes"]]]:
    """Compute the probabilities of the classes, averaged over the crops of an image and over the networks.

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
        CommandError: if the answers of a network are not finite.
    """
    in_batch = max(1, batch_size // num_crops)

    def read(index: int) -> np.ndarray:
        return crops(dataset.read(index), num_crops, size)

    images = read_ahead(iter(range(len(dataset))), read, 2 * in_batch, fail)
    while batch := list(itertools.islice(images, in_batch)):
        views = np.concatenate([views for _, views in batch])
        total = 0.0
        for network in networks:
            logits = np.asarray(network.predict(views), np.float64)
            if not np.isfinite(logits).all():
                raise CommandError(Status.NOT_DONE, f"{network.name} is damaged: its answers are not finite")
            total = total + softmax(logits, axis=1)[:, network.order]
        yield [index for index, _ in batch], np.mean(np.split(total / len(networks), len(batch)), axis=1)


def make_networks(
    ensemble: Mapping[str, Weights], class_names: Sequence[str], data: str
) -> tuple[list[Network], ClassMatch]:
    """Prepare weights for ``answers``, and find the classes of the data among theirs.

    The weights must have the same classes, in any order. Weights without class names take the order of the others.

    Args:
        ensemble: weights by path.
        class_names: the classes of the data.
        data: what to call the data in messages.

    Returns:
        The networks, and the match of the data with the classes of their answers.

    Raises:
        DataError: if the weights do not have the same classes, or lack a class of the data.
    """
    first_path, first = next(iter(ensemble.items()))
    for path, weights in ensemble.items():
        if weights.model.num_classes != first.model.num_classes:
            counts = f"{first_path} has {first.model.num_classes} classes and {path} has {weights.model.num_classes}"
            raise DataError(f"{counts}: they cannot be averaged")
    # One file may have ImageNet's class names and another WordNet's identifiers: the data need only agree with one.
    errors = []
    for reference in [path for path, weights in ensemble.items() if weights.class_names] or [first_path]:
        try:
            match = find_classes(class_names, data, ensemble[reference], reference)
            break
        except DataError as error:
            errors.append(error)
    else:
        raise errors[0]
    names = ensemble[reference].class_names
    networks, notes = [], [*match.notes]
    for path, weights in ensemble.items():
        found = find_classes(names or class_names, reference if names else data, weights, path)
        notes += found.notes
        networks.append(Network(path, make_predictor(weights.model, weights.variables), np.argsort(found.wanted)))
    return networks, match._replace(notes=tuple(dict.fromkeys(notes)))


def image_size(ensemble: Mapping[str, Weights]) -> int:
    """The size that the networks were trained for; raises a CommandError unless it is one."""
    sizes = {path: weights.image_size for path, weights in ensemble.items()}
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise CommandError(Status.NOT_DONE, f"the weights are for images of different sizes: {listing}")
    return next(iter(sizes.values()))
