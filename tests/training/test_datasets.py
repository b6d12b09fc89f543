"""IDX files and digits give the pixels that they hold; a fingerprint stays with its data and changes with it."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flax_googlenet import ImageError, preprocess
from flax_googlenet.images.preprocessing import normalise
from flax_googlenet.training.class_folders import read_class_folders
from flax_googlenet.training.datasets import DataError, read_idx_files
from flax_googlenet.training.splits import open_data

IDX = {
    "train-images-idx3-ubyte.gz": np.arange(6 * 2 * 3, dtype=np.uint8).reshape(6, 2, 3),
    "train-labels-idx1-ubyte.gz": np.array([0, 1, 2, 0, 1, 2], np.uint8),
    "t10k-images-idx3-ubyte.gz": np.arange(2 * 2 * 3, dtype=np.uint8)[::-1].reshape(2, 2, 3),
    "t10k-labels-idx1-ubyte.gz": np.array([1, 0], np.uint8),
}


def write_idx(path: Path, array: np.ndarray, magic: bytes = b"") -> None:
    """Write an array in the format that http://yann.lecun.com/exdb/mnist describes."""
    header = (magic or bytes([0, 0, 8, array.ndim])) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    for name, array in IDX.items():
        write_idx(tmp_path / name, array)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images in each of two class folders."""
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (4, 3)).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_data(str(folder), held_out=0.2, seed=0)
    return str(caught.value)


def test_digits_are_scikit_learns() -> None:
    train, held_out = open_data("digits", held_out=0.2, seed=0)
    assert len(train) + len(held_out) == 1797
    assert train.class_names == tuple("0123456789")
    assert np.bincount(held_out.labels).min() > 30
    assert train.name(0).startswith("digits[")
    digits = load_digits()
    for i in range(10):
        index = int(train.name(i).removeprefix("digits[").removesuffix("]"))
        assert train.labels[i] == digits.target[index]
        grey = np.rint(digits.images[index] / 16 * 255)
        np.testing.assert_array_equal(np.asarray(train.read(i)), np.stack([grey] * 3, -1))


def test_idx_files_are_read_as_they_were_written(idx: Path) -> None:
    train, test = open_data(str(idx), held_out=0.5, seed=0)
    assert train.class_names == test.class_names == ("0", "1", "2")
    for dataset, part in ((train, "train"), (test, "t10k")):
        pixels, labels = IDX[f"{part}-images-idx3-ubyte.gz"], IDX[f"{part}-labels-idx1-ubyte.gz"]
        np.testing.assert_array_equal(dataset.labels, labels)
        for i, array in enumerate(pixels):
            np.testing.assert_array_equal(np.asarray(dataset.read(i)), np.stack([array] * 3, axis=-1))
    assert train.name(5) == f"{idx}/train-images-idx3-ubyte[5]"


def test_the_centre_crop_of_an_idx_image_is_the_whole_original(idx: Path) -> None:
    originals = np.random.default_rng(0).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    write_idx(idx / "t10k-images-idx3-ubyte.gz", originals)
    test = read_idx_files(str(idx))[1]
    for i, original in enumerate(originals):
        expected = normalise(Image.fromarray(original).convert("RGB"))
        np.testing.assert_array_equal(preprocess(test.read(i), size=28), expected)


@pytest.mark.parametrize("name", IDX)
def test_an_idx_file_that_is_missing_or_damaged_is_named(idx: Path, name: str) -> None:
    path, array = idx / name, IDX[name]
    intact = path.read_bytes()
    contents = gzip.decompress(intact)
    damaged = {
        "nothing": b"",
        "not compressed": contents,
        "cut off": intact[:-9],
        "a flipped bit": intact[:12] + bytes([intact[12] ^ 1]) + intact[13:],
        "a header that is cut off": gzip.compress(contents[:6]),
        "one value too few": gzip.compress(contents[:-1]),
        "one value too many": gzip.compress(contents + b"x"),
        "an absurd shape": gzip.compress(contents[:4] + b"\xff" * 4 * array.ndim + array.tobytes()),
        "text": gzip.compress(b"<html>404 Not Found</html>"),
    }
    for damage, data in damaged.items():
        path.write_bytes(data)
        assert str(path) in refusal(idx), damage
    write_idx(path, array, magic=bytes([0, 0, 13, array.ndim]))  # floats
    assert str(path) in refusal(idx)
    path.unlink()
    assert str(path) in refusal(idx)


def test_idx_files_that_do_not_belong_together_are_refused(idx: Path) -> None:
    write_idx(idx / "t10k-labels-idx1-ubyte.gz", np.array([1, 0, 1], np.uint8))
    assert "2 images" in (message := refusal(idx))
    assert "3 labels" in message
    write_idx(idx / "t10k-labels-idx1-ubyte.gz", np.array([1, 3], np.uint8))
    assert "go up to 3, but the training labels only to 2" in refusal(idx)
    write_idx(idx / "t10k-images-idx3-ubyte.gz", np.zeros((0, 2, 3), np.uint8))
    write_idx(idx / "t10k-labels-idx1-ubyte.gz", np.zeros(0, np.uint8))
    assert "has no pixels" in refusal(idx)


def test_the_fingerprint_of_a_folder_stays_with_its_files_and_changes_with_their_names(folder: Path) -> None:
    first = read_class_folders(str(folder)).fingerprint
    assert len(first) == 16
    moved = folder.rename(folder.with_name("moved"))
    assert read_class_folders(str(moved)).fingerprint == first
    (moved / "cats" / "another.png").touch()
    assert read_class_folders(str(moved)).fingerprint != first
    (moved / "cats" / "another.png").unlink()
    assert read_class_folders(str(moved)).fingerprint == first
    (moved / "cats").rename(moved / "kittens")
    assert read_class_folders(str(moved)).fingerprint != first


def test_the_fingerprint_of_idx_files_changes_with_their_pixels(idx: Path) -> None:
    before = read_idx_files(str(idx))[0].fingerprint
    write_idx(idx / "train-images-idx3-ubyte.gz", IDX["train-images-idx3-ubyte.gz"] + np.uint8(1))
    assert read_idx_files(str(idx))[0].fingerprint != before


def test_an_image_that_cannot_be_read_is_an_error_by_name(folder: Path) -> None:
    dataset = read_class_folders(str(folder))
    Path(dataset.name(0)).write_text("text")
    with pytest.raises(ImageError, match=dataset.name(0)):
        dataset.read(0)
    assert dataset.read(1).mode == "RGB"
