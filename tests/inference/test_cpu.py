"""The graph for CPUs against torchvision's network, stage by stage."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import reference
from proof import relative_error
from torchvision.models import GoogLeNet as TorchGoogLeNet

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
def test_every_stage_is_torchvisions_in_float64(
    size: tuple[int, int, int],
    weights64: cpu.Weights,
    torch64: TorchGoogLeNet,
    random_images: Callable[..., np.ndarray],
) -> None:
    images = random_images(*size)
    expected = reference.stages(torch64, images)
    stages = _stages(weights64, images)
    # The bias and ReLU of conv1 and conv3 come after the pool, and inference has no auxiliary heads.
    assert stages.keys() == expected.keys() - {"conv1", "conv3", "aux1", "aux2"}
    for name, stage in stages.items():
        assert relative_error(stage, expected[name]) < 3e-13, name  # measured: worst 3.0e-14
