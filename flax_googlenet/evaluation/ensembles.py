"""The answers of one network or several: the mean of their probabilities over crops and networks."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float64, Int

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.evaluation.crops import crops
from flax_googlenet.images.files import Fail, read_ahead
from flax_googlenet.inference.predictor import Predictor, make_predictor, probabilities, sent_ahead
from flax_googlenet.training.classes import ClassMatch, find_classes
from flax_googlenet.training.datasets import DataError, Dataset
from flax_googlenet.weights.checkpoint import Weights


class EvaluationError(GoogLeNetError, ValueError):
    """Networks that cannot be evaluated together; the message says how they differ."""


class Network(NamedTuple):
    """One network of an ensemble."""

    name: str
    """The name of the network in messages."""
    predict: Predictor
    order: Int[np.ndarray, "num_classes"]
    """For each class of the ensemble's answers, its place among the classes of this network."""


def answers(
    networks: Sequence[Network], dataset: Dataset, num_crops: int, size: int, batch_size: int, fail: Fail
) -> Iterator[tuple[list[int], Float64[np.ndarray, "n num_classes"]]]:
    """Compute the probabilities of the classes, averaged over the crops of an image and over the networks.

    Threads read and crop the next images while the networks compute.

    Args:
        networks: One network or more.
        dataset: The images.
        num_crops: Number of crops of each image: 1, 10 or 144.
        size: Height and width of a crop, in pixels.
        batch_size: Number of crops to compute at once, but at least those of one image.
        fail: Takes the message about each image that cannot be read.

    Yields:
        The places of n images in the dataset, in order and without those that cannot be read, and their probabilities,
        float64 [n, num_classes].

    Raises:
        CheckpointError: If the answers of a network are not finite.
    """
    in_batch = max(1, batch_size // num_crops)

    def read(index: int) -> np.ndarray:
        return crops(dataset.read(index), num_crops, size)

    images = read_ahead(iter(range(len(dataset))), read, 2 * in_batch, fail)
    batches = iter(lambda: list(itertools.islice(images, in_batch)), [])

    def send(batch: list[tuple[int, np.ndarray]]) -> list[ArrayLike]:
        views = np.concatenate([views for _, views in batch])  # [n * num_crops, size, size, 3]
        return [network.predict(views) for network in networks]

    for batch, logits in sent_ahead(send, batches):
        total = sum(
            probabilities(one, network.name)[:, network.order] for one, network in zip(logits, networks, strict=True)
        )  # [n * num_crops, num_classes]
        yield [index for index, _ in batch], np.mean(np.split(total / len(networks), len(batch)), axis=1)


def make_networks(
    ensemble: Mapping[str, Weights], class_names: Sequence[str], data: str
) -> tuple[list[Network], ClassMatch]:
    """Prepare weights for ``answers``, and find the classes of the data among theirs.

    The weights must have the same classes, in any order. Weights without class names take the order of the others.

    Args:
        ensemble: The weights, by the path of their file.
        class_names: The class names of the data.
        data: The name of the data in messages.

    Returns:
        The networks, and the match of the data with the classes of their answers.

    Raises:
        EvaluationError: If the weights have different numbers of classes.
        DataError: If the weights have different classes, or lack a class of the data.
    """
    first_path, first = next(iter(ensemble.items()))
    for path, weights in ensemble.items():
        if weights.model.num_classes != first.model.num_classes:
            counts = f"{first_path} has {first.model.num_classes} classes and {path} has {weights.model.num_classes}"
            raise EvaluationError(f"{counts}: they cannot be averaged; evaluate them one by one")
    # One file may have ImageNet's class names and another WordNet identifiers: the data need only agree with one file.
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
        networks.append(Network(path, make_predictor(weights.model, weights.variables), np.argsort(found.labels)))
    return networks, match._replace(notes=tuple(dict.fromkeys(notes)))


def image_size(ensemble: Mapping[str, Weights]) -> int:
    """Return the image size that all networks were trained for; raise an EvaluationError if the sizes differ."""
    sizes = {path: weights.image_size for path, weights in ensemble.items()}
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise EvaluationError(f"the weights are for images of different sizes: {listing}; evaluate them one by one")
    return next(iter(sizes.values()))
