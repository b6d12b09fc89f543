"""The network at inference on a GPU: the function of the folded model, arranged for cuDNN.

The gains in the comments are ratios of speed with and without each arrangement, in bfloat16 on one NVIDIA H200 with
jaxlib 0.11.2, for batches of 256 images unless a comment names another size.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.architecture import NETWORKS, WIDTHS, Padding, PoolPadding
from flax_googlenet.ops.normalization import local_response_norm
from flax_googlenet.ops.pooling import max_pool_padding, per_channel, same_padding, strided_slices

Weights = Mapping[str, Any]
"""Nested dicts of arrays, as ``prepare`` returns them."""


def prepare(params: Mapping[str, Any]) -> Weights:
    """Return the weights for ``logits``.

    Kernels are OHWI, as cuDNN reads them. XLA would transpose HWIO kernels in every call, which takes 0.06 ms in all.

    Args:
        params: The parameters of the folded network (what is under ``"params"``). The auxiliary heads are not used.

    Returns:
        Arrays of the parameters' dtype.
    """
    weights: dict[str, Any] = {
        "conv1": _layer({**params["conv1"]["conv"], "kernel": _cells_kernel(params["conv1"]["conv"]["kernel"])}),
        "conv2": _layer(params["conv2"]["conv"]),
        "conv3": _layer(params["conv3"]["conv"]),
        "fc": params["fc"],
    }
    for name in WIDTHS:
        branches = {branch: _layer(block["conv"]) for branch, block in params[name].items()}
        first = [branches.pop(branch) for branch in ("branch1", "branch2_0", "branch3_0")]
        weights[name] = {
            "first": {key: np.concatenate([layer[key] for layer in first]) for key in ("kernel", "bias")},
            **branches,
        }
    return weights


def _layer(conv: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {"kernel": np.asarray(conv["kernel"]).transpose(3, 0, 1, 2), "bias": np.asarray(conv["bias"])}


def _cells_kernel(kernel: Float[Array | np.ndarray, "7 7 3 out"]) -> Float[np.ndarray, "4 4 16 out"]:
    """Return the 7x7 kernel of conv1 as a 4x4 kernel for the cells of ``_cells``.

    conv1 has stride 2 and padding 3, so its output row i reads the input rows 2i - 3 to 2i + 3. With a row of zeros
    before its own, the kernel covers the four rows of cells from (2i - 4, 2i - 3) to (2i + 2, 2i + 3). The same holds
    for columns.
    """
    padded = np.pad(kernel, ((1, 0), (1, 0), (0, 1), (0, 0)))  # [8, 8, 4, out]
    cells = padded.reshape(4, 2, 4, 2, 4, -1).transpose(0, 2, 1, 3, 4, 5)  # [4, 4, 2, 2, 4, out]
    return cells.reshape(4, 4, 16, -1)


def _cells(images: Float[Array, "n h w 3"], conv1_padding: Padding) -> Float[Array, "n rows columns 16"]:
    """Return cells of 2x2 pixels, with a channel of zeros beside RGB and the padding of conv1 around them.

    Tensor cores take channels in groups of 8: cuDNN pads 3 channels, and conv1 takes as long as all other layers
    together. On cells, conv1 is a 4x4 convolution with stride 1 and 16 channels: 1.25x.
    """
    n, h, w, _ = images.shape
    # TensorFlow's SAME pads 2 pixels, not 3, before an even size. The number of outputs is the same.
    top, left = (same_padding(size, 7, 2)[0] if conv1_padding == "SAME" else conv1_padding for size in (h, w))
    rows, columns = (h + 1) // 2 + 3, (w + 1) // 2 + 3  # one for each output, and three more under the last kernel
    padding = ((0, 0), (1 + top, 2 * rows - h - 1 - top), (1 + left, 2 * columns - w - 1 - left), (0, 1))
    x = jnp.pad(images, padding).reshape(n, rows, 2, columns, 2, 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, 16)


def logits(
    weights: Weights,
    images: Float[Array, "n h w 3"],
    variant: str = "torchvision",
    precision: lax.PrecisionLike = None,
) -> Float[Array, "n num_classes"]:
    """Compute the logits.

    Args:
        weights: The weights from ``prepare``.
        images: The input of the first convolution, as ``transform_input`` of the model's module returns it.
        variant: The network, as for ``GoogLeNet``.
        precision: As for ``jax.lax.conv_general_dilated``.
    """
    conv, network = functools.partial(_convolution, precision=precision), NETWORKS[variant]
    pool = functools.partial(_max_pool, stride=2, padding=network.pool_padding)

    def response_norm(x: jax.Array) -> jax.Array:
        return local_response_norm(x, network.response_norm) if network.response_norm else x

    x = conv(_cells(images, network.conv1_padding), weights["conv1"])  # [n, 112, 112, 64] at 224x224
    x = conv(response_norm(pool(x, 3)), weights["conv2"])  # [n, 56, 56, 64]
    x = pool(response_norm(conv(x, weights["conv3"], padding=1)), 3)  # [n, 28, 28, 192]
    for name, (width1, reduce2, *_) in network.widths.items():
        if name == "inception4a":
            x = pool(x, 3)  # [n, 14, 14, 480]
        elif name == "inception5a":
            x = pool(x, network.maxpool4_window)  # [n, 7, 7, 832]
        block = weights[name]
        # The three 1x1 convolutions that read x are one: 1.02x, and 1.3x for one image.
        first = conv(x, block["first"])  # [n, h, w, width1 + reduce2 + reduce3]
        branch2 = conv(first[..., width1 : width1 + reduce2], block["branch2_1"], padding=1)
        branch3 = conv(first[..., width1 + reduce2 :], block["branch3_1"], padding=network.branch3_kernel // 2)
        branch4 = conv(_max_pool(x, 3, 1, padding=1), block["branch4_1"])
        x = jnp.concatenate([first[..., :width1], branch2, branch3, branch4], axis=-1)
    # [n, 7, 7, 1024] at 224x224
    return jnp.matmul(x.mean((1, 2)), weights["fc"]["kernel"], precision=precision) + weights["fc"]["bias"][None]


def _convolution(
    x: jax.Array, layer: Mapping[str, jax.Array], padding: int = 0, precision: lax.PrecisionLike = None
) -> jax.Array:
    """Convolve with stride 1, add the bias and apply ReLU, which cuDNN does in one kernel."""
    pads = ((padding, padding), (padding, padding))
    layout = ("NHWC", "OHWI", "NHWC")
    x = lax.conv_general_dilated(x, layer["kernel"], (1, 1), pads, dimension_numbers=layout, precision=precision)
    return jax.nn.relu(x + per_channel(layer["bias"], x))


def _max_pool(x: jax.Array, window: int, stride: int, padding: PoolPadding = 0) -> jax.Array:
    """Compute ``ops.pooling.max_pool`` as a maximum of shifted slices. At a tie, its gradient differs.

    XLA computes a pool of bfloat16 in float32, in two kernels; slices stay in bfloat16, in one. The barrier keeps the
    concatenation before the pool from being fused with it. The fused kernel would choose among four inputs for each of
    nine pixels. Together: 1.25x. All pixels of a window in one step instead of rows and then columns: 1.03x.
    """
    pads = [max_pool_padding(size, window, stride, padding) for size in x.shape[1:3]]
    x = jnp.pad(lax.optimization_barrier(x), ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    rows = strided_slices(x, window, stride, axis=1)
    return functools.reduce(jnp.maximum, [pixel for row in rows for pixel in strided_slices(row, window, stride, 2)])
