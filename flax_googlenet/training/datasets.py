"""Images with labels: a folder of class folders, IDX files, or scikit-learn's digits.

A ``Dataset`` is names and labels; pixels are decoded when they are asked for.
"""

import gzip
import hashlib
import math
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image

from flax_googlenet.errors import GoogLeNetError, listing
from flax_googlenet.images.files import describe_unreadable, display_name, find_images, is_hidden, is_picture
from flax_googlenet.images.preprocessing import rgb
from flax_googlenet.training.history import Training

EXPECTED = (
    "expected a folder of train/ and val/, each of them a folder of class folders; or one of class folders, at least "
    "two (cats/1.jpg, dogs/1.jpg, ...); or one of IDX files (train-images-idx3-ubyte.gz and the three that belong to "
    "it); or digits, for scikit-learn's 1,797 images of handwritten digits"
)

# The words by which people name the parts of a data set, alone or set off by a sign, a number or a word for the whole:
# seg_train, train2017, trainingSet, TrainData.
_PART = re.compile(
    r"(?<![^\W_])(?:(?P<train>train|training)|(?P<val>val|valid|validation)|(?P<test>test|testing))(?:set)?"
    r"(?=(?:data|images?|imgs?)?(?:[\W\d_]|\Z))",
    re.IGNORECASE,
)

_IDX_NAMES = ("{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz")


