"""The network at inference on a CPU: the function of the folded model, arranged for caches and matrix products.

The gains in the comments are ratios of speed with and without each arrangement: medians of interleaved runs in float32
on two cores of Zen 3 (AVX2) with jaxlib 0.10.2.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.architecture import NETWORKS, WIDTHS, Padding, PoolPadding
from flax_googlenet.ops import winograd
from flax_googlenet.ops.normalization import local_response_norm
from flax_googlenet.ops.pooling import max_pool_padding, per_channel, same_padding, strided_slices

Weights = Mapping[str, Any]
"""Nested dicts of arrays, as ``prepare`` returns them."""

BATCH_SIZES = (8, 4, 2, 1)
"""Numbers of images in one call. From 16 on, the buffers of a call exceed 32 MB: the C library then returns them to the
operating system and asks for them again in every call, which costs more than larger matrix products save."""


_convolution = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def prepare(params: Mapping[str, Any]) -> Weights:
    """Return the weights for ``logits``, with all kernels in the form that it uses.

    Args:
        params: The parameters of the folded network (what is under ``"params"``). The auxiliary heads are not used.

    Returns:
        Arrays of the parameters' dtype. Kernels for Winograd's algorithm are transformed in float64 and rounded once.
    """
    conv = {name: params[name]["conv"] for name in ("conv1", "conv2", "conv3")}
    weights: dict[str, Any] = {
        "conv1": {"kernel": _pair_columns(conv["conv1"]["kernel"]), "bias": conv["conv1"]["bias"]},
        "conv2": _matrix(conv["conv2"]),
        "conv3": _winograd_kernel(conv["conv3"], m=4),
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


def _matrix(conv: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kernel of a 1x1 convolution as a matrix [in, out], and its bias."""
    return {"kernel": np.asarray(conv["kernel"])[0, 0], "bias": np.asarray(conv["bias"])}


def _winograd_kernel(conv: Mapping[str, Any], m: int) -> dict[str, Any]:
    """Return the kernel of a 3x3 convolution for F(m x m, 3x3), and its bias. Winograd's algorithm gains 1.4x."""
    kernel = np.asarray(conv["kernel"])
    transformed = winograd.transform_kernel(kernel.astype(np.float64), m)
    return {"kernel": transformed.astype(kernel.dtype), "bias": conv["bias"]}


def _pair_columns(kernel: Float[Array | np.ndarray, "7 7 3 out"]) -> Float[np.ndarray, "7 4 6 out"]:
    """Return the 7x7 kernel of conv1 as the 7x4 kernel of ``_stem``, which reads two columns of 3 channels as one of 6.

    conv1 has stride 2 and padding 3, so its output column j reads the input columns 2j - 3 to 2j + 3. With a column of
    zeros before its own, the kernel covers the four pairs of columns from (2j - 4, 2j - 3) to (2j + 2, 2j + 3).
    """
    eight_wide = np.pad(kernel, ((0, 0), (1, 0), (0, 0), (0, 0)))  # [7, 8, 3, 64]
    return eight_wide.reshape(7, 4, 6, kernel.shape[-1])


def logits(
    weights: Weights, images: Float[Array, "n h w 3"], variant: str = "torchvision"
) -> Float[Array, "n num_classes"]:
    """Compute the logits.

    Args:
        weights: The weights from ``prepare``.
        images: The input of the first convolution, as ``transform_input`` of the model's module returns it.
        variant: The network, as for ``GoogLeNet``.
    """
    # One image at a time up to maxpool3, so that the large activations stay in the cache: 1.3x.
    x = lax.map(lambda image: front(weights, image[None], variant)["maxpool3"][0], images)  # [n, 14, 14, 480]
    return back(weights, x, variant)["fc"]


def front(weights: Weights, images: Float[Array, "n h w 3"], variant: str = "torchvision") -> dict[str, jax.Array]:
    """Compute the stages up to ``maxpool3``, by torchvision's names, without ``conv1`` and ``conv3``.

    The bias and ReLU of these two commute with a maximum. So they come after the pool, where there are a quarter of the
    values to compute, except for a ``conv3`` that is normalised before the pool. Shapes in the comments are for images
    of 224x224.
    """
    stages, network = {}, NETWORKS[variant]
    pool = functools.partial(_max_pool, window=3, stride=2, padding=network.pool_padding)
    x = _stem(images, weights["conv1"]["kernel"], network.conv1_padding)  # [n, 112, 112, 64]
    x = stages["maxpool1"] = _relu_after_bias(pool(x), weights["conv1"]["bias"])  # [n, 56, 56, 64]
    if network.response_norm:
        x = stages["norm1"] = local_response_norm(x, network.response_norm)
    x = stages["conv2"] = _dense_relu(x, weights["conv2"])
    x = winograd.conv3x3(x, weights["conv3"]["kernel"])  # [n, 56, 56, 192]
    if network.response_norm:
        x = _relu_after_bias(x, weights["conv3"]["bias"])
        x = stages["norm2"] = local_response_norm(x, network.response_norm)
        x = stages["maxpool2"] = pool(x)  # [n, 28, 28, 192]
    else:
        x = stages["maxpool2"] = _relu_after_bias(pool(x), weights["conv3"]["bias"])  # [n, 28, 28, 192]
    for name in ("inception3a", "inception3b"):
        x = stages[name] = _inception(x, weights[name], network.widths[name])
    stages["maxpool3"] = pool(x)  # [n, 14, 14, 480]
    return stages


