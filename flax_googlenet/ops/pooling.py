"""Pooling with PyTorch's geometry, as pure functions on NHWC arrays."""

import functools
import itertools
from collections.abc import Sequence

import jax
from flax import linen as nn
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float


def max_pool(x: Float[Array, "n h w c"], window: int, stride: int, padding: int = 0) -> Float[Array, "n h2 w2 c"]:
    """Max pooling with ``ceil_mode=True``, equal to ``torch.nn.MaxPool2d``.

    The output length is ``ceil((size + 2 * padding - window) / stride) + 1``, less one where the last window would
    start in the padding on the right. Padded places never win: they count as minus infinity. The gradient of a tie goes
    to its first pixel, row by row, as PyTorch's does.

    Args:
        x: the input, NHWC.
        window: height and width of a window, in pixels.
        stride: step between windows, in pixels.
        padding: pixels added on each side, at most half a window.

    Raises:
        ValueError: where PyTorch raises, too: a padding above half a window, or an input too small for one window.

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html
    """
    if not 0 <= 2 * padding <= window:
        raise ValueError(f"padding must be between 0 and half the window, got padding {padding} and window {window}")
    rows, columns = (ceil_mode_padding(size, window, stride, padding) for size in x.shape[1:3])
    return _max_pool(x, window, stride, (rows, columns))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: jax.Array, window: int, stride: int, pads: Sequence[tuple[int, int]]) -> jax.Array:
    return nn.max_pool(x, (window, window), (stride, stride), pads)


@_max_pool.defjvp
def _max_pool_jvp(
    window: int, stride: int, pads: Sequence[tuple[int, int]], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """XLA's own gradient is a loop over single values on a CPU: there this one is 5 to 30 times faster."""
    (x,), (tangent,) = primals, tangents
    best, place = _argmax(x, window, stride, pads)

    def gradient(of_output: jax.Array) -> jax.Array:
        return _to_winners(of_output, place, window, stride, pads, x.shape[1:3])

    # Backwards is what counts: written that way round, transposed here, and transposed back by jax.grad.
    (of_output,) = jax.linear_transpose(gradient, best)(tangent)
    return best, of_output


def _argmax(x: jax.Array, window: int, stride: int, pads: Sequence[tuple[int, int]]) -> tuple[jax.Array, jax.Array]:
    """The maximum of each window and its place there: of a tie the first, row by row; the last NaN, as in PyTorch."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    best, place = jnp.full((), -jnp.inf, x.dtype), jnp.zeros((), jnp.int16)
    rows = strided_slices(x, window, stride, axis=1)
    pixels = [pixel for row in rows for pixel in strided_slices(row, window, stride, axis=2)]
    for i, pixel in enumerate(pixels):
        wins = (pixel > best) | jnp.isnan(pixel)
        best, place = jnp.where(wins, pixel, best), jnp.where(wins, jnp.int16(i), place)
    return best, place


def _to_winners(
    of_output: jax.Array,
    place: jax.Array,
    window: int,
    stride: int,
    pads: Sequence[tuple[int, int]],
    size: Sequence[int],
) -> jax.Array:
    """The gradient of the input: each pixel takes that of the windows in which it is the maximum.

    Pixels a stride apart lie alike in their windows. So the padded input is a grid of cells of stride x stride pixels,
    and for each pixel of a cell the sum over its windows is one of shifted slices, which the compiler vectorises.
    """
    n, rows, columns, c = of_output.shape
    reach = -(-window // stride) - 1  # how many windows before its own cell's contain a pixel, along each axis
    ring = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    of_output, place = jnp.pad(of_output, ring), jnp.pad(place, ring, constant_values=-1)

    def pixel(i: int, j: int) -> jax.Array:
        total = jnp.zeros((n, rows + reach, columns + reach, c), of_output.dtype)
        for a, b in itertools.product(range(i, window, stride), range(j, window, stride)):
            up, left = reach - a // stride, reach - b // stride
            windows = (slice(None), slice(up, up + rows + reach), slice(left, left + columns + reach))
            total += jnp.where(place[windows] == a * window + b, of_output[windows], 0)
        return total

    cells = jnp.stack([jnp.stack([pixel(i, j) for j in range(stride)], 3) for i in range(stride)], 2)
    # One axis at a time: for arrays that are explicitly sharded, JAX knows no other way.
    whole = cells.reshape(n, (rows + reach) * stride, columns + reach, stride, c)
    whole = whole.reshape(n, (rows + reach) * stride, (columns + reach) * stride, c)
    (top, _), (left, _) = pads
    missing = [
        max(0, before + length - there)
        for before, length, there in zip((top, left), size, whole.shape[1:3], strict=True)
    ]
    whole = jnp.pad(whole, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))  # pixels between the windows
    return whole[:, top : top + size[0], left : left + size[1]]


def per_channel(values: Float[Array, " c"], x: Float[Array, "*batch c"]) -> Float[Array, "*ones c"]:
    """Return ``values`` with the rank of ``x``, for users who set ``jax_numpy_rank_promotion`` to "raise"."""
    return lax.expand_dims(values, range(x.ndim - 1))


def strided_slices(x: jax.Array, window: int, stride: int, axis: int) -> list[jax.Array]:
    """By place in the window: what all windows along ``axis`` have there."""
    last = (x.shape[axis] - window) // stride * stride
    return [lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(window)]


def ceil_mode_padding(size: int, window: int, stride: int, padding: int) -> tuple[int, int]:
    length = -((window - size - 2 * padding) // stride) + 1
    if (length - 1) * stride >= size + padding:  # the last window would see only padding: torch drops it
        length -= 1
    if length < 1:
        raise ValueError(
            f"{size} pixels are too few for a max pool of window {window}, stride {stride} and padding {padding}"
        )
    beyond = (length - 1) * stride + window - size - padding
    # A stride beyond the window can end the last window before the input does: nothing to pad then. Asked only there:
    # of a symbolic size, while exporting, the answer is unknown.
    return padding, max(0, beyond) if stride > window else beyond


def adaptive_avg_pool(x: Float[Array, "n h w c"], output_size: int) -> Float[Array, "n {output_size} {output_size} c"]:
    """Average pooling to a fixed size, equal to ``torch.nn.AdaptiveAvgPool2d``.

    Output ``i`` of ``o`` averages the input from ``floor(i * size / o)`` up to ``ceil((i + 1) * size / o)``, so windows
    overlap where ``o`` does not divide ``size``: 14 -> 4 takes windows of 4 that start at 0, 3, 7 and 10.

    Args:
        x: the input, NHWC, of any size from 1 up, smaller than the output included.
        output_size: height and width of the output, in pixels.

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html
    """
    for axis in (1, 2):  # the windows are rectangles, so the two axes can be averaged one after the other
        size = x.shape[axis]
        windows = [
            lax.slice_in_dim(x, i * size // output_size, -(-(i + 1) * size // output_size), axis=axis)
            for i in range(output_size)
        ]
        x = jnp.concatenate([window.mean(axis, keepdims=True) for window in windows], axis)
    return x