class DataError(GoogLeNetError, ValueError):
    """Data that cannot be trained on; the message names the folder or file and what was expected."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, in a fixed order."""

    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, "n"]
    """The place of each image's class in ``class_names``."""
    names: tuple[str, ...]
    """Paths below ``folder``, or what to call the images of an array: ``digits[17]``."""
    folder: str = ""
    pixels: UInt8[np.ndarray, "n h w"] | None = None
    """Grey values, 255 is white, where the images are no files."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the images were found: sentences."""
    unreadable: int = 0
    """How many pictures were left out, because they are in formats that cannot be read."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The path of an image, or what stands for one."""
        return os.path.join(self.folder, self.names[index])

    def read(self, index: int) -> Image.Image:
        """One image in RGB, upright, of its own size; raises ``flax_googlenet.ImageError``."""
        if self.pixels is None:
            return rgb(self.name(index))
        return Image.fromarray(self.pixels[index]).convert("RGB")

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the classes, names, labels, their order, and the pixels of an array.

        They stay where a folder is moved or copied. The files are not read: one changed in place goes unnoticed.
        """
        digest = hashlib.sha256()
        for text in (*map(str.encode, self.class_names), *map(os.fsencode, self.names)):
            digest.update(text + b"\0")
        digest.update(self.labels.astype("<i4").tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.tobytes())
        return digest.hexdigest()[:16]

    def select(self, indices: np.ndarray) -> "Dataset":
        """The images at ``indices``, of the same classes."""
        return replace(
            self,
            labels=self.labels[indices],
            names=tuple(self.names[i] for i in indices),
            pixels=None if self.pixels is None else self.pixels[indices],
        )


def open_data(data: str, *, held_out: float, seed: int, earlier: Sequence[Training] = ()) -> tuple[Dataset, Dataset]:
    """Finds the images to train on, and those to evaluate on.

    Args:
        data: a folder or ``digits``, as ``EXPECTED`` says; ``./digits`` is a folder of that name. Instead of train/ and
            val/ it may have Training/ and Testing/, seg_train/ and seg_test/, or the like, in any case; of train/, val/
            and test/ the last is left alone. Hidden files and folders do not count, nor do files that are not named as
            images. Folders whose names differ only in their Unicode form are one class.
        held_out: what fraction of each class to evaluate on, where the data does not say so itself. At least one image
            of a class is held out, and at least one is not; the only image of a class is not.
        seed: of the choice of these.
        earlier: the trainings of the weights that a run starts from. Where they used images that are held out now, a
            note of the images to train on warns of it.

    Raises:
        DataError: if the data is none of these, or two of its folders may be the same part; if a class is empty, or
            missing in one of the parts (the message lists all such); if an IDX file is missing or damaged; if nothing
            would be held out.
    """
    if data == "digits":
        return _hold_out(_digits(), data, held_out, seed, earlier)
    parts = _find_parts(data)
    if parts == "idx":
        return _idx_files(data)
    if parts == "classes":
        return _hold_out(_class_folders(data), data, held_out, seed, earlier)
    if parts.train is None:
        raise DataError(f"{data} has {parts.held_out}/ to evaluate on, and no train/ beside it to train on")
    whole = f"name {_part_folder(data, parts.train)} as the data, and a part of it is held out"
    if parts.held_out is None:
        raise DataError(
            f"{data} has {parts.train}/, and no val/ or test/ beside it to evaluate on: add one, or {whole}"
        )
    train = _class_folders(_part_folder(data, parts.train))
    held_folder = _part_folder(data, parts.held_out)
    if not _subfolders(held_folder):
        raise DataError(
            f"{held_folder} has no class folders, so nothing says what its images show: sort them into class folders, "
            f"or {whole}"
        )
    held = _class_folders(held_folder)
    if train.class_names != held.class_names:
        raise DataError(f"{data}: {_different_classes(parts.train, train, parts.held_out, held)}")
    notes: tuple[str, ...] = ()
    if (parts.train, parts.held_out) != ("train", "val") or parts.others:
        notes = (f"{data}: {parts.train}/ is trained on and {parts.held_out}/ held out" + parts.left_alone,)
    return replace(train, notes=notes + train.notes), held


def find_data(data: str, trainings: Sequence[Training]) -> tuple[Dataset, list[str]]:
    """Find the images to evaluate weights on, without those that any of the weights was trained on.

    Data with a part of its own for evaluation, such as ``val/`` or the test files of IDX, gives all images of that
    part. Class folders give all their images except those of each training whose fingerprint shows that it used these
    folders. ``digits`` gives its images except those of each training, whatever the fingerprint is.

    Args:
        data: as for ``open_data``; ``val/`` needs no ``train/`` beside it.
        trainings: one for each of the weights that are evaluated together.

    Returns:
        The images, and sentences for a person that say which images they are. If a single network is evaluated and
        was trained on all of the images, they are all returned, with a warning.

    Raises:
        DataError: as ``open_data``; if several networks are evaluated and were together trained on all of the images.
    """
    parts = "digits" if data == "digits" else _find_parts(data)
    left_alone = ""
    if isinstance(parts, Parts):
        if parts.held_out is None:
            raise DataError(
                f"{data} has {parts.train}/, and no val/ or test/ beside it to evaluate: add one, or name "
                f"{os.path.join(data, parts.train or '')} to evaluate that"
            )
        dataset, left_alone = _class_folders(_part_folder(data, parts.held_out)), parts.left_alone
    elif parts == "digits":
        dataset = _digits()
    elif parts == "idx":
        dataset = _idx_files(data)[1]
    else:
        dataset = _class_folders(data)
    images = f"{'test ' if parts == 'idx' else ''}images of {dataset.folder or data}"
    untouched, notes = np.ones(len(dataset), bool), []
    for training in trainings if parts in ("digits", "classes") else ():
        used = _used_in(training, dataset, is_certain=parts == "digits")
        if used is not None:
            untouched &= ~used
        elif training.trained_on is not None:
            notes.append(
                f"warning: {training.weights} was trained on other images, or {images} have come or gone since: it may "
                "have been trained on some of them"
            )
        for earlier in training.before:
            used = _used_in(earlier, dataset, is_certain=False)
            if used is not None:
                untouched &= ~used
    total = f"{len(dataset)} {images}"
    if untouched.all():
        notes.append(f"all {total} are evaluated{left_alone}")
    elif untouched.any():
        dataset = dataset.select(np.flatnonzero(untouched))
        notes.append(f"{len(dataset)} of the {total} are evaluated: the weights were trained on the others{left_alone}")
    elif len(trainings) == 1:
        notes = [
            f"warning: all {total} have the names of images that {trainings[0].weights} was trained on: if they are "
            "the same images, the figures say nothing about new ones"
        ]
    else:
        raise DataError(
            f"each of the {total} has the name of an image that one of the networks was trained on, so that none is "
            "left to evaluate them together: evaluate each network alone, or train them with the same --recipe.seed "
            "and --recipe.held-out"
        )
    return dataset, notes


def _used_in(training: Training, dataset: Dataset, *, is_certain: bool) -> Bool[np.ndarray, "n"] | None:
    """Return which images of the dataset were trained on, or None if the training was not on this dataset.

    Args:
        training: the training.
        dataset: the images, those held out included.
        is_certain: whether the training was on this dataset even if the fingerprint does not show it.
    """
    if dataset.fingerprint == training.trained_on:
        return np.ones(len(dataset), bool)
    used = ~_choose_held_out(dataset, training.held_out, training.seed)
    if is_certain or dataset.select(np.flatnonzero(used)).fingerprint == training.trained_on:
        return used
    return None


class Parts(NamedTuple):
    """The folders of a data set that comes in parts, by their names."""

    train: str | None
    held_out: str | None
    others: tuple[str, ...]
    """What lies beside these, as a message lists it: folders, and the number of images."""

    @property
    def left_alone(self) -> str:
        """The end of a sentence about the parts, which names what is left alone, if anything is."""
        return f"; left alone: {', '.join(self.others)}" if self.others else ""


def _find_parts(data: str) -> Parts | Literal["idx", "classes"]:
    """Find out which of the layouts in ``EXPECTED`` a folder has.

    Folders are parts if their names differ only in the word that says which part they are (seg_train, seg_test). A
    single folder whose name is that word alone is a part if it has folders in it; otherwise it may be a class.
    """
    if not os.path.isdir(data):
        raise DataError(f"{data}: no such folder; {EXPECTED}")
    if any(os.path.exists(os.path.join(data, name.format("train"))) for name in _IDX_NAMES):
        return "idx"
    folders, pictures = _contents(data)
    sets: dict[str, dict[str, list[str]]] = {}  # by what remains of the names without that word
    for name in folders:
        if match := _PART.search(name):
            rest = f"{name[: match.start()]}*{name[match.end() :]}".casefold()
            sets.setdefault(rest, {}).setdefault(str(match.lastgroup), []).append(name)
    sets = {
        rest: parts
        for rest, parts in sets.items()
        if len(parts) > 1
        or (rest == "*" and any(_subfolders(os.path.join(data, name)) for names in parts.values() for name in names))
    }
    if not sets:
        return "classes"
    candidates = [names for parts in sets.values() for names in parts.values()]
    if len(sets) > 1 or any(len(names) > 1 for names in candidates):
        ambiguous = [f"{name}/" for names in candidates for name in names]
        raise DataError(
            f"{data} has several folders that may be the same part: {', '.join(ambiguous)}; keep one for each part"
        )
    (parts,) = sets.values()
    train, val, test = (parts.get(part, [None])[0] for part in ("train", "val", "test"))
    others = [f"{name}/" for name in folders if name not in (train, val or test)]
    if pictures:
        others.append("1 image" if pictures == 1 else f"{pictures} images")
    return Parts(train, val or test, tuple(others))


def _part_folder(data: str, name: str) -> str:
    """Return the folder that holds a part's class folders; archives often nest it: seg_train/seg_train."""
    folder = os.path.join(data, name)
    inside = _subfolders(folder)
    return os.path.join(folder, *inside) if [x.casefold() for x in inside] == [name.casefold()] else folder


