"""The network at inference on a TPU: the function of the folded model, with a first layer that fills a TPU's lanes.

The cycles in the comments are what the compiler estimates for 32 images in bfloat16 on a v5e (libtpu 0.0.42). Those of
``logits`` are 3.10 million in all; of the folded model, 4.15 million.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from flax_googlenet.architecture import NETWORKS
from flax_googlenet.model import ConvBN, Inception
from flax_googlenet.ops.normalization import local_response_norm
from flax_googlenet.ops.pooling import max_pool, max_pool_padding, per_channel

Weights = Mapping[str, Any]
"""Nested dicts of arrays, as ``prepare`` returns them."""


def prepare(params: Mapping[str, Any]) -> Weights:
    """Return the weights for ``logits``: the parameters, with conv1's kernel and bias for pairs of columns.

    Args:
        params: The parameters of the folded network (what is under ``"params"``). The auxiliary heads are not used.

    Returns:
        Arrays of the parameters' dtype.
    """
    conv1 = params["conv1"]["conv"]
    return {**params, "conv1": {"kernel": _pair_kernel(conv1["kernel"]), "bias": np.tile(conv1["bias"], 2)}}


def _pair_kernel(kernel: Float[Array | np.ndarray, "7 7 3 out"]) -> Float[np.ndarray, "7 9 3 2*out"]:
    """Return the kernel of conv1 twice, for two columns of its output, which start 2 columns of the input apart."""
    first, second = (np.pad(kernel, ((0, 0), columns, (0, 0), (0, 0))) for columns in ((0, 2), (2, 0)))
    return np.concatenate([first, second], axis=-1)


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
        variant: The network, "torchvision" or "bvlc". The pools of the others have other windows.
        precision: As for ``jax.lax.conv_general_dilated``.
    """
    options: Any = {"variant": variant, "batch_norm": False, "dtype": images.dtype, "precision": precision}
    network = NETWORKS[variant]

    def response_norm(x: jax.Array) -> jax.Array:
        return local_response_norm(x, network.response_norm) if network.response_norm else x

    def apply(block: Any, x: jax.Array) -> jax.Array:
        return block.apply({"params": weights[block.name]}, x, False)

    x = _conv1_and_maxpool1(weights["conv1"], images, precision)  # [n, 56, 56, 64] at 224x224
    x = apply(ConvBN(64, **options, name="conv2"), response_norm(x))
    x = apply(ConvBN(192, kernel_size=3, padding=1, **options, name="conv3"), x)
    x = max_pool(response_norm(x), window=3, stride=2)  # [n, 28, 28, 192]
    for name, widths in network.widths.items():
        if name == "inception4a":
            x = max_pool(x, window=3, stride=2)  # [n, 14, 14, 480]
        elif name == "inception5a":
            x = max_pool(x, window=network.maxpool4_window, stride=2)  # [n, 7, 7, 832]
        x = apply(Inception(widths, **options, name=name), x)
    # [n, 7, 7, 1024] at 224x224
    return jnp.matmul(x.mean((1, 2)), weights["fc"]["kernel"], precision=precision) + weights["fc"]["bias"][None]


@jax.named_scope("conv1")
def _conv1_and_maxpool1(
    layer: Mapping[str, Array], images: Float[Array, "n h w 3"], precision: lax.PrecisionLike
) -> Float[Array, "n rows columns out"]:
    """Compute conv1 on pairs of columns, and ``max_pool`` on the pairs. At a tie, the gradient of the pool differs.

    A TPU computes on 128 lanes, and conv1 has 64 channels. Two columns side by side fill the lanes: conv1 and the
    layout that it wants for its images take 0.28 million cycles instead of 1.35. From one pair of output columns to the
    next, the kernel moves on by 4 columns of the input; from one output row to the next, by 2 rows.
    """
    h, w = ((size + 1) // 2 for size in images.shape[1:3])  # of the output
    pairs = (w + 1) // 2
    padding = ((3, 3), (3, 4 * pairs + 2 - images.shape[2]))
    x = lax.conv_general_dilated(
        images, layer["kernel"], (2, 4), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )
    x = jax.nn.relu(x + per_channel(layer["bias"], x))  # [n, h, pairs, 2 * out]

    # Window j has the columns 2j, 2j + 1 and 2j + 2: the pair j and the first column of the next pair. A slice of the
    # columns takes 0.33 million cycles, so the two pools read all columns, and only lanes are sliced, at no cost. After
    # an odd number of columns, the last pair has one too many, which is in no window.
    columns = w // 2
    rows = max_pool_padding(h, 3, 2, 0)

    def pool(width: int) -> Array:  # [n, rows, columns, 2 * out]
        after = columns + width - 1 - pairs
        pads = ((0, 0), rows, (0, after), (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, width, 1), (1, 2, 1, 1), pads)

    channels = x.shape[3] // 2
    return jnp.maximum(pool(2)[..., :channels], pool(1)[..., channels:])
