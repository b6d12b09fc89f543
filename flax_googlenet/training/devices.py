"""The devices of a run, on one host or many: their mesh, and how arrays lie on it."""

import atexit
import ctypes
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_googlenet.commands.status import CommandError, Status
from flax_googlenet.inference.compiling import compiler_options

_HEARTBEAT_SECONDS = 30  # a process that is silent for so long is taken for dead


class Devices:
    """All devices of all processes, in a mesh of one axis, ``batch``; each process calls each method."""

    def __init__(self) -> None:
        # Auto: XLA decides how what lies between is split, as ever; Explicit asks the model to say it.
        mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("batch"))
        self.share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self._compiler_options = compiler_options() if jax.default_backend() == "cpu" else {}

    def __str__(self) -> str:
        of_processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"{jax.device_count()} {jax.devices()[0].device_kind}{of_processes}"

    def replicate(self, tree: Any) -> Any:
        """The arrays, the same in each process, on every device."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._replicated, x, x.shape), tree)

    def shapes(self, tree: Any) -> Any:
        """The same of shapes and dtypes."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), tree)

    def split(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """One batch of all processes, from the rows of each; the devices must divide its length."""
        return {name: jax.make_array_from_process_local_data(self._split, x) for name, x in batch.items()}

    def jit(self, function: Callable[..., Any], donate: tuple[int, ...] = ()) -> jax.stages.Wrapped:
        """``jax.jit`` of what maps arrays from ``replicate`` and ``split`` to arrays that every device has."""
        return jax.jit(
            function,
            donate_argnums=donate,
            out_shardings=self._replicated,
            compiler_options=self._compiler_options or None,
        )


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """End this process with a status of ours when JAX aborts it because another process of the run is gone.

    JAX aborts in C++, in a thread of its own, where Python runs no signal handler. So the C library calls this one.
    """
    with suppress(OSError):  # nobody reads standard error any more
        os.write(
            2,
            b"error: JAX ended this process, most likely because another process of the run is gone (its own words are "
            b"above): start all of them again, to go on from the last checkpoint\n",
        )
    os._exit(Status.GAVE_UP)


@contextmanager
def joined() -> Iterator[None]:
    """Makes this process one of several, as Slurm, Open MPI, Kubernetes, a TPU's host or JAX_* variables tell it.

    Raises:
        CommandError: if the environment does not tell the others, or they do not come.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None and not re.fullmatch(r"(.*[^:\]]|\[.+\]):\d{1,5}", address):
        raise _refused(f"JAX_COORDINATOR_ADDRESS={address} is not a host and a port, such as 10.0.0.1:1234.")
    num_processes, process_id = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    errors: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                num_processes=num_processes, process_id=process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
            )
        except Exception as error:
            errors.append(error)

    # In a thread, for it waits up to 5 minutes for the others, and Python hears signals in the main thread alone.
    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors and not isinstance(errors[0], (ValueError, RuntimeError)):
        raise errors[0]
    if errors:
        raise _refused(str(errors[0]).splitlines()[0]) from errors[0]
    # JAX has just put its own handler for SIGTERM in place, for a service that is not used here: SIGTERM would do
    # nothing.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    try:
        yield
    except BaseException as error:
        # At the end of a process JAX waits for the others; one that failed must not, for they wait for it.
        atexit.register(os._exit, error.status if isinstance(error, CommandError) else Status.CRASHED)
        raise


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not re.fullmatch(r"\d+", text):
        raise _refused(f"{variable}={text} is not a number.")
    return None if text is None else int(text)


def _refused(reason: str) -> CommandError:
    return CommandError(
        Status.NOT_DONE,
        f"--distributed: {reason} Start it by srun or mpirun, in a Kubernetes job, on TPUs, or set "
        "JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
