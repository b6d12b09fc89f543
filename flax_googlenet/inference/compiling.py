"""Start the platform that JAX computes on, and compile with the options that make this network fast there."""

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

_OPTIONS = {
    # Convolutions by Eigen instead of YNNPACK: inference is 1.4 times as fast and a training step more than 2 times
    # (two cores of Zen 3 with AVX2, jaxlib 0.10.2).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    # jaxlib 0.11.2's list of what runs in CUDA graphs, and convolutions, which it leaves out: starting each of their
    # kernels takes longer than most of them run. Inference in bfloat16 is 4.5 times as fast for one image and 2.5 times
    # for 32, and a training step of 64 images 1.7 times (one NVIDIA H200, jaxlib 0.11.2).
    "gpu": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION"
    },
}


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
def compiler_options(platform: str) -> dict[str, str]:
    """Return compiler options of ``jax.jit`` for a platform; none if the installed jaxlib does not know them.

    Args:
        platform: JAX's name of the platform, such as "cpu" or "gpu".
    """
    options = _OPTIONS.get(platform)
    if options is None:
        return {}
    try:
        with jax.default_device(jax.local_devices(backend=platform)[0]):
            jax.jit(operator.pos, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):  # XLA's status for an unknown option or value
            raise
        return {}
    return options


def jit(function: Callable[P, R], donate_argnums: int | tuple[int, ...] = ()) -> Callable[P, R]:
    """Compile ``function`` as ``jax.jit`` does, with the ``compiler_options`` of JAX's default backend.

    Inside another transformation this is plain ``jax.jit``, because JAX takes compiler options only from the outermost
    ``jax.jit``. The result has no method ``lower``: use ``jax.jit(result).lower``.
    """

    @functools.cache
    def jitted(with_options: bool) -> Callable[P, R]:
        options = compiler_options(jax.default_backend()) if with_options else None
        return jax.jit(function, donate_argnums=donate_argnums, compiler_options=options)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Inside jax.jit every new array is a tracer, inside jax.grad and jax.vmap those that depend on the arguments.
        is_outermost = not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((jnp.zeros(()), args, kwargs)))
        return jitted(with_options=is_outermost)(*args, **kwargs)

    return call
