"""The stages of a network: their output shapes, parameters and multiply-adds, and their values as features."""

import functools
import math
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict
from jax import numpy as jnp

from flax_googlenet.images.preprocessing import CROP
from flax_googlenet.inference import compiling
from flax_googlenet.model import GoogLeNet, Variables, endpoints


class Stage(NamedTuple):
    """One stage of a network."""

    name: str
    output: tuple[int, ...]
    """The shape for one image: [H, W, C], or [num_classes] at the end."""
    parameters: int
    multiply_adds: int
    """The multiply-adds of convolutions and dense layers for one image, as torchvision counts them."""


def summarize(model: GoogLeNet, size: int = CROP) -> list[Stage]:
    """Return the stages of a network in the order of computation, followed by its auxiliary heads.

    The network is only traced, for its shapes: no weights are computed, and nothing is compiled.

    Args:
        model: The network.
        size: Height and width of the images in pixels, at least the smallest size that the network takes.

    Raises:
        ValueError: If the images are too small.
    """
    order: list[str] = []

    def init(key: jax.Array, images: jax.Array) -> Any:
        variables = model.init(key, images, capture_intermediates=True, mutable=True)
        order.extend(name.removesuffix("_output") for name in variables["intermediates"] if name.endswith("_output"))
        return variables

    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), images)
    params, outputs = flatten_dict(variables["params"]), flatten_dict(variables["intermediates"])

    def stage(name: str) -> Stage:
        own = {path: leaf for path, leaf in params.items() if path[0] == name}
        (output,) = outputs[(f"{name}_output",)] if name in order else outputs[name, "__call__"]
        multiply_adds = 0
        for path, leaf in own.items():
            if path[-1] == "kernel":  # used once for each position of the layer's output
                (layer_output,) = outputs[*path[:-1], "__call__"]
                multiply_adds += leaf.size * math.prod(layer_output.shape[1:-1])
        return Stage(name, output.shape[1:], sum(leaf.size for leaf in own.values()), multiply_adds)

    return [stage(name) for name in order + [name for name in ("aux1", "aux2") if model.aux_logits]]


def feature_function(model: GoogLeNet, stage: str, *, positions: bool = False) -> Any:
    """Return a function from variables and images [N, H, W, 3] to the features of a stage, compiled by ``jax.jit``.

    Args:
        model: The network.
        stage: The name of a stage or branch in the result of ``endpoints``.
        positions: Whether to return the features of every position, [N, H, W, C]. Otherwise their mean, [N, C].
    """

    @functools.partial(jax.jit, compiler_options=compiling.compiler_options(jax.default_backend()))
    def compute(variables: Variables, images: jax.Array) -> jax.Array:
        value = endpoints(model, variables, images, branches=True)[stage]  # [N, H, W, C] or [N, C]
        return value if positions or value.ndim == 2 else value.mean((1, 2))

    return compute
