"""DeepDream: a picture changed so that a stage sees more of what it sees in it.

Reference: Mordvintsev et al., "Inceptionism: Going Deeper into Neural Networks", Google Research Blog, 2015
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.architecture import NETWORKS, stage_name
from flax_googlenet.images.preprocessing import ImageError, ImageSource, rgb
from flax_googlenet.inference.compiling import jit
from flax_googlenet.model import GoogLeNet, Variables, endpoints
from flax_googlenet.visualization.features import convolve_as_in_training, normalise

OCTAVE_SCALE = 1.4
"""Ratio of two successive sizes, unless the caller names another one."""


def deep_dream(
    model: GoogLeNet,
    variables: Variables,
    image: ImageSource,
    stage: str = "inception4c",
    *,
    octaves: int = 4,
    octave_scale: float = OCTAVE_SCALE,
    steps: int = 10,
    step_size: float = 0.006,
    tile: int = 400,
    key: jax.Array | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Float[Array, "h w 3"]:
    """Return the picture after steps that make the mean square of a stage's features larger.

    The picture is changed first in a small size and then in larger ones, the octaves. Each step adds the gradient,
    divided by its mean absolute value. It is computed tile by tile, so that the memory does not grow with the picture,
    after a random shift, so that the edges of the tiles do not show.

    Args:
        model: The network.
        variables: Its variables.
        image: The path of a file, a Pillow image, or a uint8 RGB array [H, W, 3], as for ``preprocess``. It
            keeps its size.
        stage: The stage, by any name that ``endpoints`` takes.
        octaves: Number of sizes, at least 1. Those that are too small for the network are left out.
        octave_scale: Ratio of two successive sizes.
        steps: Number of steps in each octave.
        step_size: Mean change of a pixel in a step, as a share of the range from black to white.
        tile: Largest height and width of a tile in pixels.
        key: Key of the shifts, by default ``jax.random.key(0)``. The same key gives the same picture.
        on_step: Called after each step, with the number of steps that are done, for a display of progress.

    Returns:
        RGB in [0, 1], of the size of the picture.

    Raises:
        ImageError: If the image cannot be read, or is smaller than the network takes.
        ValueError: If ``stage`` names no stage, if ``octaves`` is less than 1, or if ``tile`` is less than twice the
            smallest size of an image.
    """
    stage = stage_name(stage, model.variant)
    if octaves < 1:
        raise ValueError(f"octaves must be at least 1, got {octaves}")
    key = jax.random.key(0) if key is None else key
    original = np.asarray(rgb(image), np.float32) / np.float32(255)
    smallest = NETWORKS[model.variant].min_size
    if min(original.shape[:2]) < smallest:
        raise ImageError(
            f"a picture of {original.shape[0]}x{original.shape[1]} pixels is too small: the network takes "
            f"{smallest}x{smallest} and more: enlarge it"
        )
    if tile < 2 * smallest:  # tiles of equal size can be half as large
        raise ValueError(f"tile must be at least {2 * smallest}, got {tile}")
    step = _step(model, stage, tile)
    done, detail = 0, jnp.zeros((1, 1, 3), jnp.float32)
    height, width, _ = original.shape
    for size in octave_sizes(model, height, width, octaves, octave_scale):
        base = jax.image.resize(original, (*size, 3), "linear")
        picture = base + jax.image.resize(detail, base.shape, "linear")
        for _ in range(steps):
            picture = step(variables, picture, jax.random.fold_in(key, done), step_size)
            done += 1
            if on_step:
                on_step(done)
        detail = picture - base
    return picture


def octave_sizes(
    model: GoogLeNet, height: int, width: int, octaves: int, octave_scale: float = OCTAVE_SCALE
) -> list[tuple[int, int]]:
    """Return the heights and widths of a dream, the smallest first. Those too small for the network are left out."""
    sizes: list[tuple[int, int]] = []
    for octave in range(octaves):
        size = round(height / octave_scale**octave), round(width / octave_scale**octave)
        if min(size) < NETWORKS[model.variant].min_size:
            break
        sizes.append(size)
    return sizes[::-1]


@functools.lru_cache(maxsize=8)
def _step(
    model: GoogLeNet, stage: str, tile: int
) -> Callable[[Variables, jax.Array, jax.Array, float | jax.Array], jax.Array]:
    def step(variables: Variables, picture: jax.Array, key: jax.Array, step_size: float | jax.Array) -> jax.Array:
        def objective(part: jax.Array) -> jax.Array:
            with nn.intercept_methods(convolve_as_in_training):
                features = endpoints(model, variables, normalise(part[None]), branches=True)[stage]
            return jnp.square(features.astype(jnp.float32)).mean()

        height, width, _ = picture.shape
        rows, columns = -(-height // tile), -(-width // tile)
        tile_height, tile_width = -(-height // rows), -(-width // columns)
        shift = jax.random.randint(key, (2,), 0, max(height, width))
        shifted = jnp.roll(picture, shift, (0, 1))
        margins = (0, rows * tile_height - height), (0, columns * tile_width - width), (0, 0)
        tiles = jnp.pad(shifted, margins, mode="wrap").reshape(rows, tile_height, columns, tile_width, 3)
        tiles = tiles.swapaxes(1, 2).reshape(rows * columns, tile_height, tile_width, 3)
        gradient = jax.lax.map(jax.grad(objective), tiles)  # one after the other: the memory is that of one tile
        gradient = gradient.reshape(rows, columns, tile_height, tile_width, 3).swapaxes(1, 2)
        gradient = gradient.reshape(rows * tile_height, columns * tile_width, 3)[:height, :width]
        gradient = jnp.roll(gradient, -shift, (0, 1))
        change = gradient / jnp.maximum(jnp.abs(gradient).mean(), jnp.finfo(jnp.float32).tiny)
        return jnp.clip(picture + step_size * change, 0, 1)

    return jit(step)
