"""Pooling with the geometry of PyTorch and TensorFlow, as pure functions of NHWC arrays."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.architecture import PoolPadding
from flax_googlenet.ops import platforms

Size = Any  # an int, or a symbolic dimension in an export for images of any size


def max_pool(
    x: Float[Array, "n h w c"], window: int, stride: int, padding: PoolPadding = 0
) -> Float[Array, "n h2 w2 c"]:
    """Compute max pooling as ``torch.nn.MaxPool2d`` does with ``ceil_mode=True``, or as ``tf.nn.max_pool2d`` does.

    The output length is ``ceil((size + 2 * padding - window) / stride) + 1``, less one if the last window would start
    in the padding on the right. With TensorFlow's padding "SAME" it is ``ceil(size / stride)``, and with "VALID"
    ``floor((size - window) / stride) + 1``. Padding counts as minus infinity and never wins. The gradient of a tie goes
    to its first pixel in row-major order, as in PyTorch.

    Args:
        x: The input, NHWC.
        window: Height and width of a window, in pixels.
        stride: Step between windows, in pixels.
        padding: Pixels added on each side, at most half a window; or "SAME", which adds as few as possible, half of
            them on each side and an odd one at the end; or "VALID", which adds none. "SAME" needs a stride of at most
            ``window``.

    Raises:
        ValueError: If the padding is more than half a window, or the input too small for one window. PyTorch refuses
            both, too.

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html
    """
    if isinstance(padding, int) and not 0 <= 2 * padding <= window:
        raise ValueError(f"padding must be between 0 and half the window, got padding {padding} and window {window}")
    rows, columns = (max_pool_padding(size, window, stride, padding) for size in x.shape[1:3])
    return _max_pool(x, window, stride, (rows, columns))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: jax.Array, window: int, stride: int, pads: Sequence[tuple[Size, Size]]) -> jax.Array:
    return nn.max_pool(x, (window, window), (stride, stride), pads)


@_max_pool.defjvp
def _max_pool_jvp(
    window: int, stride: int, pads: Sequence[tuple[Size, Size]], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Differentiate the pool in the way that the platform computes fast.

    The rule is a JVP, from which JAX derives all modes.
    """
    geometry = {"window": window, "stride": stride, "pads": pads}
    by_xla, by_masks = (functools.partial(way, **geometry) for way in (_jvp_by_xla, _jvp_by_masks))
    return platforms.choose(platforms.XLA_POOL_GRADIENT, by_xla, by_masks, *primals, *tangents)


@functools.partial(jax.jit, static_argnames=("window", "stride", "pads"))
def _jvp_by_xla(
    x: jax.Array, tangent: jax.Array, window: int, stride: int, pads: Sequence[tuple[Size, Size]]
) -> tuple[jax.Array, jax.Array]:
    """Return the pool of ``x`` and its tangent, whose transpose is XLA's ``SelectAndScatter``.

    XLA gives the gradient of a tie to the first pixel, but takes no account of NaN. So it gets other values, which have
    the same order: each NaN becomes a number that is larger than all others, and the larger the later it comes. These
    values are float32 even for a pool of bfloat16, which is no slower: a TPU computes in float32.
    """
    dtype = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    largest, eps = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).eps)
    place = lax.iota(dtype, x.shape[1] * x.shape[2]).reshape(1, *x.shape[1:3], 1)  # [1, h, w, 1]
    halved = jnp.minimum(x.astype(dtype) / 2, 0.6 * largest)  # infinity becomes less than any NaN
    ordered = jnp.where(jnp.isnan(x), 0.7 * largest * (1 + place * eps), halved)  # [n, h, w, c]

    def pool(x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (window, window), (stride, stride), pads)

    _, output_tangent = jax.jvp(pool, (ordered,), (tangent.astype(dtype),))
    return pool(x), output_tangent.astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("window", "stride", "pads"))
