"""An image, from a file, Pillow or NumPy, to the network's input: pixel-equal to torchvision's preset for ImageNet.

The preset is ``torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()``: the short side resized to 256 pixels
(bilinear, antialiased), a centre crop of 224, [0, 1], ImageNet's mean and standard deviation.
"""

import errno
import os
import stat
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.model import IMAGENET_MEAN, IMAGENET_STD

RESIZE = 256
"""The short side after resizing, in pixels."""

CROP = 224
"""Height and width of the result, in pixels."""

INSTALL_HEIF = "pip install pillow-heif"

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

_MARGIN = (RESIZE - CROP) // 2
# A longer side is enlarged only where the crop needs it: 1x20000 pixels would become 256x5120000.
_LONGEST = 32 * RESIZE
_BITS = 22  # after the point, in the fixed-point numbers of Pillow's resampling


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its orientation in EXIF."""

_NOT_OPENED = {"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "WMF"}
"""The formats that Pillow does not decode itself. EPS is a program, and Ghostscript runs it; IPTC can hold an EPS file
inside; the others go to whatever handler another package has registered."""


with suppress(ImportError):  # it is optional
    from pillow_heif import register_heif_opener

    register_heif_opener()


def reads_heif() -> bool:
    """Returns whether Pillow can read HEIF, by pillow-heif or by another plugin that the caller has registered."""
    return "HEIF" in Image.OPEN


class ImageError(GoogLeNetError, ValueError):
    """Something that is no image, or none that can be read; the message names it and the way out."""


def preprocess(image: ImageSource, size: int = CROP) -> Float32[np.ndarray, "size size 3"]:
    """Prepares one image for the network.

    Args:
        image: a file that Pillow reads, a Pillow image, or uint8 RGB [H, W, 3]; HEIC is read where the package
            pillow-heif is installed. Files and Pillow images are turned as their EXIF orientation says and converted to
            RGB. Alpha is dropped and what lies under it is seen, as in torchvision's loader. Greys of 16 bits are
            scaled to 8 bits, and so are greys of 32 bits unless all are below 256. An animation gives its first frame.
            Files that only another program can decode, such as EPS, are refused: a caller who trusts one opens it with
            Pillow and passes the image.
        size: height and width of the result, in pixels: that of the training. At any size it is the same part of the
            image, the middle 224 / 256 of the short side and as much of the long one.

    Returns:
        float32 [size, size, 3], normalised RGB.

    Raises:
        ImageError: if there is no such file, if it is damaged or not an image, if it has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, or if the array is of another dtype or shape.
    """
    picture = rgb(image)
    if size == CROP:
        return normalise(_resize_and_crop(picture))
    side = min(picture.size) * CROP / RESIZE
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return normalise(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))


def preprocess_batch(
    images: Iterable[ImageSource], workers: int | None = None, size: int = CROP
) -> Float32[np.ndarray, "n size size 3"]:
    """Prepares many images at once, as ``preprocess`` does one.

    Args:
        images: as for ``preprocess``. A Pillow image that is not loaded yet must not be among them twice: Pillow reads
            it in one thread alone.
        workers: number of threads, by default one for each core: Pillow works outside Python's lock.
        size: as for ``preprocess``.

    Returns:
        float32 [N, size, size, 3], in the order of ``images``.

    Raises:
        ImageError: as ``preprocess``, for the first image that fails; the message tells its place.
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


def normalise(image: Image.Image) -> Float32[np.ndarray, "h w 3"]:
    """An RGB image -> float32 [H, W, 3], by ImageNet's mean and standard deviation."""
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return (pixels - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)


