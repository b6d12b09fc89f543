"""Random crops, mirroring and colour changes for training; evaluation uses ``preprocess``, which is not random."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from flax_googlenet.images.preprocessing import Reduction
from flax_googlenet.training.recipe import Recipe

# The paper, section 6, chooses with equal probability among bilinear, area, nearest neighbour and cubic.
_INTERPOLATIONS = (Image.Resampling.BILINEAR, Image.Resampling.BOX, Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
_DISTORTIONS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_CROP_ATTEMPTS = 10


def augment(read: Callable[[Reduction], Image.Image], recipe: Recipe, rng: np.random.Generator) -> Image.Image:
    """Return a random crop of an image, resized, mirrored and distorted according to the recipe.

    If the crop of a JPEG file is at least two, four or eight times as wide and as high as the result, the file is
    decoded at a half, a quarter or an eighth of its size. libjpeg averages pixels before the crop is resized, so the
    result differs by less than 3 of 255 levels on average. For photographs of 4000 x 3000 pixels this is 3.5 times as
    fast.

    Args:
        read: Returns an RGB image of any size, given the reduction for ``rgb``.
        recipe: The recipe, from which ``image_size``, ``crop_area``, ``crop_aspect``, ``interpolation``, ``flip`` and
            ``distortion`` are used.
        rng: Source of all randomness.

    Returns:
        An RGB image of ``image_size`` x ``image_size`` pixels.
    """
    box, full_width = (0, 0, 0, 0), 0

    def draw(width: int, height: int) -> int:
        nonlocal box, full_width
        box, full_width = random_crop(width, height, recipe.crop_area, recipe.crop_aspect, rng), width
        side = min(box[2] - box[0], box[3] - box[1])
        return next((n for n in (8, 4, 2) if side >= n * recipe.image_size), 1)

    image = read(draw)
    if full_width == 0:  # not a JPEG file
        draw(*image.size)
    divisor = round(full_width / image.width)  # the width is rounded up
    method = _INTERPOLATIONS[rng.integers(4)] if recipe.interpolation == "random" else Image.Resampling.BILINEAR
    new_size = (recipe.image_size, recipe.image_size)
    if divisor == 1:
        crop = image.crop(box).resize(new_size, method)
    else:
        left, top, right, bottom = (side / divisor for side in box)
        crop = image.resize(new_size, method, (left, top, right, bottom))
    if recipe.flip and rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return distort(crop, rng) if recipe.distortion else crop


def random_crop(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return a box with a random area and a random aspect ratio at a random place in an image.

    The distribution is that of torchvision's RandomResizedCrop.

    Args:
        width: Width of the image.
        height: Height of the image.
        area: Range of the box's share of the image's area, which is uniform.
        aspect: Range of the box's width / height, whose logarithm is uniform.
        rng: Source of randomness.

    Returns:
        The left, top, right and bottom of the box, in pixels. If ten attempts give no box that fits, it is the largest
        box in the middle of the image whose aspect ratio lies in the range.

    Reference: Going Deeper with Convolutions, section 6.
    """
    for _ in range(_CROP_ATTEMPTS):
        pixels = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * aspect[1])))
    h = min(height, max(1, round(width / aspect[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Multiply brightness, contrast and saturation by random factors between 0.5 and 1.5, in random order.

    Reference: Howard, "Some Improvements on Deep Convolutional Neural Network Based Image Classification", 2013,
    section 2.2, which the paper cites.
    """
    for index in rng.permutation(len(_DISTORTIONS)):
        image = _DISTORTIONS[index](image).enhance(rng.uniform(0.5, 1.5))
    return image
