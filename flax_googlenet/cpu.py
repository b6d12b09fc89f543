"""The network at inference on a CPU: the function of the folded model, arranged for caches and matrix products.

The gains below were measured one by one in float32 on two cores of Zen 3 (AVX2) with jaxlib 0.10.2: the medians of
interleaved runs with the arrangement and without it.

References:
    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", https://arxiv.org/abs/1509.09308
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.model import WIDTHS
from flax_googlenet.ops import ceil_mode_padding

Weights = Mapping[str, Any]
"""What ``prepare`` makes of the parameters: nested dicts of arrays."""

BATCH_SIZES = (8, 4, 1)
"""Numbers of images in one call. From 16 on, the buffers of a call exceed 32 MB, and memory that the C library gives
back and takes anew at every call costs more than larger matrix products save."""

# Winograd's F(m, 3) by m: the transforms of the input, the kernel and the output (Lavin and Gray, section 4).
_INPUT_TRANSFORM = {
    2: np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    4: np.array(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ]
    ),
}
_KERNEL_TRANSFORM = {
    2: np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2,
    4: np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24,
}
_OUTPUT_TRANSFORM = {
    2: np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    4: np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
}


def prepare(params: Mapping[str, Any]) -> Weights:
    """The weights of ``logits``, from the folded parameters (those under ``"params"``), in their dtype.

    Kernels are transformed here, once: computed in float64 and rounded. The auxiliary heads are left out.
    """
    convolution = {name: params[name]["conv"] for name in ("conv1", "conv2", "conv3")}
    weights: dict[str, Any] = {
        "conv1": {"kernel": _pair_columns(convolution["conv1"]["kernel"]), "bias": convolution["conv1"]["bias"]},
        "conv2": _matrix(convolution["conv2"]),
        "conv3": _winograd_kernel(convolution["conv3"], m=4),
        "fc": params["fc"],
    }
    for name in WIDTHS:
        branches = {branch: block["conv"] for branch, block in params[name].items()}
        first = [_matrix(branches[branch]) for branch in ("branch1", "branch2_0", "branch3_0")]
        weights[name] = {
            "first": {key: np.concatenate([layer[key] for layer in first], axis=-1) for key in ("kernel", "bias")},
            "branch2": _winograd_kernel(branches["branch2_1"], m=2),
            "branch3": branches["branch3_1"],
            "branch4": _matrix(branches["branch4_1"]),
        }
    return weights


def logits(weights: Weights, images: Float[Array, "n h w 3"]) -> Float[Array, "n num_classes"]:
    """The logits of ``images``, as prepared for the first convolution, by ``weights`` from ``prepare``."""
    # One image at a time to maxpool3, where activations are large: they stay in the cache. 1.3x.
    x = lax.map(lambda image: front(weights, image[None])["maxpool3"][0], images)
    return back(weights, x)["fc"]


def front(weights: Weights, images: Float[Array, "n h w 3"]) -> dict[str, jax.Array]:
    """The stages up to ``maxpool3``, by torchvision's names.

    ``conv1`` and ``conv3`` are not among them: their bias and ReLU, which commute with a maximum, come after the pool,
    on a quarter of the values.
    """
    stages = {}
    x = _stem(images, weights["conv1"]["kernel"])
    x = stages["maxpool1"] = jax.nn.relu(_max_pool(x, 3, 2) + weights["conv1"]["bias"])
    x = stages["conv2"] = _dense_relu(x, weights["conv2"])
    x = _winograd(x, weights["conv3"]["kernel"])
    x = stages["maxpool2"] = jax.nn.relu(_max_pool(x, 3, 2) + weights["conv3"]["bias"])
    for name in ("inception3a", "inception3b"):
        x = stages[name] = _inception(x, weights[name], name)
    stages["maxpool3"] = _max_pool(x, 3, 2)
    return stages


def back(weights: Weights, x: Float[Array, "n h w 480"]) -> dict[str, jax.Array]:
    """The stages after ``maxpool3``, of which ``x`` is the output."""
    stages = {}
    for name in ("inception4a", "inception4b", "inception4c", "inception4d", "inception4e"):
        x = stages[name] = _inception(x, weights[name], name)
    x = stages["maxpool4"] = _max_pool(x, 2, 2)
    for name in ("inception5a", "inception5b"):
        x = stages[name] = _inception(x, weights[name], name)
    x = stages["avgpool"] = x.mean((1, 2), keepdims=True)
    stages["fc"] = x[:, 0, 0, :] @ weights["fc"]["kernel"] + weights["fc"]["bias"]
    return stages


def _inception(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    width1, reduce2, *_ = WIDTHS[name]
    # 1.05x: the three 1x1 convolutions that read x, as one matrix product.
    first = _dense_relu(x, weights["first"])
    branch2 = first[..., width1 : width1 + reduce2]
    branch3 = first[..., width1 + reduce2 :]
    return jnp.concatenate(
        [
            first[..., :width1],
            jax.nn.relu(_winograd(branch2, weights["branch2"]["kernel"]) + weights["branch2"]["bias"]),
            jax.nn.relu(_convolution(branch3, weights["branch3"]["kernel"]) + weights["branch3"]["bias"]),
            _dense_relu(_max_pool(x, 3, 1, padding=1), weights["branch4"]),
        ],
        axis=-1,
    )


def _matrix(convolution: Mapping[str, Any]) -> dict[str, Any]:
    return {"kernel": np.asarray(convolution["kernel"])[0, 0], "bias": np.asarray(convolution["bias"])}


def _dense_relu(x: jax.Array, weights: Weights) -> jax.Array:
    # The barrier keeps slices and paddings that read the result from computing bias and ReLU each: 1.03x.
    return lax.optimization_barrier(jax.nn.relu(x @ weights["kernel"] + weights["bias"]))


def _convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[tuple[int, int]] = ((1, 1), (1, 1)),
) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _pair_columns(kernel: jax.Array) -> np.ndarray:
    """A 7x7 kernel of stride 2 on 3 channels as a 7x4 kernel of stride (2, 1) on the 6 of two neighbouring columns."""
    eight_wide = np.pad(kernel, ((0, 0), (1, 0), (0, 0), (0, 0)))
    return eight_wide.reshape(7, 4, 6, kernel.shape[-1])


def _stem(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv1 on pairs of columns: the same products, in matrices with twice the channels."""
    n, h, w, _ = images.shape
    pairs = (w + 1) // 2 + 3  # one for each output, and three more under the last kernel
    x = jnp.pad(images, ((0, 0), (0, 0), (4, 2 * pairs - w - 4), (0, 0))).reshape(n, h, pairs, 6)
    return _convolution(x, kernel, strides=(2, 1), padding=((3, 3), (0, 0)))


