"""3x3 convolutions on a CPU by Winograd's algorithm F(m x m, 3x3), which needs fewer multiplications.

A tile of m x m results takes (m + 2)^2 products instead of 9 m^2: 36 instead of 144 for m = 4. For finite values, the
results and all derivatives equal those of the direct convolution, up to rounding.

References:
    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", https://arxiv.org/abs/1509.09308
    Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks",
    https://arxiv.org/abs/1803.10986
    Alam et al., "Winograd Convolution for Deep Neural Networks: Efficient Point Selection",
    https://doi.org/10.1145/3524069
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax.typing import Dtype
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.ops import platforms
from flax_googlenet.ops.pooling import strided_slices

_Array = TypeVar("_Array", np.ndarray, jax.Array)

# Interpolation points for F(m, 3), besides the point at infinity. For m = 4 they are 0, c, -c, 1 / c and -1 / c with
# c = 1 / sqrt(2) (Alam et al.). Lavin and Gray's points 0, 1, -1, 2 and -2 have 2.6 to 5 times the error in float32.
_POINTS = {2: (0, 1, -1), 4: (0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5))}


class Transforms(NamedTuple):
    """The matrices of F(m, 3), which computes m results of a one-dimensional convolution with a kernel of 3.

    The results are ``output @ ((kernel @ k) * (input @ x))`` for a kernel ``k`` [3] and inputs ``x`` [m + 2]. A tile is
    transformed along its rows and then along its columns. Lavin and Gray call the matrices B^T, G and A^T.
    """

    input: Float[np.ndarray, "tile tile"]
    kernel: Float[np.ndarray, "tile 3"]
    output: Float[np.ndarray, "m tile"]


@functools.cache
def transforms(m: int) -> Transforms:
    """Return the matrices of F(m, 3), for m = 2 or m = 4, by Toom and Cook's algorithm (Barabasz et al., section 2).

    The algorithm evaluates two polynomials, of degree m - 1 and 2, at m + 2 points, multiplies the values, and
    interpolates the product. The last row or column of a matrix belongs to the point at infinity, where the value of a
    polynomial is its leading coefficient.
    """
    points = np.array(_POINTS[m])  # [m + 1]
    others = [np.delete(points, i) for i in range(m + 1)]  # for each point, all points but itself
    scales = np.array([np.prod(point - rest) for point, rest in zip(points, others, strict=True)])  # [m + 1]
    infinity = np.eye(m + 2)[-1:]  # [1, m + 2]
    return Transforms(
        input=np.stack([_coefficients(roots, m + 2) for roots in (*others, points)]),
        kernel=np.concatenate([np.vander(points, 3, increasing=True) / scales[:, None], infinity[:, -3:]]),
        output=np.concatenate([np.vander(points, m, increasing=True), infinity[:, -m:]]).T,
    )


def _coefficients(roots: np.ndarray, length: int) -> np.ndarray:
    """Return the coefficients of the monic polynomial with these roots, the constant first, padded with zeros."""
    ascending = np.poly(roots)[::-1]
    # Roots of opposite sign cancel up to rounding. An exact zero saves a multiplication in _transform.
    ascending[np.abs(ascending) < 1e-12] = 0
    return np.pad(ascending, (0, length - len(ascending)))


def is_precise(dtype: Dtype) -> bool:
    """Return whether ``dtype`` has enough digits for the transforms, which bfloat16 and float16 do not."""
    return jnp.finfo(dtype).bits >= 32


def transform_kernel(
    kernel: Float[_Array, "3 3 in out"], m: int, precision: lax.PrecisionLike = None
) -> Float[_Array, "{m}+2 {m}+2 in out"]:
    """Return the kernel that ``conv3x3`` takes, for tiles of m x m results.

    Args:
        kernel: The kernel of a 3x3 convolution. A NumPy array is transformed by NumPy, in float64 if it is float64,
            whether JAX has 64 bits enabled or not.
        m: 2 or 4.
        precision: As for ``jax.lax.conv_general_dilated``; it has no effect on NumPy arrays.
    """
    matrix = transforms(m).kernel
    rows_and_columns: Any = np.kron(matrix, matrix).astype(kernel.dtype)  # [(m + 2)^2, 9]
    product = np.matmul if isinstance(kernel, np.ndarray) else functools.partial(jnp.matmul, precision=precision)
    return product(rows_and_columns, kernel.reshape(9, -1)).reshape(m + 2, m + 2, *kernel.shape[2:])


def conv3x3(
    x: Float[Array, "n h w in"], kernel: Float[Array, "tile tile in out"], precision: lax.PrecisionLike = None
) -> Float[Array, "n h w out"]:
    """Convolve ``x`` with a 3x3 kernel that ``transform_kernel`` has transformed, with stride 1 and padding 1.

    Tiles of (m + 2) x (m + 2) inputs, which overlap by 2, give tiles of m x m results that do not overlap.
    """
    n, h, w, _ = x.shape
    m = kernel.shape[0] - 2
    rows, columns = -(-h // m), -(-w // m)  # of tiles
    matrices = transforms(m)

    padding = (0, 0, 0), (1, rows * m + 1 - h, 0), (1, columns * m + 1 - w, 0), (0, 0, 0)
    x = lax.pad(x, np.zeros((), x.dtype), padding)
    x = _transform(matrices.input, strided_slices(x, m + 2, m, axis=1), axis=0)  # [m+2, n, rows, columns*m + 2, in]
    x = _transform(matrices.input, strided_slices(x, m + 2, m, axis=3), axis=1)  # [m+2, m+2, n, rows, columns, in]
    # The tiles are one axis for einsum: over three axes, its gradient takes twice as long.
    x = x.reshape(m + 2, m + 2, n * rows * columns, -1)
    x = jnp.einsum("ijtf,ijfg->ijtg", x, kernel, precision=precision)  # [m+2, m+2, n*rows*columns, out]
    x = lax.optimization_barrier(x).reshape(m + 2, m + 2, n, rows, columns, -1)
    x = _transform(matrices.output, list(x), axis=0)  # [m, m+2, n, rows, columns, out]
    x = _transform(matrices.output, [x[:, i] for i in range(m + 2)], axis=1)  # [m, m, n, rows, columns, out]
    x = x.transpose(2, 3, 0, 4, 1, 5)  # [n, rows, m, columns, m, out]
    # One pair of axes at a time: JAX cannot merge two pairs at once in explicitly sharded arrays.
    x = x.reshape(n, rows * m, columns, m, -1)
    return x.reshape(n, rows * m, columns * m, -1)[:, :h, :w]  # [n, h, w, out]


def _transform(matrix: np.ndarray, slices: Sequence[jax.Array], axis: int) -> jax.Array:
    """Return the products of ``matrix`` [a, b] with ``slices``, b arrays of one shape, stacked along ``axis``.

    Each product is a weighted sum of the slices, without the terms whose weight is zero. The compiler turns the sum
    into one vectorised loop. Without the barrier, it would fuse that loop with the one that reads the products, and
    compute a product anew for every value that is read. The operations are those of ``lax``, because they do not check
    and convert ranks and dtypes as those of ``jnp`` do: the network for inference is traced in two thirds of the time.
    """

    def scale(factor: np.floating, x: jax.Array) -> jax.Array:
        return x if factor == 1 else lax.neg(x) if factor == -1 else lax.mul(x, factor)

    def combine(row: np.ndarray) -> jax.Array:
        return functools.reduce(lax.add, [scale(factor, x) for factor, x in zip(row, slices, strict=True) if factor])

    return lax.optimization_barrier(jnp.stack([combine(row) for row in matrix.astype(slices[0].dtype)], axis))


def convolution(
    x: Float[Array, "n h w in"],
    kernel: Float[Array, "kh kw in out"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    precision: lax.PrecisionLike = None,
    **options: Any,
) -> Float[Array, "n h2 w2 out"]:
    """Compute a convolution in training, in place of ``jax.lax.conv_general_dilated``, without dilation and groups.

    It uses Winograd's algorithm with m = 4 where that is faster and precise: the program is for a CPU, the kernel is
    3x3 with stride and padding 1, the input has at least 14x14 pixels and 64 channels, and the dtype is float32 or
    float64. There a convolution with its gradients is 1.3 to 2 times as fast, and a whole training step 1.2 times
    (medians in float32 on two cores with AVX-512, jaxlib 0.10.2). Elsewhere on a CPU, the gradient with respect to
    ``x`` is as fast inside a loop, such as ``jax.lax.scan``, as outside.

    Args:
        x: The input, NHWC.
        kernel: The kernel, HWIO.
        strides: The strides along height and width.
        padding: The padding before and after, along height and width, or "SAME".
        precision: As for ``jax.lax.conv_general_dilated``.
        **options: Further arguments of ``jax.lax.conv_general_dilated``, which Flax passes.
    """
    is_3x3 = kernel.shape[:2] == (3, 3) and (*strides,) == (1, 1) and [*map(tuple, padding)] == [(1, 1), (1, 1)]
    is_large = min(x.shape[1:3]) >= 14 and x.shape[3] >= 64

    def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **options)

    if not (is_3x3 and is_large and is_precise(x.dtype)):
        for_loops = functools.partial(_for_loops, strides=strides, padding=padding, precision=precision)
        return platforms.choose(platforms.GRADIENT_FOR_LOOPS, for_loops, direct, x, kernel)
    by_winograd = functools.partial(_by_winograd, precision=precision)
    return platforms.choose(platforms.WINOGRAD, by_winograd, direct, x, kernel)


def _for_loops(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, precision: lax.PrecisionLike
) -> jax.Array:
    """Compute a convolution directly, with a gradient with respect to ``x`` that is fast inside a loop, too.

    The library that computes convolutions on a CPU takes kernels HWIO. JAX's gradient has a kernel HWOI, which XLA
    transposes, but not inside a loop (https://github.com/jax-ml/jax/issues/12868). Here the tangent map has a kernel
    HWOI, so that the gradient, which is its transpose, has a kernel HWIO.
    """

    def convolve(x: jax.Array, kernel: jax.Array, layout: str = "HWIO") -> jax.Array:
        layouts = "NHWC", layout, "NHWC"
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layouts, precision=precision)

    @jax.custom_jvp
    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(x, kernel)

    @convolution.defjvp
    def jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
        from_x = convolve(x_tangent, kernel.swapaxes(2, 3), "HWOI")  # [n, h2, w2, out]
        return convolution(x, kernel), from_x + convolve(x, kernel_tangent)

    return convolution(x, kernel)


@functools.partial(jax.jit, static_argnames="precision")
def _by_winograd(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    return conv3x3(x, transform_kernel(kernel, 4, precision), precision)
