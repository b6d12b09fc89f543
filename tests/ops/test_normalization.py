"""Local response normalisation against PyTorch's, forwards and backwards."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp
from jax.test_util import check_grads
from proof import relative_error

from flax_googlenet.architecture import NETWORKS
from flax_googlenet.ops.normalization import local_response_norm


@pytest.fixture(scope="module", params=[1, 4, 64])
def activations(request: pytest.FixtureRequest) -> np.ndarray:
    """As large as those of the network, whose first layer reads pixels up to 255: the divisors reach 40."""
    return np.random.default_rng(request.param).normal(0, 1000, (2, 5, 7, request.param))


def response_norm(variant: str) -> Callable[[jax.Array], jax.Array]:
    """Return the local response normalisation of a network."""
    norm = NETWORKS[variant].response_norm
    assert norm
    return lambda x: local_response_norm(x, norm)


CAFFE = torch.nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
INCEPTION5H = torch.nn.LocalResponseNorm(11, alpha=11e-4, beta=0.5, k=2.0)  # PyTorch divides alpha by 11


def pytorch(
    norm: torch.nn.LocalResponseNorm, x: np.ndarray, output_gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    output = norm(tensor)
    output.backward(torch.from_numpy(output_gradient).permute(0, 3, 1, 2))
    return tuple(array.detach().permute(0, 2, 3, 1).numpy() for array in (output, tensor.grad))


@pytest.mark.parametrize(("variant", "norm"), [("bvlc", CAFFE), ("inception5h", INCEPTION5H)])
def test_values_and_gradients_are_pytorchs(
    variant: str, norm: torch.nn.LocalResponseNorm, activations: np.ndarray
) -> None:
    output_gradient = np.random.default_rng(0).standard_normal(activations.shape)
    output, pull_back = jax.vjp(jax.jit(response_norm(variant)), jnp.asarray(activations))
    for ours, theirs in zip(
        (output, pull_back(jnp.asarray(output_gradient))[0]), pytorch(norm, activations, output_gradient), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-14  # 5e-16 measured
    assert np.abs(activations / output).max() > 2  # the test sees the divisors


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_both_modes_of_differentiation_agree_with_differences(mode: Any) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(0, 300, (1, 1, 2, 7)))
    check_grads(jax.jit(response_norm("bvlc")), (x,), order=2, modes=[mode], eps=1e-2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 3e-7), ("bfloat16", 4e-3), ("float16", 5e-4)])
def test_short_dtypes_are_rounded_once(dtype: str, rounding: float) -> None:
    """A sum of squares of 300 would overflow float16."""
    x = jnp.asarray(np.random.default_rng(0).normal(0, 300, (2, 3, 3, 64)), dtype)
    normalise = response_norm("bvlc")
    output, exact = normalise(x), normalise(x.astype(jnp.float64))
    assert output.dtype == x.dtype
    assert np.abs(output.astype(jnp.float64) / exact - 1).max() < rounding
