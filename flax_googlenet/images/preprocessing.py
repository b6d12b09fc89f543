"""Preprocessing: from an image (file, Pillow or NumPy) to the network's input, pixel-equal to torchvision's preset.

The preset is ``torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()``: the short side resized to 256 pixels
(bilinear, antialiased), a centre crop of 224, [0, 1], ImageNet's mean and standard deviation.
"""

import errno
import io
import os
import stat
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD
from flax_googlenet.errors import GoogLeNetError

RESIZE = 256
"""Short side of the resized image, in pixels."""

CROP = 224
"""Height and width of the crop, in pixels."""

INSTALL_HEIF = "pip install pillow-heif"

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

Reduction = Callable[[int, int], int]
"""Takes the width and height of an upright image, and returns their divisor: 1, 2, 4 or 8."""

_MARGIN = (RESIZE - CROP) // 2
# Of a longer side only the part in the crop is enlarged: 1x20000 pixels would become 256x5120000.
_LONGEST = 32 * RESIZE
_BITS = 22  # fractional bits of the fixed-point numbers in Pillow's resampling

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by its EXIF orientation."""

_SIDEWAYS = {5, 6, 7, 8}
"""The orientations of images that are stored with their width and height exchanged."""

_NOT_OPENED = {"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "WMF"}
"""The formats that Pillow does not decode itself. EPS is a program, which Ghostscript runs; IPTC can contain an EPS
file; the others go to whatever handler another package has registered."""


with suppress(ImportError):  # the package is optional
    from pillow_heif import register_heif_opener

    register_heif_opener()


def reads_heif() -> bool:
    """Return whether Pillow can read HEIF, through pillow-heif or another plugin that the caller has registered."""
    return "HEIF" in Image.OPEN


class ImageError(GoogLeNetError, ValueError):
    """An image that cannot be read; the message names it and the way out."""


def preprocess(image: ImageSource, size: int = CROP) -> Float32[np.ndarray, "size size 3"]:
    """Prepare one image for the network.

    Files and Pillow images are turned upright by their EXIF orientation and converted to RGB. An alpha channel is
    dropped without blending, as in torchvision's loader. 16-bit greys are scaled to 8 bits, and so are 32-bit greys
    unless all are below 256. Only the first frame of an animation is used.

    Args:
        image: The path of a file that Pillow reads, the bytes of such a file, a Pillow image, or a uint8 RGB array
            [H, W, 3]. HEIC is read where the package pillow-heif is installed. Files that only another program can
            decode, such as EPS, are refused: if you trust one, open it with Pillow and pass the image.
        size: Height and width of the result, in pixels: those of the training images. The result shows the same part
            of the image at any size: the middle 224 / 256 of the short side, and as much of the long side.

    Returns:
        float32 [size, size, 3], ImageNet-normalised RGB.

    Raises:
        ImageError: If there is no such file, if it is damaged or not an image, if it has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, if its greys are floating point, negative or above 65535, or if the array
            has another dtype or shape.
    """
    return normalise(crop(image, size))


def crop(image: ImageSource, size: int = CROP) -> Image.Image:
    """Return the crop that ``preprocess`` normalises, in RGB, ``size`` pixels high and wide; raise the same errors."""
    return centre_crop(rgb(image), size)


def centre_crop(picture: Image.Image, size: int = CROP) -> Image.Image:
    """Return the same as ``crop``, for an image that ``rgb`` has returned."""
    if size == CROP:
        return _resize_and_crop(picture)
    side = min(picture.size) * CROP / RESIZE
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=box)


def preprocess_batch(
    images: Iterable[ImageSource], workers: int | None = None, size: int = CROP
) -> Float32[np.ndarray, "n size size 3"]:
    """Prepare many images in threads, each as ``preprocess`` does.

    Args:
        images: Images, as for ``preprocess``. A Pillow image that is not loaded yet must not be among them twice,
            because Pillow cannot read one image in two threads.
        workers: Number of threads, by default one for each core. Pillow releases Python's lock while it works.
        size: Height and width of the results, as for ``preprocess``.

    Returns:
        float32 [N, size, size, 3], in the order of ``images``.

    Raises:
        ImageError: For the same reasons as ``preprocess``. The message has the index of the first image that fails.
    """
    if isinstance(images, str | os.PathLike):
        raise ImageError(f"images is one path, {os.fsdecode(images)}: pass a list of paths, or use preprocess")

    def numbered(item: tuple[int, ImageSource]) -> np.ndarray:
        try:
            return preprocess(item[1], size)
        except ImageError as error:
            raise ImageError(f"images[{item[0]}]: {error}") from error

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        arrays = list(pool.map(numbered, enumerate(images)))
    return np.stack(arrays) if arrays else np.empty((0, size, size, 3), np.float32)


def normalise(image: Image.Image | UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """Return an RGB image as float32 [H, W, 3], normalised by ImageNet's mean and standard deviation."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    # NumPy computes with whole rows: with the three values of a pixel at a time, this would take five times as long.
    rows = pixels.reshape(height, 3 * width) / np.float32(255)
    rows -= np.tile(np.array(IMAGENET_MEAN, np.float32), width)
    rows /= np.tile(np.array(IMAGENET_STD, np.float32), width)
    return rows.reshape(height, width, 3)


