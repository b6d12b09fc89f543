"""Decides which images of a data set a run trains on, and which ones weights are evaluated on."""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool

from flax_googlenet.training.class_folders import find_parts, read_class_folders, read_parts
from flax_googlenet.training.datasets import DataError, Dataset, has_idx_files, read_digits, read_idx_files
from flax_googlenet.training.history import Training


def open_data(data: str, *, held_out: float, seed: int, earlier: Sequence[Training] = ()) -> tuple[Dataset, Dataset]:
    """Return the images to train on, and the images to evaluate on.

    Args:
        data: A folder in one of the layouts that ``class_folders.EXPECTED`` lists, or ``digits``; ``./digits`` is a
            folder of that name. The parts of a data set may have other usual names than train/ and val/, such as
            Training/ and Testing/ or seg_train/ and seg_test/, in upper or lower case; of train/, val/ and test/ the
            last is not used.
        held_out: The share of each class to evaluate on, for class folders and ``digits``. At least one image of a
            class is held out and at least one is not; the only image of a class is not held out.
        seed: The seed of the choice of held-out images.
        earlier: The trainings of the weights that a run starts from. If they used images that are held out now, a note
            of the training images warns of it. Only class folders and ``digits`` are compared.

    Raises:
        DataError: If the data have none of the layouts, if two folders may be the same part, if a class is empty or is
            missing in one of the parts (the message lists all such classes), if an IDX file is missing or damaged, or
            if nothing would be held out.
    """
    if data == "digits":
        return _hold_out(read_digits(), data, held_out, seed, earlier)
    if has_idx_files(data):
        return read_idx_files(data)
    parts = find_parts(data)
    if not parts:
        return _hold_out(read_class_folders(data), data, held_out, seed, earlier)
    train, test = read_parts(parts)
    if (parts.train, parts.held_out) != ("train", "val") or parts.unused:
        note = f"{data}: {parts.train}/ is trained on and {parts.held_out}/ is held out{parts.unused_note}"
        train = replace(train, notes=(note, *train.notes))
    return train, test


def find_data(data: str, trainings: Sequence[Training]) -> tuple[Dataset, list[str]]:
    """Return the images to evaluate weights on, and leave out the images that the weights were trained on.

    If the data have a part for evaluation, such as ``val/`` or the test files of IDX, all images of that part are
    returned. From class folders, the images of a training are left out if its fingerprint shows that it used these
    folders. From ``digits``, the images of each training are left out, whatever its fingerprint is.

    Args:
        data: As for ``open_data``; ``val/`` needs no ``train/`` beside it.
        trainings: One for each of the weights that are evaluated together.

    Returns:
        The images, and messages for the user about which images they are. If a single network is evaluated and was
        trained on all of the images, all of them are returned, with a warning.

    Raises:
        DataError: For the same reasons as ``open_data``, and if several networks are evaluated that were together
            trained on all of the images.
    """
    kind, unused_note = "images", ""
    if data == "digits":
        dataset = read_digits()
    elif has_idx_files(data):
        dataset, trainings, kind = read_idx_files(data)[1], (), "test images"
    elif parts := find_parts(data):
        if parts.held_out is None:
            raise DataError(
                f"{data} has {parts.train}/, but no val/ or test/ to evaluate: add one, or give "
                f"{os.path.join(data, parts.train or '')} to evaluate that"
            )
        dataset, trainings, unused_note = read_class_folders(parts.path(parts.held_out)), (), parts.unused_note
    else:
        dataset = read_class_folders(data)
    images = f"{kind} of {dataset.folder or data}"
    seen, notes = np.zeros(len(dataset), bool), []
    for training in trainings:
        used = _used_in(training, dataset, is_certain=data == "digits")
        if training.trained_on is not None and not used.any():
            notes.append(
                f"warning: {training.weights} was trained on other images, or {images} were added or removed since "
                "then: it may have been trained on some of them"
            )
        seen |= np.any([used, *(_used_in(earlier, dataset) for earlier in training.before)], axis=0)
    total = f"{len(dataset)} {images}"
    if not seen.any():
        notes.append(f"all {total} are evaluated{unused_note}")
    elif not seen.all():
        dataset = dataset.select(np.flatnonzero(~seen))
        notes.append(f"{len(dataset)} of the {total} are evaluated: the weights were trained on the others")
    elif len(trainings) == 1:
        notes = [
            f"warning: all {total} have the names of images that {trainings[0].weights} was trained on: if they are "
            "the same images, the figures say nothing about new ones"
        ]
    else:
        raise DataError(
            f"each of the {total} has the name of an image that one of the networks was trained on, so none is left to "
            "evaluate them on together: evaluate each network alone, or train them with the same seed and held_out"
        )
    return dataset, notes


def _hold_out(
    dataset: Dataset, data: str, fraction: float, seed: int, earlier: Sequence[Training]
) -> tuple[Dataset, Dataset]:
    """Return the images to train on, and the held-out images; ``data`` is the name of the dataset in messages."""
    if not 0 < fraction < 1:
        raise DataError(f"the share of {data} to hold out must be between 0 and 1, not {fraction}")
    held_out = _choose_held_out(dataset, fraction, seed)
    if not held_out.any():
        raise DataError(f"{data}: no class has a second image to hold out for evaluation")
    warnings = [
        f"warning: {training.weights} was trained on {count} of the {held_out.sum()} images of {data} that are held "
        "out now, so their accuracy will look better than that of new images: set seed to "
        f"{training.seed} and held_out to {training.held_out} to hold out the same images as before"
        for training in earlier
        if (count := np.sum(held_out & _used_in(training, dataset)))
    ]
    train = replace(dataset.select(np.flatnonzero(~held_out)), notes=(*dataset.notes, *warnings))
    return train, dataset.select(np.flatnonzero(held_out))


def _choose_held_out(dataset: Dataset, fraction: float, seed: int) -> Bool[np.ndarray, "n"]:
    """Return which images to hold out: the given fraction of each class, as ``open_data`` describes."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(dataset), bool)
    for label in range(len(dataset.class_names)):
        members = rng.permutation(np.flatnonzero(dataset.labels == label))
        held_out[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return held_out


def _used_in(training: Training, dataset: Dataset, *, is_certain: bool = False) -> Bool[np.ndarray, "n"]:
    """Return which images of a dataset, before any are held out, a training used: none if it was on other images.

    With ``is_certain``, the training is known to have been on this dataset, whatever its fingerprint is.
    """
    if dataset.fingerprint == training.trained_on:
        return np.ones(len(dataset), bool)
    used = ~_choose_held_out(dataset, training.held_out, training.seed)
    if is_certain or dataset.select(np.flatnonzero(used)).fingerprint == training.trained_on:
        return used
    return np.zeros(len(dataset), bool)
