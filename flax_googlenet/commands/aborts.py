"""How a process of a distributed run ends when JAX aborts it."""

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flax_googlenet.commands.status import Status


@contextmanager
def aborts_in_one_line() -> Iterator[None]:
    """End this process with one line and status GAVE_UP if JAX aborts it while the block runs.

    JAX aborts each process of a run when another one is gone. jaxlib writes dozens of lines to file descriptor 2, the
    reason and a C++ stack trace, and then calls ``abort`` in a thread of its own. Python cannot come before it: jaxlib
    accepts a Python callback, but cannot convert the C++ status that it calls it with. Therefore descriptor 2 is a
    temporary file during the block, Python's standard error is a copy of the original, and the C library calls the
    handler of SIGABRT itself, because Python runs handlers in the main thread alone.

    At the end of the block standard error gets what is in the file, unless the run failed and is still joined to the
    other processes. Then JAX may abort it while the command prints its message, and the abort waits.
    """
    import jax  # imported late: the command line is faster without it

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number: int) -> None:
        try:
            file, path = tempfile.mkstemp(".txt", "flax-googlenet-jax-")
            log.seek(0)
            os.write(file, log.read())
            reason = f"most likely because another process of the run is gone (JAX's log is in {path})"
            advice = "start all of them again, to go on from the last checkpoint"
            os.write(original, f"error: JAX ended this process, {reason}: {advice}\n".encode())
        finally:
            os._exit(Status.GAVE_UP)

    libc = ctypes.CDLL(None)
    original, log = os.dup(2), tempfile.TemporaryFile("a+b")  # noqa: SIM115  open until the process ends
    sys.stderr.flush()
    stderr, sys.stderr = sys.stderr, os.fdopen(original, "w", 1, "utf-8", "backslashreplace")
    os.dup2(log.fileno(), 2)
    libc.signal(signal.SIGABRT, on_abort)
    try:
        yield
    finally:
        if jax.distributed.is_initialized():
            libc.signal(signal.SIGABRT, libc.pause)
        else:
            libc.signal(signal.SIGABRT, signal.SIG_DFL)
            sys.stderr.flush()
            os.dup2(original, 2)
            sys.stderr = stderr  # closes the copy
            log.seek(0)
            with suppress(BrokenPipeError):  # nobody reads standard error any more
                sys.stderr.write(log.read().decode(errors="backslashreplace"))
                sys.stderr.flush()
