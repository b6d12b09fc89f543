"""What programs for each platform contain, lowered on a machine that may have none of them."""

import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.ops import platforms
from flax_googlenet.ops.pooling import max_pool
from flax_googlenet.training import create_train_state, train_step

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
IMAGES = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)  # conv3 has 16x16 pixels, enough for Winograd's algorithm

# How a line of a program shows one of the ways to compute an operation.
WINOGRAD = re.compile(r"dot_general.*tensor<6x6x")  # a product of tiles
XLA_POOL_GRADIENT = re.compile("select_and_scatter")
MASKS = re.compile("compare.*xi16>")  # of places in a window
BLOCKED_DOT = re.compile("dot_general.*tensor<16x64x1000x")  # for 1,024 values


@pytest.fixture(scope="module")
def step() -> jax.stages.Traced:
    shapes = flax_googlenet.model.variable_shapes(GoogLeNet())
    state = jax.eval_shape(lambda variables: create_train_state(GoogLeNet(), variables, optax.sgd(0.1)), shapes)
    batch = {"image": IMAGES, "label": jax.ShapeDtypeStruct((2,), jnp.int32)}
    return jax.jit(train_step).trace(state, batch, jax.eval_shape(lambda: jax.random.key(0)))


def contents(traced: jax.stages.Traced, *lowering_platforms: str) -> set[re.Pattern[str]]:
    """Return which of the ways to compute an operation are in a program."""
    program = traced.lower(lowering_platforms=lowering_platforms).as_text()
    return {way for way in (WINOGRAD, XLA_POOL_GRADIENT, MASKS, BLOCKED_DOT) if way.search(program)}


@pytest.mark.slow
def test_a_training_step_has_the_ways_of_the_platform_it_is_lowered_for(step: jax.stages.Traced) -> None:
    assert {platform: contents(step, platform) for platform in PLATFORMS} == {
        "cpu": {WINOGRAD, MASKS, BLOCKED_DOT},
        "cuda": {MASKS},
        "rocm": {MASKS},
        "tpu": {XLA_POOL_GRADIENT},
    }


def test_inference_has_plain_convolutions_everywhere() -> None:
    model = GoogLeNet()
    traced = jax.jit(lambda v, x: model.apply(v, x).logits).trace(flax_googlenet.model.variable_shapes(model), IMAGES)
    ways = {platform: contents(traced, platform) for platform in PLATFORMS}
    assert ways == {"cpu": {BLOCKED_DOT}, "cuda": set(), "rocm": set(), "tpu": set()}


def test_where_a_program_is_traced_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = jax.jit(jax.grad(lambda x: max_pool(x, 3, 2).sum())).trace(jax.ShapeDtypeStruct((1, 9, 9, 1), jnp.float32))
    assert contents(traced, "tpu") == {XLA_POOL_GRADIENT}
    assert contents(traced, "cpu") == {MASKS}


def test_a_gradient_saves_nothing_for_other_platforms() -> None:
    def function(x: Any) -> Any:
        return platforms.choose(PLATFORMS, jnp.sin, lambda x: jnp.exp(jnp.sin(x) * x), x)

    compiled = jax.jit(jax.grad(lambda x: function(x).sum())).lower(jnp.ones(1000)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize("transform", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_a_choice_has_the_derivatives_of_its_platform(transform: Any) -> None:
    def function(x: Any) -> Any:
        return platforms.choose(PLATFORMS, jnp.sin, jnp.exp, x)

    x = jnp.linspace(0.0, 1.0, 5)
    values, slopes = transform(jax.vmap(jax.value_and_grad(function)))(x)
    tangents = transform(lambda x: jax.jvp(function, (x,), (x,)))(x)[1]
    with jax.disable_jit():
        uncompiled = jax.vmap(jax.grad(function))(x)
    for actual, expected in (
        (values, jnp.sin(x)),
        (slopes, jnp.cos(x)),
        (tangents, x * jnp.cos(x)),
        (uncompiled, slopes),
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-15)  # no difference measured
