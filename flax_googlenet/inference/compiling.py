"""Starts the platform that JAX computes on, and compiles for a CPU with the options that make this network fast."""

import functools
import operator
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax import numpy as jnp

from flax_googlenet.errors import GoogLeNetError

P = ParamSpec("P")
R = TypeVar("R")

# Eigen's convolutions instead of those of YNNPACK. On two cores of Zen 3 (AVX2) with jaxlib 0.10.2 that is 1.4x for
# inference and more than 2x for a training step.
_EIGEN_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


class BackendError(GoogLeNetError, RuntimeError):
    """JAX cannot start the platform that it was asked for; the message says what to do."""


def require_backend() -> None:
    """Start the platform that JAX computes on, so that an error comes before any work.

    Raises:
        BackendError: If it cannot start, as ``JAX_PLATFORMS=cuda`` cannot on a machine without a GPU.
    """
    try:
        jax.default_backend()
    except (AssertionError, RuntimeError) as error:  # a bare assertion where the machine has no NVIDIA GPU
        reason = str(error).partition(" (")[0].rstrip(".") or "this machine has no such device"
        advice = "unset it to compute on what this machine has, or set it to cpu"
        asked = jax.config.values["jax_platforms"] or ""
        raise BackendError(f"JAX cannot start with JAX_PLATFORMS={asked}: {reason}; {advice}") from error


def use_compilation_cache() -> None:
    """Keep what XLA compiles in the user's cache folder, unless JAX was given another place for it."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if os.path.isabs(caches):  # it is not if the user has no home
            jax.config.update("jax_compilation_cache_dir", os.path.join(caches, "flax-googlenet", "jax"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options of ``jax.jit`` for a CPU; empty where this jaxlib does not know them."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(operator.pos, compiler_options=_EIGEN_CONVOLUTIONS)(0.0)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):  # an option or a value that this XLA does not know
            raise
        return {}
    return _EIGEN_CONVOLUTIONS


def jit(function: Callable[P, R], donate_argnums: int | tuple[int, ...] = ()) -> Callable[P, R]:
    """``jax.jit`` that compiles with ``compiler_options()`` if JAX's default backend is a CPU.

    Part of what another function's trace computes, it is ``jax.jit`` alone: JAX takes options from the outermost one.
    For ``lower`` and the like, take ``jax.jit`` of what it returns.
    """

    @functools.cache
    def jitted(with_options: bool) -> Callable[P, R]:
        options = compiler_options() if with_options else None
        return jax.jit(function, donate_argnums=donate_argnums, compiler_options=options)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # jax.jit traces all that is computed inside it, jax.grad and jax.vmap what depends on their arguments.
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((jnp.zeros(()), args, kwargs)))
        on_cpu = not traced and jax.default_backend() == "cpu"
        return jitted(with_options=on_cpu)(*args, **kwargs)

    return call
