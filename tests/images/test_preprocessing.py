"""Preprocessing is torchvision's, pixel for pixel; every kind of image keeps its colours, or is refused by name."""

import io
import os
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from PIL import EpsImagePlugin, Image, TiffImagePlugin
from torchvision.datasets.folder import default_loader

from flax_googlenet import ImageError, preprocess, preprocess_batch
from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD
from flax_googlenet.images.preprocessing import rgb

ATOL = 1e-6  # float32 of magnitude 2.6; measured: 0


def torchvision_preset(image: Image.Image) -> np.ndarray:
    return reference.IMAGENET.transforms()(image).permute(1, 2, 0).numpy()


def assert_equal_to_torchvision(source: Any, image: Image.Image) -> None:
    ours = preprocess(source)
    assert (ours.shape, ours.dtype) == ((224, 224, 3), np.float32)
    np.testing.assert_allclose(ours, torchvision_preset(image), rtol=0, atol=ATOL)


def colours(array: np.ndarray) -> np.ndarray:
    """The uint8 [h, w, 3] from which ``preprocess`` made ``array``."""
    return np.rint((array * IMAGENET_STD + IMAGENET_MEAN) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """640 x 427 pixels."""
    return Image.fromarray(reference.photographs()[0])


# Width x height: the photographs' own, squares around 224 and 256, odd and tiny ones, enlarged ones, long ones, and
# ones so long that only a part is resized (from 32 : 1 on), where the crop holds both ends of a source pixel or none.
SIZES = [(640, 427), (427, 640), (224, 224), (256, 256), (255, 257), (257, 255), (333, 500), (501, 333), (1281, 853)]
SIZES += [(1, 1), (1, 2), (2, 1), (3, 2), (7, 5), (15, 15), (100, 75), (31, 97), (1000, 31), (31, 1000), (8001, 257)]
SIZES += [(1, 100), (100, 1), (2, 777), (777, 2), (3, 301), (301, 3), (7, 1500), (1501, 7), (255, 8201), (8203, 255)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_photograph_of_any_size_is_equal_to_torchvisions(photograph: Image.Image, size: tuple[int, int]) -> None:
    image = photograph.resize(size, Image.Resampling.BICUBIC)
    assert_equal_to_torchvision(image, image)


def test_random_crops_of_photographs_are_equal_to_torchvisions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        picture = reference.photographs()[rng.integers(2)]
        top, left = rng.integers(0, 300, 2)
        crop = picture[top : top + rng.integers(1, 300), left : left + rng.integers(1, 300)]
        assert_equal_to_torchvision(crop, Image.fromarray(crop))


def test_strips_of_noise_are_equal_to_torchvisions() -> None:
    rng = np.random.default_rng(0)
    for short, ratio in zip(rng.integers(1, 255, 12), rng.uniform(33, 60, 12), strict=True):
        noise = rng.integers(0, 256, (short, int(short * ratio), 3), dtype=np.uint8)
        for pixels in (noise, noise.swapaxes(0, 1)):
            assert_equal_to_torchvision(pixels, Image.fromarray(pixels))


def test_a_line_of_20000_pixels_takes_little_memory(tmp_path: Path) -> None:
    # torchvision's way would need 256 x 5,120,000 pixels of 4 bytes: 5 GB.
    for name, size in {"tall.png": (1, 20000), "wide.png": (20000, 1)}.items():
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / name)
    code = f"""
import resource, flax_googlenet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("tall.png", "wide.png"):
    flax_googlenet.preprocess({str(tmp_path)!r} + "/" + name)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / {2**20 if sys.platform == "darwin" else 2**10})
"""
    megabytes = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert megabytes < 100


def test_path_pillow_image_and_array_are_the_same(photograph: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photograph.png"
    photograph.save(path)
    expected = torchvision_preset(photograph)
    for source in (path, str(path), photograph, np.asarray(photograph), np.asarray(photograph)[::-1][::-1]):
        np.testing.assert_allclose(preprocess(source), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("rgb.jpg", "RGB", {"quality": 95}),
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("grey.png", "L", {}),
        ("bit.png", "1", {}),
        ("palette.png", "P", {}),
        ("palette-with-transparent-colour.png", "P", {"transparency": 3}),
        ("palette-with-alpha.png", "P", {"transparency": bytes(range(256))}),
        ("colour-key.png", "RGB", {"transparency": (0, 0, 0)}),
        ("alpha.png", "RGBA", {}),
        ("grey-alpha.png", "LA", {}),
        ("cmyk.tif", "CMYK", {}),
        ("ycbcr.tif", "YCbCr", {}),
        ("lossy.webp", "RGB", {}),
        ("alpha.webp", "RGBA", {"lossless": True, "exact": True}),
        ("bitmap.bmp", "RGB", {}),
        ("palette.gif", "P", {}),
    ],
)
def test_a_file_of_any_kind_is_equal_to_torchvisions_loader(
    photograph: Image.Image, tmp_path: Path, name: str, mode: str, options: dict[str, Any]
) -> None:
    picture = photograph.copy()
    if "A" in mode:
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    path = tmp_path / name
    picture.convert(mode).save(path, **options)
    with warnings.catch_warnings():  # the loader's, of transparency
        warnings.simplefilter("ignore")
        expected = default_loader(str(path))
    assert_equal_to_torchvision(path, expected)
    difference = np.asarray(expected).astype(int) - np.asarray(photograph.convert("RGB"))
    assert mode in ("1", "L", "LA") or abs(difference).mean() < 16  # and these are the photograph's colours


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(tmp_path: Path, name: str, orientation: int) -> None:
    corners = np.zeros((256, 256, 3), np.uint8)
    corners[:128, :128], corners[:128, 128:], corners[128:, :128] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # How a camera stores the upright picture: Exif 2.32, tag 274 (row 0 and column 0 of the stored image lie at ...).
    stored = {
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.swapaxes(0, 1),
        6: np.rot90(corners),
        7: np.rot90(corners.swapaxes(0, 1), 2),
        8: np.rot90(corners, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **({"quality": 100} if name.endswith("jpg") else {}))
    difference = colours(preprocess(tmp_path / name)).astype(int) - corners[16:240, 16:240]
    assert abs(difference).mean() < 3  # chroma subsampling along the borders; any other turn differs by more than 60
    # The upright picture is not turned once more, as it would be where a data set reads it and evaluation prepares it.
    np.testing.assert_array_equal(preprocess(rgb(tmp_path / name)), preprocess(tmp_path / name))


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of tags: number, type, count and 4 bytes of value."""
    directory = b"".join(struct.pack("<HHL", *tag[:3]) + tag[3] for tag in sorted(tags))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + directory + bytes(4)


TURNED = (274, 3, 1, b"\6\0\0\0")
FAR = struct.pack("<L", 60000)  # where nothing is


# OpenCV reads the same orientations from all of these.
@pytest.mark.parametrize(
    ("block", "is_turned"),
    [
        (exif(TURNED), True),
        (exif(TURNED, (256, 2, 3, b"64\0\0")), True),  # the width as text
        (exif(TURNED, (282, 2, 3, b"72\0\0")), True),  # the resolution as text
        (exif(TURNED, (256, 9, 1, struct.pack("<l", -5))), True),
        (exif(TURNED, (259, 11, 1, struct.pack("<f", np.nan))), True),
        (exif(TURNED, (271, 2, 99, FAR)), True),  # the maker's name lies outside, and Pillow reads no further
        (exif(TURNED, (0x8769, 9, 1, struct.pack("<l", -1))), True),  # the next directory is at -1
        (exif(TURNED, (0x8825, 4, 1, b"\x08\0\0\0")), True),  # a directory that contains itself
        (exif(TURNED)[:-16], False),  # cut off in the tag
        (exif((274, 3, 2, b"\6\0\6\0")), True),
        (exif((274, 2, 2, b"6\0\0\0")), False),
        (exif((274, 3, 1, b"\x63\0\0\0")), False),
        (b"Exif\0\0II*\0", False),
        (b"Exif\0\0not a TIFF header", False),
    ],
)
@pytest.mark.parametrize("name", ["exif.jpg", "exif.png", "exif.webp"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it cannot read
def test_of_exif_the_orientation_alone_counts_and_no_damage_costs_an_image(
    photograph: Image.Image, tmp_path: Path, name: str, block: bytes, is_turned: bool
) -> None:
    photograph.crop((0, 0, 300, 260)).save(tmp_path / name, exif=block)
    stored = default_loader(str(tmp_path / name))
    assert_equal_to_torchvision(tmp_path / name, stored.transpose(Image.Transpose.ROTATE_270) if is_turned else stored)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.jp2", "grey.pgm"])
def test_16_bit_greys_are_scaled_and_not_clipped(tmp_path: Path, name: str) -> None:
    greys = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    Image.fromarray(greys).save(tmp_path / name)
    expected = np.rint(greys / 257).astype(np.uint8)[16:240, 16:240, None].repeat(3, axis=2)
    assert np.array_equal(colours(preprocess(tmp_path / name)), expected)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "i4"])  # modes I;16, I;16B and I
def test_16_bit_modes_of_pillow_are_scaled_alike(dtype: str) -> None:
    image = Image.fromarray(np.full((256, 256), 257 * 100 + 128, dtype))
    assert image.mode.startswith("I")
    assert np.unique(colours(preprocess(image))).tolist() == [100]
    assert np.unique(colours(preprocess(Image.fromarray(np.full((256, 256), 257 * 100 + 129, dtype))))).tolist() == [
        101
    ]


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png", "pages.tif"])
def test_of_an_animation_it_is_the_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (256, 256), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.unique(colours(preprocess(tmp_path / name)).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_the_image_of_the_caller_is_left_as_it_was(photograph: Image.Image) -> None:
    image = photograph.copy()
    image.getexif()[274] = 6
    preprocess(image)
    assert (image.size, image.mode, image.getexif()[274]) == ((640, 427), "RGB", 6)
    assert image.tobytes() == photograph.tobytes()


@pytest.mark.parametrize("dtype", ["i4", "u4"])
def test_8_bit_values_in_a_file_of_32_bits_are_not_taken_for_16_bits(tmp_path: Path, dtype: str) -> None:
    greys = np.arange(65536, dtype=dtype).reshape(256, 256) % 256
    save_tiff(tmp_path / "wide.tif", greys)
    assert_equal_to_torchvision(tmp_path / "wide.tif", default_loader(str(tmp_path / "wide.tif")))
    assert np.array_equal(colours(preprocess(tmp_path / "wide.tif"))[..., 0], greys[16:240, 16:240])
    greys[0, 0] = 256  # and now they are 16-bit values
    save_tiff(tmp_path / "wide.tif", greys)
    assert colours(preprocess(tmp_path / "wide.tif")).max() == 1


@pytest.mark.parametrize("name", ["dark.png", "dark.pgm", "dark.tif", "signed.tif"])
def test_a_dark_picture_of_16_bits_stays_dark(tmp_path: Path, name: str) -> None:
    greys = np.full((256, 256), 255, "i2" if name == "signed.tif" else "u2")
    if name == "signed.tif":
        save_tiff(tmp_path / name, greys)
    else:
        Image.fromarray(greys).save(tmp_path / name)
    assert np.unique(colours(preprocess(tmp_path / name))).tolist() == [1]


def save_tiff(path: Path, greys: np.ndarray) -> None:
    """Greys of any integer dtype as one strip; Pillow writes only some of these dtypes."""
    height, width = greys.shape
    values = {256: width, 257: height, 258: 8 * greys.dtype.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    values |= {279: greys.nbytes, 339: 2 if greys.dtype.kind == "i" else 1}
    directory = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in values.items())
    header = b"II*\0" + struct.pack("<L", 8 + greys.nbytes)
    pixels = greys.astype(greys.dtype.newbyteorder("<")).tobytes()
    path.write_bytes(header + pixels + struct.pack("<H", len(values)) + directory + bytes(4))


def test_exif_of_a_tiff_file_that_points_nowhere_costs_no_image(photograph: Image.Image, tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = 6
    for pointer in (0x8769, 0x8825):  # to the directories of EXIF and GPS
        tags.tagtype[pointer] = 9  # int32
        tags[pointer] = -1
    stored = photograph.crop((0, 0, 300, 260))
    stored.save(tmp_path / "exif.tif", tiffinfo=tags)
    assert_equal_to_torchvision(tmp_path / "exif.tif", stored.transpose(Image.Transpose.ROTATE_270))


# What is refused: one error that names the image and the way out.


def test_no_file_starts_another_program(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript = tmp_path / "gs"  # the first one on the path
    ghostscript.write_text(f"#!/bin/sh\necho started >> {tmp_path}/log\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    eps = io.BytesIO()
    photograph.crop((0, 0, 9, 9)).save(eps, "EPS")
    (tmp_path / "picture.eps").write_bytes(eps.getvalue())
    # IPTC: fields of a marker, two numbers and a size; the picture in the last one may be of any format.
    fields = [(3, 60, b"\1\0"), (3, 20, b"\0\x09"), (3, 30, b"\0\x09"), (3, 120, b"\0\5"), (8, 10, eps.getvalue())]
    iptc = b"".join(struct.pack(">BBBH", 0x1C, *field[:2], len(field[2])) + field[2] for field in fields)
    (tmp_path / "picture.jpg").write_bytes(iptc + b"\x1c\x03\x3c\0\0")
    for name in ("picture.eps", "picture.jpg"):
        for source in (tmp_path / name, (tmp_path / name).read_bytes()):
            with pytest.raises(ImageError, match=f"({name}|the image) .*: convert it to PNG"):
                preprocess(source)
        assert not (tmp_path / "log").exists()
        with Image.open(tmp_path / name) as image, pytest.raises(ImageError):  # this one the caller has asked for
            preprocess(image)
        assert (tmp_path / "log").exists()
        (tmp_path / "log").unlink()


def cut_off(path: Path) -> None:
    Image.fromarray(reference.photographs()[0]).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.jpg", lambda path: None, "no such file or directory: check the path"),
        ("folder.jpg", Path.mkdir, "is a folder: name an image"),
        ("pipe.jpg", os.mkfifo, "is no file: name an image"),
        ("empty.jpg", Path.touch, "is empty: get a new copy"),
        ("text.jpg", lambda path: path.write_text("Hello!"), "not an image that Pillow can read: convert it to PNG"),
        ("cut.jpg", cut_off, r"damaged or cut off \(.+\): get a new copy"),
        ("cut.png", cut_off, r"damaged or cut off \(.+\): get a new copy"),
        ("cut.webp", cut_off, r"damaged or cut off|not an image"),
        ("cut.gif", cut_off, r"damaged or cut off \(.+\): get a new copy"),
        ("cut.tif", cut_off, r"damaged or cut off|not an image"),
        ("float.tif", lambda path: Image.new("F", (9, 9)).save(path), "floating point.+scale it to 8 bits first"),
        (
            "long.tif",
            lambda path: Image.fromarray(np.full((9, 9), 70000, np.int32)).save(path),
            "outside of 0 to 65535: scale it to 8 bits first",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(ImageError, match=f"{re.escape(str(tmp_path / name))}.*{message}"):
        preprocess(tmp_path / name)


def test_any_flipped_byte_gives_an_image_or_an_image_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(reference.photographs()[1][:40, :40])
    for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.bmp", "a.jp2"):
        picture.save(tmp_path / name)
        data = bytearray((tmp_path / name).read_bytes())
        for place in rng.integers(0, min(len(data), 600), 60):
            damaged = data.copy()
            damaged[place] ^= 1 << rng.integers(8)
            (tmp_path / name).write_bytes(damaged)
            with warnings.catch_warnings():  # Pillow's, of what it mends
                warnings.simplefilter("ignore")
                try:
                    assert preprocess(tmp_path / name).shape == (224, 224, 3)
                except ImageError as error:
                    assert name in str(error)


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("height", [60_000, 200_000], ids=["Pillow's warning", "Pillow's error"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, height: int, action: Any) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (2000, height)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"bomb\.png has more than \d+ pixels.+: make it smaller, or raise"):
            preprocess(path)


def test_a_user_can_allow_larger_images(photograph: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="more than 1000 pixels"):
        preprocess(photograph)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert_equal_to_torchvision(photograph, photograph)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((9, 9, 3), np.float32), r"got float32 \[9, 9, 3\]: scale to 0 ... 255, round and use .astype"),
        (np.zeros((9, 9, 3), np.int64), "got int64"),
        (np.zeros((9, 9, 3), bool), "got bool"),
        (np.zeros((3, 9, 9), np.uint8), r"CHW\? use image.transpose\(1, 2, 0\)"),
        (np.zeros((9, 9), np.uint8), r"numpy.stack\(\[image\] \* 3, axis=-1\)"),
        (np.zeros((9, 9, 4), np.uint8), r"drop alpha with image\[\.\.\., :3\]"),
        (np.zeros((9, 9, 1), np.uint8), r"got uint8 \[9, 9, 1\]"),
        (np.zeros((2, 9, 9, 3), np.uint8), "use preprocess_batch for several images"),
        (np.zeros((0, 9, 3), np.uint8), r"got uint8 \[0, 9, 3\]"),
        (bytearray(b"\x89PNG"), r"the bytes of a file, .* not bytearray: use numpy.asarray"),
        (None, "not NoneType"),
    ],
)
def test_another_array_is_refused_with_the_way_out(array: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        preprocess(array)


def test_a_batch_is_its_images_in_order(photograph: Image.Image, tmp_path: Path) -> None:
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.png")
        photograph.crop((i, 0, 300 + i, 200 + i)).save(paths[-1])
    expected = np.stack([preprocess(path) for path in paths])
    for workers in (None, 1, 3):
        assert np.array_equal(preprocess_batch(paths, workers), expected)
    assert preprocess_batch([]).shape == (0, 224, 224, 3)


def test_a_batch_names_the_image_that_fails(photograph: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^images\[1\]: .+missing.jpg: no such file"):
        preprocess_batch([photograph, tmp_path / "missing.jpg", photograph])
    with pytest.raises(ImageError, match=r"^images\[2\]: expected a uint8 array"):
        preprocess_batch([photograph, np.asarray(photograph), np.zeros(3)])


def test_one_path_is_no_batch() -> None:
    with pytest.raises(ImageError, match=r"photo\.jpg: pass a list"):
        preprocess_batch("photo.jpg")


@pytest.mark.parametrize("size", [32, 64, 192, 299])
def test_preprocess_takes_the_same_part_of_an_image_at_any_size(size: int) -> None:
    # A picture that is its own coordinates, so that a difference of colours is one of places, in source pixels.
    y, x = np.mgrid[:100, :150]
    picture = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    pixels = (np.arange(size) + 0.5) * (100 * 7 / 8 / size) - 0.5
    ours = colours(preprocess(picture, size)).astype(float)
    assert abs(ours[..., 0] - (pixels + (150 - 87.5) / 2)).max() < 0.75  # rounded to a whole colour
    assert abs(ours[..., 1] - (pixels + (100 - 87.5) / 2)[:, None]).max() < 0.75
