"""Augmentation follows the paper and has torchvision's distribution and pixels."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from flax_googlenet import preprocess
from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD
from flax_googlenet.images.preprocessing import Reduction, rgb
from flax_googlenet.training.augment import augment, distort, random_crop
from flax_googlenet.training.recipe import Recipe

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
PLAIN = Recipe(image_size=64, flip=False, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
"""A recipe that leaves a square image of 64 x 64 pixels unchanged."""


def colours(array: np.ndarray) -> np.ndarray:
    """Return the uint8 [h, w, 3] that ``array`` was made from."""
    return np.rint((array * IMAGENET_STD + IMAGENET_MEAN) * 255).astype(np.uint8)


def augmented(image: Image.Image, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Return the augmented pixels of an image that is decoded, uint8 [size, size, 3]."""
    return np.asarray(augment(lambda reduction: image, recipe, rng))


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """A photograph of 640 x 427 pixels."""
    return Image.fromarray(reference.photographs()[0])


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (300, 300), (32, 32)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    width, height = size
    rng = np.random.default_rng(0)
    ours = np.array([random_crop(width, height, AREA, ASPECT, rng) for _ in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(AREA), list(ASPECT)) for _ in range(4000)])
    top, left, h, w = theirs.T
    for mine, other in zip(ours.T, (left, top, left + w, top + h), strict=True):
        assert ks_2samp(mine, other).pvalue > 0.01
    shape = ours[:, 2:] - ours[:, :2]
    assert ks_2samp(shape.prod(1), h * w).pvalue > 0.01
    assert ks_2samp(shape[:, 0] / shape[:, 1], w / h).pvalue > 0.01


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 5), (1, 20000), (20000, 1), (7, 1500), (640, 427)])
def test_a_crop_lies_in_an_image_of_any_size(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = random_crop(*size, AREA, ASPECT, rng)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize(("size", "box"), [((30, 1000), (0, 480, 30, 520)), ((1000, 30), (480, 0, 520, 30))])
def test_a_crop_that_does_not_fit_becomes_the_largest_one_in_the_middle(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    # A crop of at least 8 percent of these images needs a side of at least 42 pixels.
    assert random_crop(*size, AREA, ASPECT, np.random.default_rng(0)) == box


def test_a_crop_has_torchvisions_pixels(photograph: Image.Image) -> None:
    recipe = Recipe(image_size=64, flip=False)
    for seed in range(10):
        left, top, right, bottom = random_crop(640, 427, AREA, ASPECT, np.random.default_rng(seed))
        expected = resized_crop(photograph, top, left, bottom - top, right - left, [64, 64])
        ours = augmented(photograph, recipe, np.random.default_rng(seed))
        assert (ours.shape, ours.dtype) == ((64, 64, 3), np.uint8)
        np.testing.assert_array_equal(ours, np.asarray(expected))


def test_the_same_seed_gives_the_same_pixels_and_another_seed_other_pixels(photograph: Image.Image) -> None:
    recipe = Recipe(image_size=32, interpolation="random", distortion=True)
    first, second = ([augmented(photograph, recipe, np.random.default_rng(s)) for s in range(10)] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len({array.tobytes() for array in first}) == 10


def test_half_of_the_crops_are_mirrored_unless_the_recipe_turns_it_off() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    rng = np.random.default_rng(0)
    upright, mirrored = np.asarray(image).tobytes(), np.asarray(image)[:, ::-1].tobytes()
    counts = Counter(augmented(image, replace(PLAIN, flip=True), rng).tobytes() for _ in range(1000))
    assert counts.keys() == {upright, mirrored}
    assert abs(counts[mirrored] - 500) < 64  # four standard deviations
    assert {augmented(image, PLAIN, rng).tobytes() for _ in range(20)} == {upright}


def test_random_interpolation_chooses_among_the_papers_four_methods_equally_often(photograph: Image.Image) -> None:
    image = photograph.crop((0, 0, 100, 100))
    names = {np.asarray(image.resize((64, 64), method)).tobytes(): method for method in Image.Resampling}
    rng = np.random.default_rng(0)
    recipe = replace(PLAIN, interpolation="random")
    counts = Counter(names[augmented(image, recipe, rng).tobytes()] for _ in range(1000))
    kinds = Image.Resampling
    assert counts.keys() == {kinds.BILINEAR, kinds.BOX, kinds.NEAREST, kinds.BICUBIC}
    assert max(abs(count - 250) for count in counts.values()) < 55  # four standard deviations
    assert names[augmented(image, PLAIN, rng).tobytes()] == kinds.BILINEAR


def test_distortion_changes_brightness_contrast_and_colour_by_half_at_most(photograph: Image.Image) -> None:
    rng = np.random.default_rng(0)
    # A grey image has neither contrast nor colour, so only its brightness changes, uniformly between 0.5 and 1.5.
    grey = Image.new("RGB", (2, 2), (100, 100, 100))
    factors = [np.asarray(distort(grey, rng)).mean() / 100 for _ in range(1000)]
    assert kstest(factors, "uniform", args=(0.5, 1)).pvalue > 0.01
    # A photograph changes in contrast and saturation as well, relative to its brightness.
    small = photograph.resize((64, 64))
    changed = [np.asarray(distort(small, rng), float) for _ in range(200)]
    contrasts = [array.mean(2).std() / array.mean() for array in changed]
    saturations = [np.ptp(array, axis=2).mean() / array.mean() for array in changed]
    assert max(contrasts) > 2 * min(contrasts)
    assert max(saturations) > 2 * min(saturations)


def test_a_recipe_without_distortion_leaves_the_colours(photograph: Image.Image) -> None:
    image = photograph.crop((0, 0, 64, 64))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(augmented(image, PLAIN, rng), np.asarray(image))
    assert (augmented(image, replace(PLAIN, distortion=True), rng) != np.asarray(image)).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (2, 777)])
def test_an_image_of_any_size_is_augmented_and_evaluated(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    rng = np.random.default_rng(0)
    recipe = Recipe(image_size=64, interpolation="random")
    evaluated = [colours(preprocess(image, 64)), colours(preprocess(image))]
    for result in (*(augmented(image, recipe, rng) for _ in range(8)), *evaluated):
        np.testing.assert_array_equal(result, np.broadcast_to((10, 20, 30), result.shape))


@pytest.fixture
def file(photograph: Image.Image, tmp_path: Path) -> Path:
    """A JPEG file of 1283 x 859 pixels, which 2, 4 and 8 do not divide."""
    photograph.resize((1283, 859)).save(tmp_path / "photograph.jpg", quality=92)
    return tmp_path / "photograph.jpg"


@pytest.mark.parametrize(
    ("size", "decoded"),
    [(107, (161, 108)), (108, (321, 215)), (214, (321, 215)), (215, (642, 430)), (429, (642, 430)), (430, (1283, 859))],
)
def test_a_jpeg_file_is_decoded_in_the_smallest_size_that_has_the_pixels_of_the_crop(
    size: int, decoded: tuple[int, int], file: Path
) -> None:
    sizes = []

    def read(reduction: Reduction) -> Image.Image:
        sizes.append(rgb(file, reduction).size)
        return rgb(file, reduction)

    whole = replace(PLAIN, image_size=size, crop_aspect=(1283 / 859, 1283 / 859))
    assert augment(read, whole, np.random.default_rng(0)).size == (size, size)
    assert sizes == [decoded]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_of_a_file_that_is_decoded_in_a_smaller_size_shows_the_same(
    orientation: int, photograph: Image.Image, tmp_path: Path
) -> None:
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[274] = orientation
    photograph.resize((1280, 856)).save(path, quality=92, exif=exif)
    recipe = Recipe(image_size=64)
    for seed in range(10):
        ours = np.asarray(augment(partial(rgb, path), recipe, np.random.default_rng(seed)))
        expected = augmented(rgb(path), recipe, np.random.default_rng(seed))
        mean_difference = abs(ours.astype(int) - expected).mean()
        assert 0 < mean_difference < 4  # of 255; measured at most 2.8


@pytest.mark.parametrize(
    ("size", "orientation", "decoded"),
    [
        ((804, 602), 1, (101, 76)),
        ((804, 602), 3, (402, 301)),
        ((804, 602), 6, (301, 402)),
        ((800, 600), 6, (75, 100)),
        ((801, 601), 8, (601, 801)),
    ],
)
def test_a_file_that_is_turned_is_decoded_in_a_size_of_whole_pixels(
    size: tuple[int, int], orientation: int, decoded: tuple[int, int], photograph: Image.Image, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    photograph.resize(size).save(tmp_path / "turned.jpg", exif=exif)
    upright = size if orientation in (1, 3) else size[::-1]

    def reduction(width: int, height: int) -> int:
        assert (width, height) == upright
        return 8

    assert rgb(tmp_path / "turned.jpg", reduction).size == decoded


def test_a_crop_without_twice_the_pixels_of_the_result_stays_equal(file: Path) -> None:
    recipe = Recipe(image_size=430)
    for seed in range(5):
        ours = augment(partial(rgb, file), recipe, np.random.default_rng(seed))
        np.testing.assert_array_equal(ours, augmented(rgb(file), recipe, np.random.default_rng(seed)))


def test_only_jpeg_files_are_decoded_in_a_smaller_size(photograph: Image.Image, tmp_path: Path) -> None:
    for name, size in (("a.png", (640, 427)), ("a.webp", (640, 427)), ("a.jpg", (80, 54)), ("a.mpo", (80, 54))):
        photograph.save(tmp_path / name)
        assert rgb(tmp_path / name, lambda width, height: 8).size == size
    assert rgb(Image.open(tmp_path / "a.jpg"), lambda width, height: 8).size == (640, 427)  # not the caller's image


def test_a_lossless_jpeg_file_is_decoded_in_its_own_size(tmp_path: Path) -> None:
    """Its pixels are stored as differences, here as 256 x 256 times a zero, for which the only code has one bit."""
    frame = bytes.fromhex("ffc3 000b 08 0100 0100 01 01 11 00")
    code = bytes.fromhex("ffc4 0014 00 01") + bytes(15) + bytes.fromhex("00")
    scan = bytes.fromhex("ffda 0008 01 01 00 01 00 00") + bytes(256 * 256 // 8)
    (tmp_path / "lossless.jpg").write_bytes(b"\xff\xd8" + frame + code + scan + b"\xff\xd9")
    crop = augment(partial(rgb, tmp_path / "lossless.jpg"), Recipe(image_size=32), np.random.default_rng(0))
    assert (np.asarray(crop) == 128).all()
