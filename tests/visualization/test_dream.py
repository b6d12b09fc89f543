"""DeepDream on torchvision's network with random weights."""

from typing import Any

import jax
import numpy as np
import pytest
import reference
from jax import numpy as jnp

from flax_googlenet import GoogLeNet, ImageError, endpoints
from flax_googlenet.visualization import deep_dream
from flax_googlenet.visualization.features import normalise

MODEL = GoogLeNet()


@pytest.mark.slow
def test_a_dream_in_tiles_makes_the_features_of_a_stage_larger(variables: dict[str, Any]) -> None:
    photograph = reference.photographs()[1][:60, :81]
    steps_done: list[int] = []
    dream = deep_dream(MODEL, variables, photograph, "mixed3a", octaves=2, steps=3, tile=45, on_step=steps_done.append)
    assert steps_done == list(range(1, 7))
    assert dream.shape == photograph.shape
    assert dream.min() >= 0
    assert dream.max() <= 1

    @jax.jit
    def energy(picture: np.ndarray) -> jax.Array:
        return jnp.square(endpoints(MODEL, variables, normalise(picture[None]))["inception3a"]).mean()

    assert energy(np.asarray(dream)) > 1.2 * energy(photograph.astype(np.float32) / np.float32(255))  # 1.44 measured
    again = deep_dream(MODEL, variables, photograph, "inception3a", octaves=2, steps=3, tile=45)
    np.testing.assert_array_equal(again, dream)


def test_a_picture_smaller_than_the_network_takes_is_refused(variables: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match="14x30"):
        deep_dream(MODEL, variables, np.zeros((14, 30, 3), np.uint8))


@pytest.mark.parametrize("wrong", [{"octaves": 0}, {"tile": 29}, {"stage": "norm1"}])
def test_an_argument_that_does_not_fit_is_refused_by_name(wrong: dict[str, Any], variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        deep_dream(MODEL, variables, np.zeros((30, 30, 3), np.uint8), **wrong)
    assert not isinstance(error.value, ImageError)


def test_octaves_that_are_too_small_for_the_network_are_left_out(variables: dict[str, Any]) -> None:
    photograph = reference.photographs()[1][:20, :21]
    unchanged = deep_dream(MODEL, variables, photograph, octaves=5000, steps=0)  # 1.4**5000 is no float
    np.testing.assert_allclose(unchanged, photograph / 255, atol=1e-6)
