"""Class folders are split class by class, and by the seed alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_googlenet.training.datasets import DataError
from flax_googlenet.training.splits import open_data


def write_classes(folder: Path, **counts: int) -> None:
    for name, count in counts.items():
        (folder / name).mkdir()
        for i in range(count):
            Image.new("RGB", (4, 3)).save(folder / name / f"{i:02}.png")


def test_class_folders_are_split_by_class(tmp_path: Path) -> None:
    write_classes(tmp_path, cats=20, dogs=10)
    train, held_out = open_data(str(tmp_path), held_out=0.2, seed=0)
    assert train.class_names == held_out.class_names == ("cats", "dogs")
    assert np.bincount(train.labels).tolist() == [16, 8]
    assert np.bincount(held_out.labels).tolist() == [4, 2]
    paths = [Path(dataset.name(i)) for dataset in (train, held_out) for i in range(len(dataset))]
    assert sorted(paths) == sorted(tmp_path.glob("*/*"))
    for dataset in (train, held_out):
        assert dataset.labels.dtype == np.int32
        assert [Path(name).parent.name for name in dataset.names] == [dataset.class_names[i] for i in dataset.labels]


def test_the_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write_classes(tmp_path, cats=20, dogs=10)
    first, again, other = (open_data(str(tmp_path), held_out=0.5, seed=seed) for seed in (0, 0, 1))
    assert [part.names for part in first] == [part.names for part in again]
    assert first[1].names != other[1].names


def test_a_small_class_gives_one_image_and_keeps_one(tmp_path: Path) -> None:
    write_classes(tmp_path, one=1, three=3, two=2)
    train, held_out = open_data(str(tmp_path), held_out=0.01, seed=0)
    assert np.bincount(train.labels).tolist() == [1, 2, 1]
    assert np.bincount(held_out.labels).tolist() == [0, 1, 1]
    train, held_out = open_data(str(tmp_path), held_out=0.99, seed=0)
    assert np.bincount(train.labels).tolist() == [1, 1, 1]
    assert np.bincount(held_out.labels).tolist() == [0, 2, 1]


@pytest.mark.parametrize(("held_out", "message"), [(0.2, "no class has a second image"), (0, "between 0 and 1, not 0")])
def test_a_split_that_would_hold_out_nothing_is_refused(tmp_path: Path, held_out: float, message: str) -> None:
    write_classes(tmp_path, cats=1, dogs=1)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path), held_out=held_out, seed=0)
