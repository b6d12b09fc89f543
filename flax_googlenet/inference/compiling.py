"""Start the platform that JAX computes on, and compile for a CPU with the options that make this network fast."""

import functools
import operator
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax import numpy as jnp

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.files import cache_folder

P = ParamSpec("P")
R = TypeVar("R")

# Convolutions by Eigen instead of YNNPACK: inference is 1.4 times as fast and a training step more than 2 times (two
# cores of Zen 3 with AVX2, jaxlib 0.10.2).
_EIGEN_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


class BackendError(GoogLeNetError, RuntimeError):
    """JAX cannot start the platform that ``JAX_PLATFORMS`` names; the message says what to do."""


def require_backend() -> None:
    """Start the platform that JAX computes on, so that a platform that cannot start is reported before any work.

    Raises:
        BackendError: If it cannot start, as with ``JAX_PLATFORMS=cuda`` on a machine without a GPU.
    """
    try:
        jax.default_backend()
    except (AssertionError, RuntimeError) as error:  # JAX fails with a bare assertion if there is no NVIDIA GPU
        reason = str(error).partition(" (")[0].rstrip(".") or "this machine has no such device"
        advice = "unset it to use the devices of this machine, or set it to cpu"
        asked = jax.config.values["jax_platforms"] or ""
        raise BackendError(f"JAX cannot start with JAX_PLATFORMS={asked}: {reason}; {advice}") from error


def use_compilation_cache() -> None:
    """Keep what XLA compiles in the user's cache folder, unless JAX was given another place for it."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_folder()
        if folder is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@functools.cache
def compiler_options() -> dict[str, str]:
    """Return compiler options of ``jax.jit`` for a CPU, or no options if the installed jaxlib does not know them."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(operator.pos, compiler_options=_EIGEN_CONVOLUTIONS)(0.0)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):  # XLA's status for an unknown option or value
            raise
        return {}
    return _EIGEN_CONVOLUTIONS


def jit(function: Callable[P, R], donate_argnums: int | tuple[int, ...] = ()) -> Callable[P, R]:
    """Compile ``function`` as ``jax.jit`` does, with ``compiler_options()`` if JAX's default backend is a CPU.

    Inside another transformation this is plain ``jax.jit``, because JAX takes compiler options only from the outermost
    ``jax.jit``. The result has no method ``lower``: use ``jax.jit(result).lower``.
    """

    @functools.cache
    def jitted(with_options: bool) -> Callable[P, R]:
        options = compiler_options() if with_options else None
        return jax.jit(function, donate_argnums=donate_argnums, compiler_options=options)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Inside jax.jit every new array is a tracer, inside jax.grad and jax.vmap those that depend on the arguments.
        is_outermost = not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((jnp.zeros(()), args, kwargs)))
        return jitted(with_options=is_outermost and jax.default_backend() == "cpu")(*args, **kwargs)

    return call
