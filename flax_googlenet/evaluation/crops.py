"""The crops of an image that are evaluated together: the centre, ten crops, or the 144 of the paper."""

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from flax_googlenet.images.preprocessing import CROP, RESIZE, ImageError, normalise, preprocess, resize

PAPER_SCALES = (256, 288, 320, 352)
"""The short sides that an image is resized to, in pixels, for crops of 224."""

_MAX_ASPECT = 32  # 1x20000 pixels would become 256x5120000


def crops(image: Image.Image, count: int, size: int = CROP) -> Float32[np.ndarray, "count size size 3"]:
    """Return the crops of an RGB image that one of three protocols evaluates.

    1 is the centre crop, as for inference. 10 are the four corners and the centre of the image and of its mirror image,
    after its short side was resized to 256. 144 are the paper's. They take three squares at each of four scales, at
    both ends and in the middle of the long side. Each square, and its mirror image, gives its four corners, its centre,
    and the square itself, resized.

    Args:
        image: The image, RGB, of any size.
        count: Number of crops: 1, 10 or 144.
        size: Height and width of a crop, in pixels. The other numbers change with it in proportion to 224.

    Returns:
        float32 [count, size, size, 3], ImageNet-normalised.

    Raises:
        ImageError: For 10 and 144 crops, if the image is more than 32 times as long as it is wide.

    Reference: Going Deeper with Convolutions, section 7.
    """
    if count == 1:
        return preprocess(image, size)[None]
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise ImageError(f"{image.width}x{image.height} pixels are too long for {count} crops: take one crop")
    if count == 10:
        resized = resize(image, round(RESIZE * size / CROP))
        views = [crop for view in (resized, ImageOps.mirror(resized)) for crop in _corners_and_centre(view, size)]
    else:
        views = _paper(image, size)
    return np.stack([normalise(view) for view in views])


def _paper(image: Image.Image, size: int) -> list[Image.Image]:
    views = []
    for scale in PAPER_SCALES:
        resized = resize(image, round(scale * size / CROP))
        side, right, bottom = min(resized.size), resized.width - min(resized.size), resized.height - min(resized.size)
        for share in (0, 0.5, 1):
            left, top = round(share * right), round(share * bottom)
            square = resized.crop((left, top, left + side, top + side))
            for view in (square, ImageOps.mirror(square)):
                views += [*_corners_and_centre(view, size), view.resize((size, size), Image.Resampling.BILINEAR)]
    return views


def _corners_and_centre(image: Image.Image, size: int) -> list[Image.Image]:
    right, bottom = image.width - size, image.height - size
    places = ((0, 0), (right, 0), (0, bottom), (right, bottom), (round(right / 2), round(bottom / 2)))
    return [image.crop((left, top, left + size, top + size)) for left, top in places]