def _different_classes(train_name: str, train: Dataset, held_name: str, held: Dataset) -> str:
    """Say which classes the parts do not share, and which of them differ only in case."""
    only_train = sorted(set(train.class_names) - set(held.class_names))
    only_held = sorted(set(held.class_names) - set(train.class_names))
    differences = [
        f"only in {part}/: {', '.join(names)}"
        for part, names in ((train_name, only_train), (held_name, only_held))
        if names
    ]
    differences += [
        f"{first} and {second} differ only in case: rename one of them"
        for first in only_train
        for second in only_held
        if first.casefold() == second.casefold()
    ]
    return f"{train_name}/ and {held_name}/ must have the same classes; {'; '.join(differences)}"


def _hold_out(
    dataset: Dataset, data: str, fraction: float, seed: int, earlier: Sequence[Training]
) -> tuple[Dataset, Dataset]:
    """The images to train on, and those to evaluate on; ``data`` is for the messages."""
    if not 0 < fraction < 1:
        raise DataError(f"the fraction to hold out of {data} must be between 0 and 1, not {fraction}")
    held = _choose_held_out(dataset, fraction, seed)
    if not held.any():
        raise DataError(f"{data}: no class has a second image to hold out for evaluation")
    train, notes = dataset.select(np.flatnonzero(~held)), list(dataset.notes)
    for training in earlier:
        used = _used_in(training, dataset, is_certain=False)
        if used is not None and (used & held).any():
            notes.append(
                f"warning: {training.weights} was trained on {np.sum(used & held)} of the {held.sum()} images of "
                f"{data} that are held out now, whose accuracy will look better than that of new images: choose "
                f"--recipe.seed {training.seed} and --recipe.held-out {training.held_out}, by which the same images "
                "are held out"
            )
    return replace(train, notes=tuple(notes)), dataset.select(np.flatnonzero(held))


