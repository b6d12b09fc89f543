"""The graph for CPUs against the model, stage by stage."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from proof import relative_error

import flax_googlenet
from flax_googlenet.inference import cpu
from flax_googlenet.inference.folding import fold_batch_norm

SIZES = [(1, 15, 15), *(pytest.param(size, marks=pytest.mark.slow) for size in [(2, 224, 224), (3, 97, 131)])]


@pytest.fixture(scope="module")
def weights64(variables64: dict[str, Any]) -> cpu.Weights:
    _, folded = fold_batch_norm(flax_googlenet.GoogLeNet(), variables64)
    return cpu.prepare(folded["params"])


def _stages(weights: cpu.Weights, images: np.ndarray) -> dict[str, np.ndarray]:
    front = jax.jit(cpu.front)(weights, images)
    return {**front, **jax.jit(cpu.back)(weights, front["maxpool3"])}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_stage_is_the_models_in_float64(
    size: tuple[int, int, int],
    weights64: cpu.Weights,
    variables64: dict[str, Any],
    random_images: Callable[..., np.ndarray],
) -> None:
    images = random_images(*size)
    model = flax_googlenet.GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64)
    expected = jax.jit(flax_googlenet.endpoints, static_argnums=0)(model, variables64, images)
    stages = _stages(weights64, images)
    assert stages.keys() == expected.keys() - {"conv1", "conv3"}  # their bias and ReLU come after the pool
    for name, stage in stages.items():
        assert relative_error(stage, expected[name]) < 3e-13, name  # measured: worst 3.5e-14
