"""Fold BatchNorm into the convolutions, for inference."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flax_googlenet.model import BatchNorm, GoogLeNet, Variables, plain_dicts


def fold_batch_norm(model: GoogLeNet, variables: Variables) -> tuple[GoogLeNet, dict[str, Any]]:
    """Return the same function without BatchNorm: each convolution takes over the scale and shift that follow it.

    The result is for inference. It has no statistics of a batch to train with.

    Args:
        model: The network.
        variables: Its variables, concrete arrays.

    Returns:
        The network with ``batch_norm=False``, and its variables. Kernels and biases of convolutions are NumPy arrays,
        computed in float64 and rounded once to the dtype of the kernel. The other arrays, and all arrays of a network
        without BatchNorm, are the given ones.
    """
    variables = plain_dicts(variables)
    params = _fold(variables["params"], variables["batch_stats"] if model.batch_norm else {})
    return model.clone(batch_norm=False), {"params": params}


def fold_in_float64(model: GoogLeNet, variables: Variables) -> dict[str, Any]:
    """Return the parameters of the folded network in float64, without those of the auxiliary heads.

    Whoever computes in a lower precision rounds them once, at the end.
    """
    needed = {name: block for name, block in variables["params"].items() if not name.startswith("aux")}
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), {**variables, "params": needed})
    return fold_batch_norm(model, exact)[1]["params"]


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