def _jvp_by_masks(
    x: jax.Array, tangent: jax.Array, window: int, stride: int, pads: Sequence[tuple[Size, Size]]
) -> tuple[jax.Array, jax.Array]:
    """Return the pool of ``x`` and its tangent, with code that a CPU vectorises.

    The tangent map is written as the transpose of ``pull_back``, because reverse mode is what training uses:
    ``jax.grad`` transposes the map again and gets ``pull_back`` itself.
    """
    best, winner = _argmax(x, window, stride, pads)  # [n, rows, columns, c]

    def pull_back(output_gradient: jax.Array) -> jax.Array:
        return _input_gradient(output_gradient, winner, window, stride, pads, x.shape[1:3])

    (output_tangent,) = jax.linear_transpose(pull_back, best)(tangent)  # [n, rows, columns, c]
    return best, output_tangent


def _argmax(x: jax.Array, window: int, stride: int, pads: Sequence[tuple[Size, Size]]) -> tuple[jax.Array, jax.Array]:
    """Return the maximum of each window and its index in the window, in row-major order.

    Of equal values the first wins. NaN wins over all values, and the last of several NaNs wins, as in PyTorch.
    """
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    best, winner = jnp.full((), -jnp.inf, x.dtype), jnp.zeros((), jnp.int16)
    rows = strided_slices(x, window, stride, axis=1)  # window x [n, rows, padded width, c]
    pixels = [pixel for row in rows for pixel in strided_slices(row, window, stride, axis=2)]  # [n, rows, columns, c]
    for i, pixel in enumerate(pixels):
        wins = (pixel > best) | jnp.isnan(pixel)
        best, winner = jnp.where(wins, pixel, best), jnp.where(wins, jnp.int16(i), winner)
    return best, winner


def _input_gradient(
    output_gradient: jax.Array,
    winner: jax.Array,
    window: int,
    stride: int,
    pads: Sequence[tuple[Size, Size]],
    size: Sequence[Size],
) -> jax.Array:
    """Return the gradient of the input: for each pixel, the sum over the windows in which it is the maximum.

    Scattering each window's gradient to its winner does not vectorise on a CPU. Instead, each pixel gathers from the
    windows that contain it. The padded input is cut into cells of stride x stride pixels, one for each window, which
    starts in the corner of its cell. All pixels at the place (i, j) of their cells lie alike in the windows of this
    cell and of those before it. So their gradients are a sum of shifted slices of the output's gradient, each masked
    by where the pixel won.

    Args:
        output_gradient: [n, rows, columns, c], one value for each window.
        winner: int16 [n, rows, columns, c], the index of each window's maximum.
        window: Height and width of a window.
        stride: Step between windows.
        pads: Padding of the input before and after, along height and width.
        size: Height and width of the input.
    """
    n, rows, columns, c = output_gradient.shape
    extra = (window - 1) // stride  # a pixel lies in the windows of its own cell and of at most this many before it
    margin = ((0, 0), (extra, extra), (extra, extra), (0, 0))
    output_gradient = jnp.pad(output_gradient, margin)  # [n, rows + 2 extra, columns + 2 extra, c]
    winner = jnp.pad(winner, margin, constant_values=-1)

    def gradient_at(i: int, j: int) -> jax.Array:
        total = jnp.zeros((n, rows + extra, columns + extra, c), output_gradient.dtype)
        # The pixel (i, j) of a cell is the pixel (a, b) of the window that starts a // stride and b // stride cells
        # before it.
        for a, b in itertools.product(range(i, window, stride), range(j, window, stride)):
            up, left = extra - a // stride, extra - b // stride
            windows = (slice(None), slice(up, up + rows + extra), slice(left, left + columns + extra))
            total += jnp.where(winner[windows] == a * window + b, output_gradient[windows], 0)
        return total

    # [n, rows + extra, stride, columns + extra, stride, c]
    cells = jnp.stack([jnp.stack([gradient_at(i, j) for j in range(stride)], 3) for i in range(stride)], 2)
    # One pair of axes at a time: JAX cannot merge two pairs at once in explicitly sharded arrays.
    padded = cells.reshape(n, (rows + extra) * stride, columns + extra, stride, c)
    padded = padded.reshape(n, (rows + extra) * stride, (columns + extra) * stride, c)
    (top, _), (left, _) = pads
    # With a stride larger than the window, the input can go on after the last cell. Those pixels are in no window.
    below, right = max(0, top + size[0] - padded.shape[1]), max(0, left + size[1] - padded.shape[2])
    padded = jnp.pad(padded, ((0, 0), (0, below), (0, right), (0, 0)))
    return padded[:, top : top + size[0], left : left + size[1]]  # [n, h, w, c]