def _choose_held_out(dataset: Dataset, fraction: float, seed: int) -> Bool[np.ndarray, "n"]:
    """Choose which images to hold out, as ``open_data`` says."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(dataset), bool)
    for label in range(len(dataset.class_names)):
        members = rng.permutation(np.flatnonzero(dataset.labels == label))
        held[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return held


def _subfolders(folder: str) -> list[str]:
    return _contents(folder)[0]


def _contents(folder: str) -> tuple[list[str], int]:
    """Return the sorted names of the folders in a folder, and the number of pictures beside them; no hidden ones."""
    try:
        with os.scandir(folder) as entries:
            names = [(entry.is_dir(), entry.name) for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    pictures = sum(is_picture(name) for is_folder, name in names if not is_folder)
    return sorted(name for is_folder, name in names if is_folder), pictures


def _class_folders(folder: str) -> Dataset:
    """All images of the class folders in one folder; raises a DataError as ``open_data`` does."""
    folders: dict[str, list[str]] = {}  # by class name: macOS may write é as two characters, and other systems as one
    names, outside = _contents(folder)
    for name in names:
        folders.setdefault(unicodedata.normalize("NFC", name), []).append(os.path.join(folder, name))
    if len(folders) < 2:
        count = "1 class folder" if folders else "no class folders"
        raise DataError(f"{folder} has {count}{_did_you_mean(folder) or f'; {EXPECTED}'}")
    class_names = sorted(folders)
    problems, unreadable = list[str](), Counter[str]()
    paths = [list(find_images(folders[name], problems.append, unreadable)) for name in class_names]
    if problems:
        raise DataError("each class needs images that can be read:\n  " + "\n  ".join(problems))
    notes = [f"warning: {describe_unreadable(unreadable)}"] if unreadable else []
    if outside:
        many = "1 image lies" if outside == 1 else f"{outside} images lie"
        notes.append(f"warning: {many} in {folder} outside of its class folders, not used")
    return Dataset(
        class_names=tuple(map(display_name, class_names)),
        labels=np.repeat(np.arange(len(paths), dtype=np.int32), [len(of_one) for of_one in paths]),
        names=tuple(os.path.relpath(path, folder) for of_one in paths for path in of_one),
        folder=folder,
        notes=tuple(notes),
        unreadable=unreadable.total(),
    )


def _did_you_mean(folder: str) -> str:
    """Return the end of a message that guesses which folder was meant: the first below that has several folders."""
    inner, names = folder, _subfolders(folder)
    for _ in range(3):
        if len(names) == 1:
            inner = os.path.join(inner, *names)
            names = _subfolders(inner)
    if len(names) < 2:
        return ""
    return f": did you mean {inner}, which has {listing(names)}?"


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # takes a second, in each worker process too

    digits = load_digits()
    return Dataset(
        class_names=tuple(map(str, range(10))),
        labels=digits.target.astype(np.int32),
        names=tuple(f"digits[{i}]" for i in range(len(digits.target))),
        pixels=np.rint(digits.images * (255 / 16)).astype(np.uint8),
    )


def _idx_files(folder: str) -> tuple[Dataset, Dataset]:
    train, held = _idx_part(folder, "train"), _idx_part(folder, "t10k")
    if held.labels.max() > train.labels.max():
        raise DataError(
            f"{folder}: the labels for training go up to {train.labels.max()}, the others to {held.labels.max()}"
        )
    class_names = tuple(str(label) for label in range(train.labels.max() + 1))
    return replace(train, class_names=class_names), replace(held, class_names=class_names)


def _idx_part(folder: str, part: str) -> Dataset:
    images, labels = (os.path.join(folder, name.format(part)) for name in _IDX_NAMES)
    pixels, targets = _read_idx(images, 3), _read_idx(labels, 1)
    if len(pixels) != len(targets):
        raise DataError(f"{images} has {len(pixels)} images, and {labels} has {len(targets)} labels: they are no pair")
    if pixels.size == 0:
        raise DataError(f"{images} has no pixels: its shape is {list(pixels.shape)}")
    name = os.path.basename(images).removesuffix(".gz")
    names = tuple(f"{name}[{i}]" for i in range(len(targets)))
    return Dataset((), targets.astype(np.int32), names, folder, pixels)


def _read_idx(path: str, ndim: int) -> UInt8[np.ndarray, "..."]:
    """Two zero bytes, 8 for uint8, the number of dimensions, each one's length as big-endian uint32, the values."""
    try:
        with gzip.open(path) as file:
            contents = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is missing or damaged ({error}): all four IDX files are needed") from error
    start = 4 + 4 * ndim
    if contents[:4] != bytes([0, 0, 8, ndim]) or len(contents) < start:
        raise DataError(f"{path} is no IDX file of bytes in {ndim} dimensions: it begins with {contents[:4].hex(' ')}")
    shape = np.frombuffer(contents[4:start], ">u4").tolist()
    if len(contents) - start != math.prod(shape):
        raise DataError(f"{path} should have {math.prod(shape)} values, for {shape}, and has {len(contents) - start}")
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)
