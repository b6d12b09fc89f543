"""The network at inference on a CPU: the function of the folded model, arranged for caches and matrix products.

The gains below were measured one by one in float32 on two cores of Zen 3 (AVX2) with jaxlib 0.10.2: the medians of
interleaved runs with the arrangement and without it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.model import WIDTHS
from flax_googlenet.ops import winograd
from flax_googlenet.ops.pooling import ceil_mode_padding, per_channel, strided_slices

Weights = Mapping[str, Any]
"""What ``prepare`` makes of the parameters: nested dicts of arrays."""

BATCH_SIZES = (8, 4, 1)
"""Numbers of images in one call. From 16 on, the buffers of a call exceed 32 MB, and memory that the C library gives
back and takes anew at every call costs more than larger matrix products save."""


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
    x = stages["maxpool1"] = _relu_after_bias(_max_pool(x, 3, 2), weights["conv1"]["bias"])
    x = stages["conv2"] = _dense_relu(x, weights["conv2"])
    x = winograd.conv3x3(x, weights["conv3"]["kernel"])
    x = stages["maxpool2"] = _relu_after_bias(_max_pool(x, 3, 2), weights["conv3"]["bias"])
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
    stages["fc"] = x[:, 0, 0, :] @ weights["fc"]["kernel"] + weights["fc"]["bias"][None]
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
            _relu_after_bias(winograd.conv3x3(branch2, weights["branch2"]["kernel"]), weights["branch2"]["bias"]),
            _relu_after_bias(_convolution(branch3, weights["branch3"]["kernel"]), weights["branch3"]["bias"]),
            _dense_relu(_max_pool(x, 3, 1, padding=1), weights["branch4"]),
        ],
        axis=-1,
    )


def _matrix(convolution: Mapping[str, Any]) -> dict[str, Any]:
    return {"kernel": np.asarray(convolution["kernel"])[0, 0], "bias": np.asarray(convolution["bias"])}


def _dense_relu(x: jax.Array, weights: Weights) -> jax.Array:
    # The barrier keeps slices and paddings that read the result from computing bias and ReLU each: 1.03x.
    return lax.optimization_barrier(_relu_after_bias(x @ weights["kernel"], weights["bias"]))


def _relu_after_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.relu(x + per_channel(bias, x))


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
        x = functools.reduce(jnp.maximum, strided_slices(x, window, stride, axis))
    return x


def _winograd_kernel(convolution: Mapping[str, Any], m: int) -> dict[str, Any]:
    """The weights of a 3x3 convolution for F(m x m, 3x3), which is 1.4x as fast."""
    kernel = np.asarray(convolution["kernel"])
    transformed = winograd.transform_kernel(kernel.astype(np.float64), m)
    return {"kernel": transformed.astype(kernel.dtype), "bias": convolution["bias"]}