def _max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """``ops.max_pool`` as maxima of shifted slices, which the compiler vectorises: 1.2x. Ties have another gradient."""
    for axis in (1, 2):
        pads = ceil_mode_padding(x.shape[axis], window, stride, padding)
        x = jnp.pad(x, [pads if i == axis else (0, 0) for i in range(4)], constant_values=-jnp.inf)
        x = functools.reduce(jnp.maximum, _strided_slices(x, window, stride, axis))
    return x


def _strided_slices(x: jax.Array, window: int, stride: int, axis: int) -> list[jax.Array]:
    """By place in the window: what all windows along ``axis`` have there."""
    last = (x.shape[axis] - window) // stride * stride
    return [lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(window)]


def _winograd_kernel(convolution: Mapping[str, Any], m: int) -> dict[str, Any]:
    """The kernel for F(m x m, 3x3): [(m + 2)^2, in, out]."""
    kernel = np.asarray(convolution["kernel"])
    transform = np.kron(_KERNEL_TRANSFORM[m], _KERNEL_TRANSFORM[m])  # rows and columns at once
    transformed = (transform @ kernel.astype(np.float64).reshape(9, -1)).reshape(-1, *kernel.shape[2:])
    return {"kernel": transformed.astype(kernel.dtype), "bias": convolution["bias"]}


def _winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of padding 1 with m^2 * 9 / (m + 2)^2 times fewer products (Lavin and Gray): 1.4x.

    Each of the four transforms is a loop of its own, held apart by barriers: fused, they are computed many times over.
    """
    n, h, w, _ = x.shape
    m = math.isqrt(kernel.shape[0]) - 2
    rows, columns = -(-h // m), -(-w // m)

    x = jnp.pad(x, ((0, 0), (1, rows * m + 1 - h), (1, columns * m + 1 - w), (0, 0)))
    x = _transform(_INPUT_TRANSFORM[m], _strided_slices(x, m + 2, m, axis=1), axis=0)
    x = _transform(_INPUT_TRANSFORM[m], _strided_slices(x, m + 2, m, axis=3), axis=1)
    x = x.reshape((m + 2) ** 2, n * rows * columns, x.shape[-1])
    x = lax.optimization_barrier(jnp.einsum("ktc,kcd->ktd", x, kernel))
    x = x.reshape(m + 2, m + 2, n, rows, columns, kernel.shape[-1])
    x = _transform(_OUTPUT_TRANSFORM[m], list(x), axis=0)
    x = _transform(_OUTPUT_TRANSFORM[m], [x[:, i] for i in range(m + 2)], axis=1)
    return x.transpose(2, 3, 0, 4, 1, 5).reshape(n, rows * m, columns * m, -1)[:, :h, :w]


def _transform(matrix: np.ndarray, slices: Sequence[jax.Array], axis: int) -> jax.Array:
    """``matrix @ slices``, stacked along ``axis``; zeros cost nothing."""

    def combine(row: np.ndarray) -> jax.Array:
        terms = [x if factor == 1 else float(factor) * x for factor, x in zip(row, slices, strict=True) if factor]
        return functools.reduce(operator.add, terms)

    return lax.optimization_barrier(jnp.stack([combine(row) for row in matrix], axis))
