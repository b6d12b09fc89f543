"""An image to what the network trains on; what it is evaluated on, always the same, is ``preprocess``."""

import math

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageEnhance, ImageOps

from flax_googlenet.images.preprocessing import normalise
from flax_googlenet.training.recipe import Recipe

Box = tuple[int, int, int, int]
"""left, top, right, bottom, in pixels"""

# The four of the paper, section 6: bilinear, area, nearest neighbor and cubic, with equal probability.
_INTERPOLATIONS = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
    Image.Resampling.NEAREST,
    Image.Resampling.BICUBIC,
)
_DISTORTIONS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_CROP_ATTEMPTS = 10


def augment(image: Image.Image, recipe: Recipe, rng: np.random.Generator) -> Float32[np.ndarray, "size size 3"]:
    """A random crop of an RGB image, resized, flipped and distorted as the recipe says.

    Args:
        image: RGB, of any size.
        recipe: ``image_size``, ``crop_area``, ``crop_aspect``, ``interpolation``, ``flip`` and ``distortion`` count.
        rng: all randomness comes from it.

    Returns:
        float32 [image_size, image_size, 3], normalised as for inference.
    """
    box = random_crop(image.width, image.height, recipe.crop_area, recipe.crop_aspect, rng)
    method = _INTERPOLATIONS[rng.integers(4)] if recipe.interpolation == "random" else Image.Resampling.BILINEAR
    crop = image.crop(box).resize((recipe.image_size, recipe.image_size), method)
    if recipe.flip and rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return normalise(distort(crop, rng) if recipe.distortion else crop)


def random_crop(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A box of a random share of an image's area and a random aspect, at a random place in it.

    Args:
        width, height: of the image.
        area: the range of the share, uniform.
        aspect: the range of width / height, uniform in its logarithm.
        rng: the source of randomness.

    Returns:
        The box. Where ten attempts give none that fits, the largest central one of an aspect in the range.

    Reference: Going Deeper with Convolutions, section 6; the same distribution as torchvision's RandomResizedCrop.
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
    """Brightness, contrast and colour, in random order, each times a random factor of 0.5 to 1.5.

    Reference: Howard, "Some Improvements on Deep Convolutional Neural Network Based Image Classification", 2013,
    section 2.2, to which the paper refers.
    """
    for place in rng.permutation(len(_DISTORTIONS)):
        image = _DISTORTIONS[place](image).enhance(rng.uniform(0.5, 1.5))
    return image
