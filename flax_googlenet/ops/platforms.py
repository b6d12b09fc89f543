"""Which platforms compute an operation in which way.

Some ways to compute the same function are fast on one platform and slow on another. The choice is by the platform that
a program is lowered for, under JAX's name for it ("cpu", "cuda", "rocm" or "tpu"), and not by the machine that traces
it. A predictor chooses its graph by its devices (``flax_googlenet.inference.predictor``).

Cycles are the compiler's estimates for one TPU v5e (libtpu 0.0.42), and gigabytes are what the kernels of an H100 read
and write, both for a training step of the whole network. Times are of one NVIDIA H200 (jaxlib 0.11.2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

WINOGRAD = ("cpu",)
"""Winograd's algorithm for large 3x3 convolutions in training. It makes a step on a CPU 1.2 times as fast. On an H100,
a step would move 33.6 GB instead of 21.4 (float32, 64 images)."""

GRADIENT_FOR_LOOPS = ("cpu",)
"""The gradient with respect to a convolution's input, with the kernel in the order that XLA needs inside a loop on a
CPU. Without it, a step of feature visualisation takes 2.4 times as long in a loop."""

XLA_POOL_GRADIENT = ("tpu",)
"""XLA's gradient of the max pool. A step takes 20.9 million cycles on a TPU instead of 41.0 (bfloat16, 32 images). This
leaves out the 13 operations that scatter the gradients, for which the compiler has no estimate. On a CPU it is a loop
over single values, 5 to 30 times as slow as ours. On an H200, a step of 64 images takes 10.8 ms instead of 9.9 in
bfloat16, and 14.0 instead of 12.8 in float32."""

BLOCKED_DOT = ("cpu",)
"""Matrix products summed in blocks, for less rounding error on a CPU. On a TPU each would take 2 to 4 times as long."""


def choose(
    platforms: Sequence[str], chosen: Callable[..., Any], other: Callable[..., Any], *operands: jax.Array
) -> Any:
    """Return ``chosen(*operands)`` in programs for one of ``platforms``, and ``other(*operands)`` in all others.

    Both functions are traced and must return the same shapes and dtypes. ``jax.jit`` around a long one keeps its trace
    for the next use. A program for one platform contains one of the functions alone, and a program for several
    platforms both. In place of what only the other function saves for the gradient, there is a constant that nothing
    reads, and the compiler removes it. Without ``jax.jit``, JAX's default device decides.
    """
    return lax.platform_dependent(*operands, default=other, **dict.fromkeys(platforms, chosen))
