"""jax.jit with options for a CPU: the same function inside and outside other transformations."""

import operator

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from flax_googlenet.inference import compiling
from flax_googlenet.inference.compiling import compiler_options, jit


def test_this_xla_takes_the_compiler_options() -> None:
    assert compiler_options("cpu")
    assert compiler_options("tpu") == {}
    for options in compiling._OPTIONS.values():  # XLA for a CPU refuses a wrong value of a GPU's option, too
        assert jax.jit(operator.pos, compiler_options=options)(1.0) == 1


def test_xla_gets_the_options_and_inside_another_jit_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiler_options", lambda platform: {"xla_no_such_option": "1"})
    double = jit(lambda x: x + x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        double(1.0)
    assert jax.jit(double)(1.0) == 2


def test_it_can_be_part_of_any_transformation() -> None:
    """JAX refuses compiler options in any jax.jit but the outermost."""
    square = jit(lambda x: (x * x).sum())
    x = jnp.arange(3.0)
    assert square(x) == 5
    assert jax.jit(square)(x) == 5
    assert jax.jit(lambda: square(x))() == 5  # traced, though no argument is
    assert jax.eval_shape(square, x).shape == ()
    np.testing.assert_array_equal(jax.grad(square)(x), 2 * x)
    np.testing.assert_array_equal(jax.vmap(square)(jnp.stack([x, 2 * x])), [5, 20])


def test_it_donates_as_jax_jit_does() -> None:
    add = jit(lambda x, y: x + y, donate_argnums=0)
    x, y = jnp.ones(3), jnp.ones(3)
    np.testing.assert_array_equal(add(x, y), [2, 2, 2])
    assert x.is_deleted()
    assert not y.is_deleted()