def back(weights: Weights, x: Float[Array, "n h w 480"], variant: str = "torchvision") -> dict[str, jax.Array]:
    """Compute the stages after ``maxpool3``, by torchvision's names, from its output ``x``."""
    stages, network = {}, NETWORKS[variant]
    for name in ("inception4a", "inception4b", "inception4c", "inception4d", "inception4e"):
        x = stages[name] = _inception(x, weights[name], network.widths[name])
    x = stages["maxpool4"] = _max_pool(x, network.maxpool4_window, 2, network.pool_padding)  # [n, 7, 7, 832]
    for name in ("inception5a", "inception5b"):
        x = stages[name] = _inception(x, weights[name], network.widths[name])
    x = stages["avgpool"] = x.mean((1, 2), keepdims=True)  # [n, 1, 1, 1024]
    stages["fc"] = x[:, 0, 0, :] @ weights["fc"]["kernel"] + weights["fc"]["bias"][None]  # [n, num_classes]
    return stages


def _inception(x: jax.Array, weights: Weights, widths: Sequence[int]) -> jax.Array:
    width1, reduce2, *_ = widths
    # The three 1x1 convolutions that read x are one matrix product: 1.05x.
    first = _dense_relu(x, weights["first"])  # [n, h, w, width1 + reduce2 + reduce3]
    branch2 = first[..., width1 : width1 + reduce2]
    branch3 = first[..., width1 + reduce2 :]
    branch1 = first[..., :width1]
    branch2 = _relu_after_bias(winograd.conv3x3(branch2, weights["branch2"]["kernel"]), weights["branch2"]["bias"])
    pad = weights["branch3"]["kernel"].shape[0] // 2  # 1, or 2 for 5x5
    branch3 = _convolution(branch3, weights["branch3"]["kernel"], (1, 1), padding=((pad, pad), (pad, pad)))
    branch3 = _relu_after_bias(branch3, weights["branch3"]["bias"])
    branch4 = _dense_relu(_max_pool(x, 3, 1, padding=1), weights["branch4"])
    return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


def _dense_relu(x: jax.Array, weights: Weights) -> jax.Array:
    # Without the barrier, each slice and padding that reads the result would compute bias and ReLU again: 1.03x.
    return lax.optimization_barrier(_relu_after_bias(x @ weights["kernel"], weights["bias"]))


def _relu_after_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.relu(x + per_channel(bias, x))


def _stem(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Compute conv1 without its bias, with a kernel from ``_pair_columns``.

    The products are the same, in matrices with 6 channels instead of 3.
    """
    n, h, w, _ = images.shape
    # TensorFlow's SAME pads 2 pixels, not 3, before an even size. The number of outputs is the same.
    top, left = (same_padding(size, 7, 2)[0] if padding == "SAME" else padding for size in (h, w))
    pairs = (w + 1) // 2 + 3  # one for each output column, and three more under the last kernel
    x = jnp.pad(images, ((0, 0), (0, 0), (1 + left, 2 * pairs - w - 1 - left), (0, 0)))  # [n, h, 2 pairs, 3]
    x = x.reshape(n, h, pairs, 6)
    return _convolution(x, kernel, (2, 1), padding=((top, 3), (0, 0)))  # [n, ceil(h / 2), ceil(w / 2), 64]


def _max_pool(x: jax.Array, window: int, stride: int, padding: PoolPadding = 0) -> jax.Array:
    """Compute ``ops.pooling.max_pool`` as maxima of shifted slices, which the compiler vectorises: 1.2x.

    At a tie, its gradient differs from that of ``max_pool``.
    """
    for axis in (1, 2):
        pads = max_pool_padding(x.shape[axis], window, stride, padding)
        x = lax.pad(x, np.array(-np.inf, x.dtype), [(*pads, 0) if i == axis else (0, 0, 0) for i in range(4)])
        x = functools.reduce(lax.max, strided_slices(x, window, stride, axis))
    return x
