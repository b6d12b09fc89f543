"""3x3 convolutions with fewer products, by Winograd's algorithm F(m x m, 3x3): for CPUs.

Tiles of m x m results take (m + 2)^2 products instead of 9 m^2. For finite values it is the same function, and so are
its derivatives.

References:
    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", https://arxiv.org/abs/1509.09308
    Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks",
    https://arxiv.org/abs/1803.10986
    Alam et al., "Winograd Convolution for Deep Neural Networks: Efficient Point Selection",
    https://doi.org/10.1145/3524069
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax.typing import Dtype
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.ops.pooling import strided_slices

_Array = TypeVar("_Array", np.ndarray, jax.Array)

# Where the polynomials are evaluated that are multiplied, by m; infinity is one more. Those of m = 4 are c, -c, 1 / c
# and -1 / c (Alam et al.): Lavin and Gray's (0, 1, -1, 2, -2) round more.
_POINTS = {2: (0, 1, -1), 4: (0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5))}


class Transforms(NamedTuple):
    """The matrices that transform the rows, or the columns, of a tile."""

    input: Float[np.ndarray, "m+2 m+2"]
    kernel: Float[np.ndarray, "m+2 3"]
    output: Float[np.ndarray, "m m+2"]


@functools.cache
def transforms(m: int) -> Transforms:
    """The transforms of F(m, 3), for m of 2 or 4, by Toom and Cook's algorithm (Barabasz et al., section 2)."""
    points = np.array(_POINTS[m])
    others = [np.delete(points, i) for i in range(m + 1)]
    scales = np.array([np.prod(point - rest) for point, rest in zip(points, others, strict=True)])
    infinity = np.eye(m + 2)[-1:]
    return Transforms(
        input=np.stack([_coefficients(roots, m + 2) for roots in (*others, points)]),
        kernel=np.concatenate([np.vander(points, 3, increasing=True) / scales[:, None], infinity[:, -3:]]),
        output=np.concatenate([np.vander(points, m, increasing=True), infinity[:, -m:]]).T,
    )


def _coefficients(roots: np.ndarray, length: int) -> np.ndarray:
    """The coefficients of the polynomial with these roots, from the constant one up."""
    ascending = np.poly(roots)[::-1]
    ascending[np.abs(ascending) < 1e-12] = 0  # where roots cancel: _transform leaves out what is exactly zero
    return np.pad(ascending, (0, length - len(ascending)))


def is_precise(dtype: Dtype) -> bool:
    """Whether there are digits enough: the transforms would lose the few of bfloat16 and float16."""
    return jnp.finfo(dtype).bits >= 32


def transform_kernel(
    kernel: Float[_Array, "3 3 in out"], m: int, precision: lax.PrecisionLike = None
) -> Float[_Array, "m+2 m+2 in out"]:
    """A kernel for ``conv3x3`` by F(m x m, 3x3)."""
    matrix = transforms(m).kernel
    rows_and_columns: Any = np.kron(matrix, matrix).astype(kernel.dtype)
    product = np.matmul if isinstance(kernel, np.ndarray) else functools.partial(jnp.matmul, precision=precision)
    return product(rows_and_columns, kernel.reshape(9, -1)).reshape(m + 2, m + 2, *kernel.shape[2:])


def conv3x3(
    x: Float[Array, "n h w in"], kernel: Float[Array, "m+2 m+2 in out"], precision: lax.PrecisionLike = None
) -> Float[Array, "n h w out"]:
    """The 3x3 convolution of stride and padding 1 with a kernel of ``transform_kernel``.

    Each of the four transforms is a loop of its own, held apart by barriers: fused, they are computed many times over.
    """
    n, h, w, _ = x.shape
    m = kernel.shape[0] - 2
    rows, columns = -(-h // m), -(-w // m)
    matrices = transforms(m)

    x = jnp.pad(x, ((0, 0), (1, rows * m + 1 - h), (1, columns * m + 1 - w), (0, 0)))
    x = _transform(matrices.input, strided_slices(x, m + 2, m, axis=1), axis=0)
    x = _transform(matrices.input, strided_slices(x, m + 2, m, axis=3), axis=1)
    x = x.reshape(m + 2, m + 2, n * rows * columns, -1)  # einsum over all axes would go backwards at half the speed
    x = lax.optimization_barrier(jnp.einsum("ijtf,ijfg->ijtg", x, kernel, precision=precision))
    x = x.reshape(m + 2, m + 2, n, rows, columns, -1)
    x = _transform(matrices.output, list(x), axis=0)
    x = _transform(matrices.output, [x[:, i] for i in range(m + 2)], axis=1)
    x = x.transpose(2, 3, 0, 4, 1, 5).reshape(n, rows * m, columns, m, -1)
    return x.reshape(n, rows * m, columns * m, -1)[:, :h, :w]


def _transform(matrix: np.ndarray, slices: Sequence[jax.Array], axis: int) -> jax.Array:
    """``matrix @ slices``, stacked along ``axis``; zeros cost nothing."""

    def combine(row: np.ndarray) -> jax.Array:
        terms = [x if factor == 1 else float(factor) * x for factor, x in zip(row, slices, strict=True) if factor]
        return functools.reduce(operator.add, terms)

    return lax.optimization_barrier(jnp.stack([combine(row) for row in matrix], axis))


def convolution(
    x: Float[Array, "n h w in"],
    kernel: Float[Array, "kh kw in out"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    precision: lax.PrecisionLike = None,
    **options: Any,
) -> Float[Array, "n h2 w2 out"]:
    """``jax.lax.conv_general_dilated`` for layers in training, which may be neither dilated nor grouped.

    By Winograd's algorithm where that is faster, and precise: 3x3 with stride and padding 1, on features of 14x14 and
    64 channels at least, in float32 or float64, where JAX's default backend is a CPU. With its gradients it is 1.3 to
    2 times as fast there, a whole training step 1.2 times: medians in float32 on two cores with AVX-512 and jaxlib
    0.10.2.
    """
    is_3x3 = kernel.shape[:2] == (3, 3) and (*strides,) == (1, 1) and [*map(tuple, padding)] == [(1, 1), (1, 1)]
    is_large = min(x.shape[1:3]) >= 14 and x.shape[3] >= 64
    if is_3x3 and is_large and is_precise(x.dtype) and jax.default_backend() == "cpu":
        return conv3x3(x, transform_kernel(kernel, 4, precision), precision)
    return lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **options)