def rgb(source: ImageSource) -> Image.Image:
    """The image in RGB, decoded and upright, of its own size; raises as ``preprocess``."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "the image")
    elif isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
    else:
        raise ImageError(
            f"an image must be a path, a PIL.Image or a uint8 array [H, W, 3], not {type(source).__name__}: "
            "use numpy.asarray for an array, PIL.Image.open(io.BytesIO(data)) for the bytes of a file"
        )
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name, from_file=False)
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG((status := os.stat(source)).st_mode):
            raise ImageError(f"{name} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no file'}: name an image")
        if status.st_size == 0:
            raise ImageError(f"{name} is empty: get a new copy")
        Image.init()  # so that all formats are in Image.ID
        with Image.open(source, formats=[name for name in Image.ID if name not in _NOT_OPENED]) as image:
            return _to_rgb(image, name, from_file=True)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        if _is_heif(name) and not reads_heif():
            raise ImageError(f"{name} is in HEIC, which Pillow cannot read alone: {INSTALL_HEIF}") from error
        raise ImageError(f"{name} is not an image that Pillow can read: convert it to PNG or JPEG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except Exception as error:  # on a damaged file Pillow's readers raise anything
        if isinstance(error, OSError) and error.errno is not None:
            hint = ": check the path" if error.errno == errno.ENOENT else ""
            raise ImageError(f"{name}: {(error.strerror or 'unreadable').lower()}{hint}") from error
        raise ImageError(f"{name} is damaged or cut off ({error}): get a new copy") from error


def _to_rgb(image: Image.Image, name: str, *, from_file: bool) -> Image.Image:
    # Before the pixels are decoded. Pillow itself only warns up to twice this size.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(name)
    if from_file and image.format == "TIFF":
        # When the pixels are decoded, Pillow reads what these tags point to, and fails where that is damaged.
        for pointer in ExifTags.IFD:
            with suppress(Exception):
                del image.getexif()[pointer]
    image.load()
    turn = _TURNS.get(_orientation(image, from_file=from_file))
    if image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(image, name))
    if image.mode == "F":
        raise ImageError(f"{name} is in floating point, of unknown range: scale it to 8 bits first")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # the same colours; Pillow warns of transparency that goes straight to RGB
    image = image.convert("RGB")  # a new image, which shares nothing with the caller's
    image.info = {}  # the orientation has been used: whoever prepares the result again must not turn it again
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image, *, from_file: bool) -> int:
    """Returns EXIF's tag 274 of a loaded image: 1 to 8, or anything where the tag or the block makes no sense.

    A file is asked for this one tag alone. Pillow reads all tags up to the first one that is damaged, and fails to
    write many that it can read, which ``ImageOps.exif_transpose`` does. An image of the caller's is asked through
    Pillow, because the caller may have changed its tags.
    """
    block = image.info.get("exif")
    if from_file and isinstance(block, bytes) and (orientation := _tag_274(block)) is not None:
        return orientation
    with suppress(Exception):  # Pillow's readers raise anything on a damaged block, and the pixels are sound
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _tag_274(block: bytes) -> int | None:
    """Returns the orientation in an EXIF block, or None where it has none that can be read.

    A block is a small TIFF file. Bytes 4 to 8 say where its directory starts: two bytes for the number of tags, and
    then 12 bytes for each: its number, its type (3 is uint16), the count of its values, and the values.
    """
    block = block.removeprefix(b"Exif\0\0")
    order = "<" if block.startswith(b"II") else ">"
    with suppress(struct.error):  # it ends too early
        (start,) = struct.unpack_from(f"{order}L", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHLH", block, place)
            if (tag, kind) == (ExifTags.Base.Orientation, 3):
                return value
    return None


def _to_8_bits(image: Image.Image, name: str) -> UInt8[np.ndarray, "h w"]:
    """Scales the greys of a loaded image of mode I;16, one of its variants, or I; Pillow's ``convert`` clips at 255.

    Pillow opens files of 16 and of 32 bits as mode I. Values of 16 bits are scaled by their full range. No picture uses
    the range of 32 bits, so there the largest value decides: up to 255, they are 8-bit values in a wide file, and stay
    as they are, as in torchvision's loader.
    """
    grey = np.asarray(image).astype(np.int32)
    if grey.min() < 0 or grey.max() > 65535:
        raise ImageError(f"{name} has values outside of 0 to 65535: scale it to 8 bits first")
    bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, ())  # of a TIFF file
    is_16_bits = image.mode != "I" or image.format in ("PNG", "PPM") or 16 in bits
    if not is_16_bits and grey.max() <= 255:
        return grey.astype(np.uint8)
    return ((grey + 128) // 257).astype(np.uint8)


def _is_heif(path: str) -> bool:
    """Returns whether a file begins as HEIF does, whatever its name: phones also send HEIC as .jpg."""
    with suppress(OSError), open(path, "rb") as file:
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


def _resize_and_crop(image: Image.Image) -> Image.Image:
    """torchvision's ``resize(image, 256)`` and ``center_crop(image, 224)``, its rounding included."""
    width, height = image.size
    short, long = min(width, height), int(RESIZE * max(width, height) / min(width, height))
    start = round((long - CROP) / 2)  # to even, as torchvision does
    if short < RESIZE and long > _LONGEST:
        return _enlarge_strip(image, long, start)
    size, left, top = ((RESIZE, long), _MARGIN, start) if width <= height else ((long, RESIZE), start, _MARGIN)
    return image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + CROP, top + CROP))


def _enlarge_strip(image: Image.Image, long: int, start: int) -> Image.Image:
    """The same for a very long image, without the parts that the crop would cut away; pixel-equal.

    Pillow resizes horizontally, rounds to 8 bits, and then resizes vertically. It can itself take a part of an image,
    but of one whose borders are float32: some pixels would differ. So the long side is resized here.
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
    """Pillow's weights for ``CROP`` pixels, from ``start`` on, of a side enlarged from ``size`` to ``new_size``.

    Returns:
        The first source pixel that counts, and int64 [CROP, source pixels from there on], in fixed point.

    Reference: ``precompute_coeffs`` in https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c
    """
    centres = (np.arange(start, start + CROP) + 0.5) * (size / new_size) - 0.5
    pixels = np.arange(int(centres[0]), int(centres[-1]) + 2)  # the crop of a long side is far from its ends
    weights = np.maximum(1 - abs(pixels - centres[:, None]), 0)
    return int(pixels[0]), (weights * (1 << _BITS) + 0.5).astype(np.int64)


def _weighted_sums(weights: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """int64 [CROP, L] and uint8 [L, K, 3] -> uint8 [CROP, K, 3], rounded as Pillow does."""
    sums = np.tensordot(weights, pixels.astype(np.int64), axes=1) + (1 << (_BITS - 1))
    return (sums >> _BITS).astype(np.uint8)
