"""Folding BatchNorm into the convolutions, against torchvision's network with BatchNorm."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import reference
from jax import numpy as jnp
from proof import relative_error
from torchvision.models import GoogLeNet as TorchGoogLeNet

from flax_googlenet import GoogLeNet, fold_batch_norm

Images = Callable[..., np.ndarray]
MODEL = GoogLeNet()
MODEL64 = GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64)


@pytest.mark.slow
def test_folded_network_is_the_same_function(
    variables64: dict[str, Any], torch64: TorchGoogLeNet, random_images: Images
) -> None:
    images = random_images(2, 64, 64)
    model, folded = fold_batch_norm(MODEL64, variables64)
    assert not model.batch_norm
    assert folded.keys() == {"params"}
    logits = jax.jit(model.apply)(folded, images).logits
    assert relative_error(logits, reference.stages(torch64, images)["fc"]) < 1e-13  # measured: 1.7e-14


def test_folded_variables_are_those_that_the_folded_network_initialises(variables: dict[str, Any]) -> None:
    model, folded = fold_batch_norm(MODEL, variables)
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 15, 15, 3), jnp.float32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), folded) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_fold_is_computed_in_float64_and_rounded_once(variables: dict[str, Any], variables64: dict[str, Any]) -> None:
    _, folded = fold_batch_norm(MODEL, variables)
    _, folded64 = fold_batch_norm(MODEL64, variables64)
    jax.tree.map(np.testing.assert_array_equal, folded, jax.tree.map(lambda x: x.astype(np.float32), folded64))


def test_folding_twice_is_folding_once(variables: dict[str, Any]) -> None:
    model, folded = fold_batch_norm(MODEL, variables)
    again, folded_again = fold_batch_norm(model, folded)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, folded, folded_again)
