"""Finds the parts of a data set, such as train/ and val/, by their usual names, and reads images in class folders."""

import itertools
import os
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np

from flax_googlenet.errors import listing
from flax_googlenet.images.files import describe_unreadable, display_name, find_images, is_hidden, is_picture
from flax_googlenet.training.datasets import DataError, Dataset

EXPECTED = (
    "expected a folder with train/ and val/, each with one folder per class; or a folder with one folder per class, at "
    "least two (cats/1.jpg, dogs/1.jpg, ...); or a folder of IDX files (train-images-idx3-ubyte.gz and the three that "
    "go with it); or digits, which stands for scikit-learn's 1,797 images of handwritten digits"
)

# Words by which people name the parts of a data set, alone or set off by punctuation, a number or a word such as data:
# seg_train, train2017, trainingSet, TrainData.
_PART_WORD = re.compile(
    r"(?<![^\W_])(?:(?P<train>train|training)|(?P<val>val|valid|validation)|(?P<test>test|testing))(?:set)?"
    r"(?=(?:data|images?|imgs?)?(?:[\W\d_]|\Z))",
    re.IGNORECASE,
)


class Parts(NamedTuple):
    """The parts of a data set, which are folders in one folder."""

    folder: str
    """Folder of the data set."""
    train: str | None
    """Name of the folder with the images to train on."""
    held_out: str | None
    """Name of the folder with the images to evaluate on."""
    unused: tuple[str, ...]
    """Names of the other folders, and the number of images beside them, as a message lists both."""

    def path(self, name: str) -> str:
        """Return the folder that holds a part's class folders; archives often nest it: seg_train/seg_train."""
        folder = os.path.join(self.folder, name)
        inside = subfolders(folder)
        return os.path.join(folder, *inside) if [x.casefold() for x in inside] == [name.casefold()] else folder

    @property
    def unused_note(self) -> str:
        """End of a message that lists what is not used, or an empty string."""
        return f"; not used: {', '.join(self.unused)}" if self.unused else ""


def find_parts(data: str) -> Parts | None:
    """Return the parts of a data set, or None if the folder has class folders.

    Folders are parts if their names differ only in the word for the part (seg_train, seg_test). A single folder is a
    part if its name is nothing but such a word and if it has folders in it. Otherwise it may be a class.

    Raises:
        DataError: If the folder is missing, or if several of its folders may be the same part.
    """
    if not os.path.isdir(data):
        raise DataError(f"{data}: no such folder; {EXPECTED}")
    folders, pictures = _contents(data)
    groups: dict[str, dict[str, list[str]]] = {}  # {name without the part's word: {"train": [name, ...], ...}}
    for name in folders:
        if match := _PART_WORD.search(name):
            rest = f"{name[: match.start()]}*{name[match.end() :]}".casefold()
            groups.setdefault(rest, {}).setdefault(str(match.lastgroup), []).append(name)

    groups = {
        rest: group
        for rest, group in groups.items()
        if len(group) > 1
        or (rest == "*" and any(subfolders(os.path.join(data, name)) for names in group.values() for name in names))
    }
    if not groups:
        return None
    candidates = [names for group in groups.values() for names in group.values()]
    if len(groups) > 1 or any(len(names) > 1 for names in candidates):
        ambiguous = ", ".join(f"{name}/" for names in candidates for name in names)
        raise DataError(f"{data} has several folders that may be the same part: {ambiguous}; keep one for each part")
    (group,) = groups.values()
    train, val, test = (group.get(part, [None])[0] for part in ("train", "val", "test"))
    unused = [f"{name}/" for name in folders if name not in (train, val or test)]
    if pictures:
        unused.append("1 image" if pictures == 1 else f"{pictures} images")
    return Parts(data, train, val or test, tuple(unused))


def read_parts(parts: Parts) -> tuple[Dataset, Dataset]:
    """Return the images to train on, and the images to evaluate on.

    Raises:
        DataError: If a part is missing or has no class folders, if the parts have different classes, and for the same
            reasons as ``read_class_folders``.
    """
    data, train_name, held_out_name = parts.folder, parts.train, parts.held_out
    if train_name is None:
        raise DataError(f"{data} has {held_out_name}/ to evaluate on, but no train/ to train on: add one")
    train_folder = parts.path(train_name)
    way_out = f"give {train_folder} as the data to hold out some of its images"
    if held_out_name is None:
        raise DataError(f"{data} has {train_name}/, but no val/ or test/ to evaluate on: add one, or {way_out}")
    train = read_class_folders(train_folder)
    held_out_folder = parts.path(held_out_name)
    if not subfolders(held_out_folder):
        raise DataError(
            f"{held_out_folder} has no class folders, so the classes of its images are unknown: sort them into class "
            f"folders, or {way_out}"
        )
    held_out = read_class_folders(held_out_folder)
    only_train = sorted(set(train.class_names) - set(held_out.class_names))
    only_held_out = sorted(set(held_out.class_names) - set(train.class_names))
    sides = ((train_name, only_train), (held_out_name, only_held_out))
    differences = [f"only in {name}/: {', '.join(classes)}" for name, classes in sides if classes]
    differences += [
        f"{first} and {second} differ only in case: rename one of them"
        for first, second in itertools.product(only_train, only_held_out)
        if first.casefold() == second.casefold()
    ]
    if differences:
        names = f"{train_name}/ and {held_out_name}/"
        raise DataError(f"{data}: {names} must have the same classes; {'; '.join(differences)}")
    return train, held_out


def read_class_folders(folder: str) -> Dataset:
    """Return all images of the class folders in one folder.

    Hidden files and folders are left out, and so are files whose names do not end like those of images. Folders whose
    names differ only in their Unicode form are one class.

    Raises:
        DataError: If there are fewer than two class folders, or if a class has no images; the message lists all such
            classes.
    """
    folders: dict[str, list[str]] = {}  # by class name: macOS may write é as two characters, other systems as one
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
        count, lie = ("1 image is", "it lies") if outside == 1 else (f"{outside} images are", "they lie")
        notes.append(f"warning: {count} not used, as {lie} in {folder} outside its class folders")
    return Dataset(
        class_names=tuple(map(display_name, class_names)),
        labels=np.repeat(np.arange(len(paths), dtype=np.int32), list(map(len, paths))),
        names=tuple(os.path.relpath(path, folder) for paths_of_class in paths for path in paths_of_class),
        folder=folder,
        notes=tuple(notes),
        unreadable=unreadable.total(),
    )


def _did_you_mean(folder: str) -> str:
    """Return the end of a message that suggests the first folder below this one that has several folders in it."""
    inner, names = folder, subfolders(folder)
    for _ in range(3):
        if len(names) == 1:
            inner = os.path.join(inner, *names)
            names = subfolders(inner)
    return f": did you mean {inner}, which has {listing(names)}?" if len(names) > 1 else ""


def subfolders(folder: str) -> list[str]:
    """Return the sorted names of the folders in a folder, except hidden ones."""
    return _contents(folder)[0]


def _contents(folder: str) -> tuple[list[str], int]:
    """Return the sorted names of the folders in a folder and the number of pictures beside them, except hidden ones."""
    try:
        with os.scandir(folder) as entries:
            names = [(entry.is_dir(), entry.name) for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    pictures = sum(is_picture(name) for is_folder, name in names if not is_folder)
    return sorted(name for is_folder, name in names if is_folder), pictures
