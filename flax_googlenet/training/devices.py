"""The devices that a run trains on: how arrays are placed on them, and how several processes share one run."""

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.inference.compiling import compiler_options

_HEARTBEAT_SECONDS = 30  # a process that sends nothing for so long counts as dead


class DistributedError(GoogLeNetError, RuntimeError):
    """The processes of a distributed run do not find each other; the message says how to start them."""


class Devices:
    """All devices of all processes, as a mesh with the single axis ``batch``.

    Every process must call each method, with the same shapes and dtypes.

    Attributes:
        share: Which part of each batch this process reads: the arguments ``process_index`` and ``process_count`` of
            ``train_batches`` and ``eval_batches``.
    """

    def __init__(self) -> None:
        # With Auto axes XLA decides how intermediate arrays are split; Explicit axes would make the model say it.
        mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("batch"))
        self.share = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def __str__(self) -> str:
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"{jax.device_count()} {jax.devices()[0].device_kind}{processes}"

    def replicate(self, tree: Any) -> Any:
        """Copy arrays, which must be equal in all processes, to every device."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._replicated, x, x.shape), tree)

    def shapes(self, tree: Any) -> Any:
        """Return the shapes and dtypes of a tree, with the sharding of ``replicate``."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), tree)

    def split(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Join each process's rows to one global batch, split over the devices, whose number must divide its length."""
        return {name: jax.make_array_from_process_local_data(self._split, x) for name, x in batch.items()}

    def jit(self, function: Callable[..., Any], donate: tuple[int, ...] = ()) -> jax.stages.Wrapped:
        """Return ``jax.jit`` of a function of arrays from ``replicate`` and ``split``; every device gets its results.

        ``donate`` is ``donate_argnums`` of ``jax.jit``.
        """
        return jax.jit(
            function,
            donate_argnums=donate,
            out_shardings=self._replicated,
            compiler_options=compiler_options(jax.default_backend()) or None,
        )


@contextmanager
def joined() -> Iterator[None]:
    """Make this process one of several that train together, as the environment describes them.

    Slurm, Open MPI, Kubernetes, the host of a TPU, or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID describe the processes. At the end of the block this process waits for the others. After an exception
    in the block it does not wait, because the others may be waiting for it.

    Raises:
        DistributedError: If the environment does not describe the other processes, or they do not come.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None and not re.fullmatch(r"(.*[^:\]]|\[.+\]):\d{1,5}", address):
        raise _cannot_join(f"JAX_COORDINATOR_ADDRESS={address} is not a host and a port, such as 10.0.0.1:1234.")
    num_processes, process_id = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    initialize = partial(
        jax.distributed.initialize,
        num_processes=num_processes,
        process_id=process_id,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    # JAX waits up to 5 minutes for the others. In a thread: Python handles signals in the main thread alone.
    with ThreadPool(1) as pool:
        try:
            pool.apply(initialize)
        except (ValueError, RuntimeError) as error:
            raise _cannot_join(str(error).splitlines()[0]) from error
    # JAX has just replaced the handler of SIGTERM in C++, for a service that is not used here. Python's is put back.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    yield
    jax.distributed.shutdown()


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not re.fullmatch(r"\d+", text):
        raise _cannot_join(f"{variable}={text} is not a number.")
    return None if text is None else int(text)


def _cannot_join(reason: str) -> DistributedError:
    return DistributedError(
        f"distributed: {reason} Start it by srun or mpirun, in a Kubernetes job, on TPUs, or set "
        "JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    )