def per_channel(
    values: Float[Array | np.ndarray, " c"], x: Float[Array | np.ndarray, "*batch c"]
) -> Float[Array, "*ones c"]:
    """Return ``values`` with the rank of ``x``, for users who set ``jax_numpy_rank_promotion`` to "raise"."""
    return lax.expand_dims(values, range(x.ndim - 1))


def strided_slices(x: jax.Array, window: int, stride: int, axis: int) -> list[jax.Array]:
    """Return, for each place in a window, the values that all windows along ``axis`` have at that place."""
    last = (x.shape[axis] - window) // stride * stride  # where the last window starts
    return [lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(window)]


def max_pool_padding(size: Size, window: int, stride: int, padding: PoolPadding) -> tuple[Size, Size]:
    """Return the padding before and after ``size`` pixels with which a plain pool gives the results of ``max_pool``.

    Raises:
        ValueError: If no window fits.
    """
    if padding == "SAME":
        return same_padding(size, window, stride)
    if padding == "VALID":
        length = (size - window) // stride + 1
    else:
        length = -((window - size - 2 * padding) // stride) + 1
        if (length - 1) * stride >= size + padding:  # the last window would start in the padding: PyTorch drops it
            length -= 1
    if length < 1:
        raise ValueError(
            f"{size} pixels are too few for a max pool of window {window}, stride {stride} and padding {padding}"
        )
    if padding == "VALID":
        return 0, 0
    after = (length - 1) * stride + window - size - padding
    # With a stride larger than the window, the last window can end before the input does: nothing to pad. Other pools
    # skip the comparison, which jax.export could not decide for images of symbolic size.
    return padding, max(0, after) if stride > window else after


def same_padding(size: Size, window: int, stride: int) -> tuple[Size, Size]:
    """Return the padding of TensorFlow's SAME before and after ``size`` pixels, for a stride of at most ``window``.

    Reference: https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """
    total = (-(-size // stride) - 1) * stride + window - size
    return total // 2, total - total // 2


def adaptive_avg_pool(x: Float[Array, "n h w c"], output_size: int) -> Float[Array, "n {output_size} {output_size} c"]:
    """Average to a fixed size, as ``torch.nn.AdaptiveAvgPool2d`` does.

    Output ``i`` of ``o`` averages the input from ``floor(i * size / o)`` up to ``ceil((i + 1) * size / o)``. Windows
    overlap if ``o`` does not divide ``size``: from 14 to 4, windows of 4 pixels start at 0, 3, 7 and 10.

    Args:
        x: The input, NHWC, of any size from 1 up; it may be smaller than the output.
        output_size: Height and width of the output, in pixels.

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html
    """
    for axis in (1, 2):
        size = x.shape[axis]
        x = _means(x, [(i * size // output_size, -(-(i + 1) * size // output_size)) for i in range(output_size)], axis)
    return x


def avg_pool(x: Float[Array, "n h w c"], window: int, stride: int) -> Float[Array, "n h2 w2 c"]:
    """Average as Caffe does, and ``torch.nn.AvgPool2d`` with ``ceil_mode=True``: windows at the end may be cut off.

    Args:
        x: The input, NHWC, at least as large as a window.
        window: Height and width of a window, in pixels.
        stride: Step between windows, at most ``window``.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        starts = range(0, size - window + stride, stride)
        x = _means(x, [(start, min(start + window, size)) for start in starts], axis)
    return x


def _means(x: jax.Array, windows: Sequence[tuple[int, int]], axis: int) -> jax.Array:
    """Return the mean of each window along ``axis``. The mean of a rectangle is the mean of the means of its rows."""
    means = [lax.slice_in_dim(x, start, stop, axis=axis).mean(axis, keepdims=True) for start, stop in windows]
    return jnp.concatenate(means, axis)
