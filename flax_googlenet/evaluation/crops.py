"""The views of an image that are evaluated together: the middle, ten crops, or the 144 of the paper."""

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from flax_googlenet.images.preprocessing import CROP, RESIZE, ImageError, normalise, preprocess

PAPER_SCALES = (256, 288, 320, 352)
"""Short sides, in pixels, for crops of 224."""

_MAX_ASPECT = 32  # 1x20000 pixels would become 256x5120000


def crops(image: Image.Image, count: int, size: int = CROP) -> Float32[np.ndarray, "count size size 3"]:
    """An RGB image as the network sees it in one of three protocols.

    Args:
        image: RGB, of any size.
        count: 1: the middle, as for inference. 10: the short side resized to 256; four corners and the middle, of the
            image and of its mirror image. 144, the paper's: at four scales three squares, at the ends and in the
            middle of the long side; of each, and of its mirror image, four corners, the middle, and the whole resized.
        size: height and width of a crop. For another than 224 the numbers above change in proportion.

    Returns:
        float32 [count, size, size, 3], normalised.

    Raises:
        ImageError: for 10 and 144, if the image is more than 32 times as long as it is wide.

    Reference: Going Deeper with Convolutions, section 7.
    """
    if count == 1:
        return preprocess(image, size)[None]
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise ImageError(f"{image.width}x{image.height} pixels are too long for {count} crops: take one")
    views = _ten(image, size) if count == 10 else _paper(image, size)
    return np.stack([normalise(view) for view in views])


def _ten(image: Image.Image, size: int) -> list[Image.Image]:
    resized = _resize(image, round(RESIZE * size / CROP))
    return [crop for view in (resized, ImageOps.mirror(resized)) for crop in _corners_and_middle(view, size)]


def _paper(image: Image.Image, size: int) -> list[Image.Image]:
    views = []
    for scale in PAPER_SCALES:
        resized = _resize(image, round(scale * size / CROP))
        side, right, bottom = min(resized.size), resized.width - min(resized.size), resized.height - min(resized.size)
        for share in (0, 0.5, 1):
            left, top = round(share * right), round(share * bottom)
            square = resized.crop((left, top, left + side, top + side))
            for view in (square, ImageOps.mirror(square)):
                views += [*_corners_and_middle(view, size), view.resize((size, size), Image.Resampling.BILINEAR)]
    return views


def _resize(image: Image.Image, short: int) -> Image.Image:
    """With ``short`` pixels on the short side; the long one is rounded down, as torchvision does."""
    long = int(short * max(image.size) / min(image.size))
    size = (short, long) if image.width <= image.height else (long, short)
    return image.resize(size, Image.Resampling.BILINEAR)


def _corners_and_middle(image: Image.Image, size: int) -> list[Image.Image]:
    right, bottom = image.width - size, image.height - size
    places = ((0, 0), (right, 0), (0, bottom), (right, bottom), (round(right / 2), round(bottom / 2)))
    return [image.crop((left, top, left + size, top + size)) for left, top in places]
