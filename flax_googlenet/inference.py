"""Inference: BatchNorm folded into the convolutions, and a jitted predictor."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from flax_googlenet.model import BatchNorm, GoogLeNet, Variables

Predictor = Callable[[Any], jax.Array]
"""images [N, H, W, 3] -> logits [N, num_classes]"""


def fold_batch_norm(model: GoogLeNet, variables: Variables) -> tuple[GoogLeNet, dict[str, Any]]:
    """The same function without BatchNorm: each convolution takes over the scale and shift that follow it.

    Args:
        model: the network.
        variables: its variables, concrete arrays.

    Returns:
        The network with ``batch_norm=False``, and its variables: NumPy arrays, computed in float64 and rounded once to
        the dtype of the kernels. A network without BatchNorm comes back as it is. The fold is for inference: what
        BatchNorm does in training is gone.
    """
    params = {"params": variables["params"]}
    if model.batch_norm:
        params = {"params": _fold(variables["params"], variables["batch_stats"])}
    return model.clone(batch_norm=False), params


def _fold(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    if "bn" in params:
        kernel = params["conv"]["kernel"]
        scale, bias, mean, var = (
            np.asarray(x, np.float64)
            for x in (params["bn"]["scale"], params["bn"]["bias"], batch_stats["bn"]["mean"], batch_stats["bn"]["var"])
        )
        multiplier = scale / np.sqrt(var + BatchNorm.epsilon)
        folded = {"kernel": np.asarray(kernel, np.float64) * multiplier, "bias": bias - mean * multiplier}
        return {"conv": {name: x.astype(kernel.dtype) for name, x in folded.items()}}
    return {name: _fold(value, batch_stats[name]) if name in batch_stats else value for name, value in params.items()}


def make_predictor(model: GoogLeNet, variables: Variables) -> Predictor:
    """A jitted function images [N, H, W, 3] -> logits [N, num_classes]."""
    folded, params = fold_batch_norm(model, variables)
    apply = jax.jit(lambda params, images: folded.apply(params, images).logits)
    params = jax.device_put(params)
    return lambda images: apply(params, jnp.asarray(images))
