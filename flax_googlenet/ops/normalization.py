"""Local response normalisation, as Caffe and TensorFlow compute it."""

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def local_response_norm(
    x: Float[Array, "*batch c"], radius: int = 2, k: float = 1.0, alpha: float = 1e-4 / 5, beta: float = 0.75
) -> Float[Array, "*batch c"]:
    """Divide each value by a measure of the values of its pixel in the channels around it, as AlexNet does.

    The result is ``x / (k + alpha * sum(x ** 2 over the channels)) ** beta``, where channels outside of ``x`` count as
    zeros. By default it is that of Caffe and ``torch.nn.LocalResponseNorm(5)``, which divide their alpha by the number
    of channels; ``tf.nn.local_response_normalization`` does not. Computed in float32 at least.

    Args:
        x: The input, with the channels last.
        radius: Number of channels on each side of a channel.
        k: What is added to the sum.
        alpha: Weight of each square.
        beta: 0.5 or 0.75.

    Reference: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", section 3.3
    """
    dtype = x.dtype
    x = x.astype(np.promote_types(dtype, np.float32))
    # A sum over windows, because differences of cumulative sums lose digits. A sum of shifted slices takes half the
    # time, and its gradient 4 to 20 times as long (on a CPU, for [8, 56, 56, 192] and [8, 56, 56, 64]).
    ones = (1,) * (x.ndim - 1)
    padding = ((0, 0),) * (x.ndim - 1) + ((radius, radius),)
    zero = np.zeros((), x.dtype)
    sums: jax.Array = lax.reduce_window(lax.square(x), zero, lax.add, (*ones, 2 * radius + 1), (*ones, 1), padding)
    # The power -0.75 as two square roots: 8 to 12 times as fast as a power, and 1.5 to 8 times with the gradient.
    root = lax.rsqrt(k + alpha * sums)
    return (x * (root * lax.sqrt(root) if beta == 0.75 else root)).astype(dtype)
