"""The graph for GPUs against torchvision's network. Its arithmetic is that of any device, so a CPU can show it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import reference
import torch
from jax import numpy as jnp
from proof import relative_error

import flax_googlenet
from flax_googlenet.inference import gpu
from flax_googlenet.inference.folding import fold_batch_norm
from flax_googlenet.inference.predictor import _BATCH_SIZES, _batches, _inference_graph


@pytest.mark.parametrize(
    "size", [(1, 15, 15), *(pytest.param(size, marks=pytest.mark.slow) for size in [(2, 224, 224), (3, 97, 130)])]
)
def test_the_logits_are_torchvisions_in_float64(
    size: tuple[int, int, int],
    state_dict: dict[str, np.ndarray],
    variables64: dict[str, Any],
    random_images: Callable[..., np.ndarray],
) -> None:
    images = random_images(*size)
    model = flax_googlenet.GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64, transform_input=True)
    _, folded = fold_batch_norm(model, variables64)
    logits = jax.jit(_inference_graph(model, "gpu"))(gpu.prepare(folded["params"]), images)
    network = reference.build(state_dict, transform_input=True, dtype=torch.float64)
    assert relative_error(logits, reference.stages(network, images)["fc"]) < 3e-13  # measured: 6.7e-15


def test_a_gpu_gets_no_kernel_to_transpose_and_the_models_precision(variables: dict[str, Any]) -> None:
    model = flax_googlenet.GoogLeNet(precision="highest")
    _, folded = fold_batch_norm(model, variables)
    weights = gpu.prepare(folded["params"])
    graph = jax.jit(_inference_graph(model, "gpu")).trace(weights, np.zeros((2, 32, 32, 3), np.float32))
    program = graph.lower(lowering_platforms=("cuda",)).as_text()
    convolutions = [line for line in program.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 3 + 9 * 4
    assert all("[o, 0, 1, i]" in line for line in convolutions)
    assert program.count("stablehlo.transpose") == 1  # of the images, into cells
    assert all(line.count("HIGHEST") == 2 for line in convolutions)


@pytest.mark.parametrize(
    ("n", "expected"), [(0, [1]), (1, [1]), (5, [8]), (255, [256]), (256, [256]), (600, [256, 256, 128])]
)
def test_an_accelerator_gets_few_batches_and_images_on_a_device_stay_there(n: int, expected: list[int]) -> None:
    images = jnp.arange(n * 3, dtype=jnp.float32).reshape(n, 1, 1, 3)
    batches = list(_batches(images, _BATCH_SIZES, rounds_up=True))
    assert [len(batch) for batch in batches] == expected
    assert all(isinstance(batch, jax.Array) for batch in batches)
    joined = jnp.concatenate(batches)
    np.testing.assert_array_equal(joined[:n], images)
    assert not joined[n:].any()
