"""Feature visualisation: what the images excite, on torchvision's network with random weights."""

from typing import Any

import jax
import numpy as np
import pytest

from flax_googlenet import GoogLeNet, endpoints
from flax_googlenet.visualization import feature_images, optimize_images
from flax_googlenet.visualization.features import normalise

MODEL = GoogLeNet()
STAGE = "mixed3a_3x3"  # Lucid's name
CHANNELS = [3, 40]
SIZE = 64


@jax.jit
def activations(variables: dict[str, Any], images: jax.Array) -> jax.Array:
    """Return the mean of each channel of the stage: [N, SIZE, SIZE, 3] in [0, 1] -> [N, C]."""
    return endpoints(MODEL, variables, normalise(images), branches=True)["inception3a/branch2_1"].mean((1, 2))


@pytest.fixture(scope="module")
def dying(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables with which the second of the channels is 0 everywhere in a grey image."""
    bias = variables["params"]["inception3a"]["branch2_1"]["bn"]["bias"].copy()
    bias[CHANNELS[1]] -= 1
    changed = jax.tree.map(lambda x: x, variables)  # new dicts with the same arrays
    changed["params"]["inception3a"]["branch2_1"]["bn"]["bias"] = bias
    return changed


@pytest.mark.slow
def test_each_channel_is_excited_more_than_by_any_of_1000_random_images(
    variables: dict[str, Any], dying: dict[str, Any]
) -> None:
    steps_done: list[int] = []

    def images(variables: dict[str, Any], seed: int = 0, steps: int = 128) -> jax.Array:
        key = jax.random.key(seed)
        return feature_images(MODEL, variables, STAGE, CHANNELS, key, steps=steps, size=SIZE, on_step=steps_done.append)

    found = images(variables)
    assert steps_done == list(range(16, 129, 16))
    assert found.shape == (2, SIZE, SIZE, 3)
    assert found.min() >= 0
    assert found.max() <= 1
    random_images = np.random.default_rng(0).random((1000, SIZE, SIZE, 3), np.float32)
    assert (
        np.diagonal(activations(variables, found)[:, CHANNELS])
        > activations(variables, random_images)[:, CHANNELS].max(0)
    ).all()

    unwatched = feature_images(MODEL, variables, STAGE, CHANNELS, jax.random.key(0), steps=128, size=SIZE)
    np.testing.assert_array_equal(unwatched, found)
    assert (images(variables, seed=1) != found).any()

    # With ReLU's own gradient, the image of a channel that is 0 would stay as it is at the start.
    assert activations(dying, images(dying, steps=0))[1, CHANNELS[1]] == 0
    assert activations(dying, images(dying))[1, CHANNELS[1]] > 0


@pytest.mark.parametrize(
    ("stage", "channels", "size", "named"),
    [
        ("inception3a", [256], 32, "255"),
        ("inception3a", [2**40], 32, "255"),
        ("inception3a", [1.5], 32, "255"),
        ("inception9a", [0], 32, "inception3a"),
        ("inception3a", [0], 14, "15"),
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_a_channel_stage_or_size_that_does_not_exist_is_refused(
    stage: str, channels: list[int], size: int, named: str, variables: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=named):
        feature_images(MODEL, variables, stage, channels, jax.random.key(0), size=size)


@pytest.mark.parametrize("targets", [3, [3, 40], None, (np.arange(2), np.arange(3))])
def test_targets_without_an_entry_for_each_image_are_refused(targets: Any, variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="targets"):
        optimize_images(MODEL, variables, lambda stages, target: stages["fc"][target], targets, jax.random.key(0))


def test_an_objective_that_is_no_number_is_refused(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\(1000,\)"):
        optimize_images(MODEL, variables, lambda stages, _: stages["fc"], np.arange(2), jax.random.key(0), size=15)
