"""Pictures of what the functions of this wing return, as files in PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from flax_googlenet.errors import printable
from flax_googlenet.files import write_atomically
from flax_googlenet.images.fonts import find_fonts

_GAP = 6  # pixels between two images of a grid


def draw_explanation(
    path: Path,
    photograph: Float[np.ndarray, "h w 3"],
    heats: Float[np.ndarray, "n h w"],
    classes: Sequence[int],
    class_names: Sequence[str],
    probabilities: Sequence[float],
) -> list[str]:
    """Draw a photograph, and beside it the same photograph for each class with the class's heat over it.

    Args:
        path: The PNG file to write.
        photograph: RGB in [0, 1].
        heats: The heat of each class, as ``grad_cam`` returns it.
        classes: The numbers of the classes.
        class_names: The names of the classes. One that no installed font can draw is shown as its number.
        probabilities: The probabilities of the classes.

    Returns:
        The class names that are shown as numbers.

    Raises:
        OSError: If the picture cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend and keep figures alive

    names = [printable(name) for name in class_names]
    fonts, undrawable = find_fonts(set("".join(names)))
    numbered = [i for i, name in enumerate(names) if undrawable.intersection(name)]
    names = [f"class {classes[i]}" if i in numbered else name for i, name in enumerate(names)]
    figure = Figure(figsize=(2.6 * (1 + len(heats)), 3.2), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(heats), squeeze=False)[0]
    first.imshow(photograph)
    grey = photograph.mean(2, keepdims=True).repeat(3, axis=2)
    for axes, heat, name, probability in zip(others, heats, names, probabilities, strict=True):
        axes.imshow(0.3 + 0.7 * grey)
        axes.imshow(heat, "inferno", vmin=0, vmax=1, alpha=0.8 * heat)
        axes.set_title(f"{name}\n{probability:.1%}", fontsize=10, parse_math=False, fontfamily=fonts)
    for axes in (first, *others):
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())
    return [class_names[i] for i in numbered]


def draw_grid(path: Path, images: Float[np.ndarray, "n h w 3"]) -> None:
    """Draw images of one size in rows, from left to right, in a grid that is about as high as wide.

    Args:
        path: The PNG file to write.
        images: RGB in [0, 1].

    Raises:
        OSError: If the picture cannot be written.
    """
    count, height, width, _ = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid.paste(to_picture(image), (column * (width + _GAP), row * (height + _GAP)))
    write_picture(path, grid)


def to_picture(image: Float[np.ndarray, "h w 3"]) -> Image.Image:
    """Return RGB in [0, 1] as a Pillow image of 8 bits."""
    return Image.fromarray(np.uint8(image * 255 + 0.5))


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, atomically.

    Raises:
        OSError: If the picture cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