def denormalise(pixels: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """Return ImageNet-normalised RGB as RGB in [0, 1]: the inverse of ``normalise``."""
    return np.clip(pixels * np.array(IMAGENET_STD, np.float32) + np.array(IMAGENET_MEAN, np.float32), 0, 1)


def rgb(source: ImageSource, reduction: Reduction | None = None) -> Image.Image:
    """Return an image decoded, upright and in RGB; raise the same errors as ``preprocess``.

    Args:
        source: The image, as for ``preprocess``.
        reduction: Called for a JPEG file before its pixels are decoded. Width and height of the result are divided by
            the divisor that it returns, and rounded up: libjpeg computes fewer pixels from the frequencies in each
            block, in less time. If the image has to be turned and its sides are no multiples of the divisor, a smaller
            one is used. Lossless JPEG files, which store no frequencies, and all other images keep their size.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "the image")
    elif isinstance(source, bytes):
        name = "the image"
    elif isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
    else:
        raise ImageError(
            "an image must be a path, the bytes of a file, a PIL.Image or a uint8 array [H, W, 3], not "
            f"{type(source).__name__}: use numpy.asarray for an array"
        )
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name, None, from_file=False)
        if isinstance(source, bytes):
            is_empty = not source
        else:
            # Opening a pipe would wait for its writer.
            if not stat.S_ISREG((status := os.stat(source)).st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no file"
                raise ImageError(f"{name} is {kind}: name an image")
            is_empty = status.st_size == 0
        if is_empty:
            raise ImageError(f"{name} is empty: get a new copy")
        Image.init()  # fills Image.ID with all formats
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=[name for name in Image.ID if name not in _NOT_OPENED]) as image:
            return _to_rgb(image, name, reduction, from_file=True)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        if _is_heif(source if isinstance(source, bytes) else name) and not reads_heif():
            raise ImageError(f"{name} is in HEIC, which Pillow cannot read alone: {INSTALL_HEIF}") from error
        raise ImageError(f"{name} is not an image that Pillow can read: convert it to PNG or JPEG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except Exception as error:  # on a damaged file Pillow's readers raise anything
        if isinstance(error, OSError) and error.errno is not None:
            hint = ": check the path" if error.errno == errno.ENOENT else ""
            raise ImageError(f"{name}: {(error.strerror or 'unreadable').lower()}{hint}") from error
        raise ImageError(f"{name} is damaged or cut off ({error}): get a new copy") from error


def _to_rgb(image: Image.Image, name: str, reduction: Reduction | None, *, from_file: bool) -> Image.Image:
    # This check comes before the pixels are decoded. Up to twice this size, Pillow itself only warns.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(name)
    if from_file and image.format == "TIFF":
        # While Pillow decodes the pixels, it also reads what these tags point to, and fails if that is damaged.
        for pointer in ExifTags.IFD:
            with suppress(Exception):
                del image.getexif()[pointer]
    # libjpeg decodes a lossless file, which has no quantisation tables, in its own size alone.
    if reduction is not None and isinstance(image, JpegImageFile) and image.quantization:
        orientation = _orientation(image, from_file=from_file)
        divisor = reduction(*(reversed(image.size) if orientation in _SIDEWAYS else image.size))
        # A side that is not divided ends within a pixel, and turning the image may move that pixel to the start.
        while orientation in _TURNS and (image.width % divisor or image.height % divisor):
            divisor //= 2
        image.draft(None, (image.width // divisor, image.height // divisor))
    image.load()
    turn = _TURNS.get(_orientation(image, from_file=from_file))
    if image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(image, name))
    if image.mode == "F":
        raise ImageError(f"{name} is in floating point, of unknown range: scale it to 8 bits first")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # the same colours; a direct conversion to RGB warns of transparency
    if image.mode != "RGB" or not from_file:
        image = image.convert("RGB")  # a new image, which shares nothing with the caller's image
    image.info = {}  # without the orientation, so that nobody turns the result a second time
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image, *, from_file: bool) -> Any:
    """Return EXIF's tag 274 of an image: 1 to 8, or any other value if the tag or the block makes no sense.

    For a file this reads the one tag and no other: Pillow stops at the first damaged tag, and
    ``ImageOps.exif_transpose`` also fails on many tags that Pillow can read but not write. For an image that the caller
    passed, Pillow is asked, because the caller may have changed its tags.
    """
    block = image.info.get("exif")
    if from_file and isinstance(block, bytes) and (orientation := _tag_274(block)) is not None:
        return orientation
    with suppress(Exception):  # Pillow's readers raise anything on a damaged block, and the pixels are sound
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _tag_274(block: bytes) -> int | None:
    """Return the orientation in an EXIF block, or None if it has none that can be read.

    A block is a small TIFF file. Bytes 4 to 8 say where its directory starts. The directory has two bytes for the
    number of tags, and then 12 bytes for each tag: its number, its type (3 is uint16), the count of its values, and the
    values.
    """
    block = block.removeprefix(b"Exif\0\0")
    order = "<" if block.startswith(b"II") else ">"
    with suppress(struct.error):  # the block ends too early
        (start,) = struct.unpack_from(f"{order}L", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHLH", block, place)
            if (tag, kind) == (ExifTags.Base.Orientation, 3):
                return value
    return None


def _to_8_bits(image: Image.Image, name: str) -> UInt8[np.ndarray, "h w"]:
    """Scale the greys of a loaded image of mode I or I;16 (or a variant), which Pillow's ``convert`` would clip at 255.

    Pillow opens files of 16 and of 32 bits as mode I. 16-bit values are scaled by their full range. No picture uses the
    full range of 32 bits, so there the largest value decides: if it is at most 255, the values are 8-bit values in a
    wide file, and stay unchanged, as in torchvision's loader.
    """
    grey = np.asarray(image).astype(np.int32)
    if grey.min() < 0 or grey.max() > 65535:
        raise ImageError(f"{name} has values outside of 0 to 65535: scale it to 8 bits first")
    bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, ())  # only TIFF files have it
    is_16_bits = image.mode != "I" or image.format in ("PNG", "PPM") or 16 in bits
    if not is_16_bits and grey.max() <= 255:
        return grey.astype(np.uint8)
    return ((grey + 128) // 257).astype(np.uint8)


def _is_heif(source: str | bytes) -> bool:
    """Return whether a file starts like HEIF, whatever its name is: phones also send HEIC as .jpg."""
    with suppress(OSError), io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        start = file.read(12)
        return start[4:8] == b"ftyp" and start[8:] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
    return False


def _too_large(name: str) -> ImageError:
    return ImageError(
        f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, which may be a decompression bomb: make it smaller, or "
        "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )


def _from_array(array: np.ndarray) -> Image.Image:
    problem = f"expected a uint8 array [H, W, 3], got {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        raise ImageError(f"{problem}: scale to 0 ... 255, round and use .astype(numpy.uint8)")
    if array.ndim == 2:
        raise ImageError(f"{problem}: for greys use numpy.stack([image] * 3, axis=-1)")
    if array.ndim == 4:
        raise ImageError(f"{problem}: use preprocess_batch for several images")
    if array.ndim != 3 or array.size == 0:
        raise ImageError(problem)
    if array.shape[2] == 4:
        raise ImageError(f"{problem}: drop alpha with image[..., :3]")
    if array.shape[2] != 3:
        raise ImageError(f"{problem}: CHW? use image.transpose(1, 2, 0)" if array.shape[0] == 3 else problem)
    return Image.fromarray(array)


def resize(image: Image.Image, short: int) -> Image.Image:
    """Resize an image to ``short`` pixels on its short side, with the long side rounded down as torchvision does."""
    long = int(short * max(image.size) / min(image.size))
    size = (short, long) if image.width <= image.height else (long, short)
    return image.resize(size, Image.Resampling.BILINEAR)


def _resize_and_crop(image: Image.Image) -> Image.Image:
    """Do the same as torchvision's ``resize(image, 256)`` and ``center_crop(image, 224)``, with the same rounding."""
    long = int(RESIZE * max(image.size) / min(image.size))
    if min(image.size) < RESIZE and long > _LONGEST:
        return _enlarge_strip(image, long, round((long - CROP) / 2))
    resized = resize(image, RESIZE)
    left, top = (round((side - CROP) / 2) for side in resized.size)  # to even, as torchvision does
    return resized.crop((left, top, left + CROP, top + CROP))


def _enlarge_strip(image: Image.Image, long: int, start: int) -> Image.Image:
    """Do the same as ``_resize_and_crop`` for a very long image, but resize only the part that the crop keeps.

    The result is equal pixel for pixel.

    Pillow resizes horizontally, rounds to 8 bits, and then resizes vertically. It could resize a box of the image
    itself, but the borders of a box are float32, and some pixels would differ. So the long side is resized here.
    """
    width, height = image.size
    first, weights = _bilinear_weights(max(width, height), long, start)
    last = first + weights.shape[1]
    if width <= height:
        rows = image.crop((0, first, width, last)).resize((RESIZE, last - first), Image.Resampling.BILINEAR)
        rows = rows.crop((_MARGIN, 0, _MARGIN + CROP, last - first))
        return Image.fromarray(_weighted_sums(weights, np.asarray(rows)))
    columns = np.asarray(image.crop((first, 0, last, height))).swapaxes(0, 1)
    strip = Image.fromarray(_weighted_sums(weights, columns).swapaxes(0, 1))
    return strip.resize((CROP, RESIZE), Image.Resampling.BILINEAR).crop((0, _MARGIN, CROP, _MARGIN + CROP))


def _bilinear_weights(size: int, new_size: int, start: int) -> tuple[int, np.ndarray]:
    """Return Pillow's weights for ``CROP`` pixels, from ``start`` on, of a side enlarged from ``size`` to ``new_size``.

    Returns:
        The first source pixel that counts, and the fixed-point weights, int64 [CROP, source pixels from there on].

    Reference: ``precompute_coeffs`` in https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c
    """
    centres = (np.arange(start, start + CROP) + 0.5) * (size / new_size) - 0.5
    pixels = np.arange(int(centres[0]), int(centres[-1]) + 2)  # the crop of a long side is far from its ends
    weights = np.maximum(1 - abs(pixels - centres[:, None]), 0)
    return int(pixels[0]), (weights * (1 << _BITS) + 0.5).astype(np.int64)


def _weighted_sums(weights: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return the sums, rounded as Pillow does: int64 [CROP, L] and uint8 [L, K, 3] -> uint8 [CROP, K, 3]."""
    sums = np.tensordot(weights, pixels.astype(np.int64), axes=1) + (1 << (_BITS - 1))
    return (sums >> _BITS).astype(np.uint8)
