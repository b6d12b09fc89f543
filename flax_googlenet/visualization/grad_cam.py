"""Grad-CAM: where in an image a stage finds what speaks for a class."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from flax_googlenet.architecture import NETWORKS, stage_name
from flax_googlenet.inference.compiling import jit
from flax_googlenet.model import GoogLeNet, Variables, check_images, endpoints


def grad_cam(
    model: GoogLeNet,
    variables: Variables,
    images: Float[Array | np.ndarray, "n h w 3"],
    classes: Int[ArrayLike, " n"],
    stage: str = "inception5b",
) -> Float[Array, "n h w"]:
    """Return how much each place of the images speaks for a class.

    With the stage's features A [H', W', C] and the gradient of the class's logit with respect to them, averaged over
    all places to g [C], the heat is relu(sum over c of g[c] A[:, :, c]). It is divided by its maximum, and resized to
    the size of the images with bilinear interpolation.

    Example::

        images = flax_googlenet.preprocess_batch(["cat.jpg"])
        classes = make_predictor(model, variables)(images).argmax(-1)
        heat = grad_cam(model, variables, images, classes)  # [1, 224, 224]

    Args:
        model: The network.
        variables: Its variables.
        images: Floating point [N, H, W, 3], as for the model.
        classes: The class of each image, int [N], from 0 to num_classes - 1. Inside ``jax.jit`` their values are not
            checked.
        stage: The stage whose features are looked at, by any name that ``endpoints`` takes.

    Returns:
        [N, H, W] in [0, 1]. It is 0 everywhere where nothing speaks for the class.

    Raises:
        TypeError: If ``images`` is not an array of JAX or NumPy.
        ValueError: If ``images`` has a wrong shape or dtype, if there is not one class for each image or a class does
            not exist, or if ``stage`` names no stage or one without height and width.

    Reference:
        Selvaraju et al., "Grad-CAM", https://arxiv.org/abs/1610.02391
    """
    check_images(images, NETWORKS[model.variant].min_size)
    stage = stage_name(stage, model.variant)
    if stage in ("avgpool", "fc"):
        raise ValueError(f"stage: {stage} has no height and width: choose an earlier one, such as inception5b")
    if np.shape(classes) != images.shape[:1]:
        raise ValueError(f"classes: expected one for each of {images.shape[0]} images, got shape {np.shape(classes)}")
    if not isinstance(classes, jax.core.Tracer) and not all(0 <= c < model.num_classes for c in np.asarray(classes)):
        raise ValueError(f"classes: expected numbers from 0 to {model.num_classes - 1}, got {np.asarray(classes)}")
    return _heat(model, stage)(variables, jnp.asarray(images), jnp.asarray(classes))


@functools.lru_cache(maxsize=8)
def _heat(model: GoogLeNet, stage: str) -> Callable[[Variables, jax.Array, jax.Array], jax.Array]:
    def heat(variables: Variables, images: jax.Array, classes: jax.Array) -> jax.Array:
        def score(features: jax.Array) -> jax.Array:
            logits = endpoints(model, variables, images, replace={stage: features})["fc"]
            return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()

        features = endpoints(model, variables, images, branches=True)[stage]  # [n, h', w', c]
        importance = jax.grad(score)(features).mean((1, 2), keepdims=True)  # [n, 1, 1, c]
        heat = jax.nn.relu((importance * features).sum(-1))  # [n, h', w']
        heat /= jnp.maximum(heat.max((1, 2), keepdims=True), jnp.finfo(heat.dtype).tiny)
        return jax.image.resize(heat, images.shape[:3], "bilinear")

    return jit(heat)
