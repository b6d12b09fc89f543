"""The graph for TPUs against the model. Its arithmetic is that of any device, so a CPU can show it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from proof import relative_error

import flax_googlenet
from flax_googlenet.inference import tpu
from flax_googlenet.inference.folding import fold_batch_norm
from flax_googlenet.inference.predictor import _inference_graph


@pytest.mark.parametrize("size", [(2, 224, 224), (1, 15, 15), (1, 47, 50), (1, 32, 17)])
def test_conv1_and_its_pool_are_the_models_in_float64(
    size: tuple[int, int, int], variables64: dict[str, Any], random_images: Callable[..., np.ndarray]
) -> None:
    images = random_images(*size)
    model, folded = fold_batch_norm(flax_googlenet.GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64), variables64)
    layer = tpu.prepare(folded["params"])["conv1"]
    pooled = jax.jit(lambda images: tpu._conv1_and_maxpool1(layer, images, None))(images)
    stage = jax.jit(lambda images: flax_googlenet.endpoints(model, folded, images)["maxpool1"])(images)
    assert pooled.shape == stage.shape
    assert relative_error(pooled, stage) < 1e-14  # measured: 6e-16


@pytest.mark.slow
def test_the_logits_are_the_models_in_float64(
    variables64: dict[str, Any], random_images: Callable[..., np.ndarray]
) -> None:
    images = random_images(1, 47, 50)
    model = flax_googlenet.GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64, transform_input=True)
    _, folded = fold_batch_norm(model, variables64)
    logits = jax.jit(_inference_graph(model, "tpu"))(tpu.prepare(folded["params"]), images)
    assert relative_error(logits, jax.jit(model.apply)(variables64, images).logits) < 3e-13  # measured: 6e-15


def test_a_tpu_gets_the_models_precision_and_no_slice_of_columns(variables: dict[str, Any]) -> None:
    model = flax_googlenet.GoogLeNet(precision="highest")
    _, folded = fold_batch_norm(model, variables)
    weights = tpu.prepare(folded["params"])
    graph = jax.jit(_inference_graph(model, "tpu")).trace(weights, np.zeros((2, 64, 64, 3), np.float32))
    program = graph.lower(lowering_platforms=("tpu",)).as_text().splitlines()
    products = [line for line in program if "stablehlo.convolution" in line or "stablehlo.dot_general" in line]
    assert len(products) == 3 + 9 * 6 + 1
    assert all(line.count("HIGHEST") == 2 for line in products)
    slices = [line for line in program if "stablehlo.slice" in line]
    assert len(slices) == 2
    assert all("[0:2, 0:16, 0:16, " in line for line in slices)  # of lanes alone
