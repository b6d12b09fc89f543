"""Waits for the next batch so that signals are handled meanwhile, and dead or hanging workers are noticed."""

import errno
import gc
import multiprocessing
import queue
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess

import grain
import numpy as np
import psutil
from grain.multiprocessing import SharedMemoryArray

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.training.datasets import DataError

HostBatch = dict[str, np.ndarray]
"""A batch in the memory of the host, by name: ``image``, ``label``, ..., with one row for each image."""

HANG_SECONDS = 600.0
"""Seconds after which a batch is expected never to come, because the input hangs."""

_NOTICE_SECONDS = 10.0  # until a message says that the run waits
_QUIET_SECONDS = 600.0  # after that message, until the next one
_SUSPENDED_SECONDS = 5.0  # after which a suspended worker process is expected never to go on
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 2.0  # for the current batch when a reader is closed
_START_SECONDS = 60.0  # for a worker process to start, however busy the machine is
_LAST_BATCH_SECONDS = 10.0  # for the batches that Grain prefetches when the process ends
_THREAD, _GRAIN_THREAD = "flax-googlenet-reader", "grain-prefetch"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  where Linux keeps the memory that processes share


class WaitStoppedError(GoogLeNetError):
    """The wait for a batch ended without one, because the run was asked to stop."""


class Reader(Iterator[HostBatch]):
    """Iterates over Grain's batches, which a second thread takes one at a time, each when it is asked for.

    The calling thread only waits for a queue, and wakes up five times a second. Grain's own wait would go on
    if a worker hangs, or if a signal handler sets a flag.

    Args:
        batches: Grain's iterator.
        workers: The number of its worker processes.
        stopped: Returns whether to stop waiting. The iterator then raises a WaitStoppedError.
        report: Takes a message if a batch has not come for 10 seconds, at most once in 10 minutes.

    Raises:
        DataError: From the iterator, if a worker process died or has been suspended for 5 seconds, if ``/dev/shm`` is
            full, or if no batch comes within 10 minutes, the time that a network drive has to come back.
    """

    def __init__(
        self,
        batches: grain.DatasetIterator,
        workers: int,
        stopped: Callable[[], bool],
        report: Callable[[str], None],
    ) -> None:
        self._batches, self._workers, self._stopped, self._report = batches, workers, stopped, report
        self._closed, self._quiet_until = False, 0.0
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[HostBatch | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_take, args=(batches, self._requests, self._answers), name=_THREAD, daemon=True
        )
        self._thread.start()

    def __next__(self) -> HostBatch:
        self._requests.put(True)
        waited = suspended = 0.0  # the sums of the waits, so that time in which Ctrl-Z suspends the run does not count
        while True:
            try:
                answer = self._answers.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                waited += _POLL_SECONDS
                suspended = suspended + _POLL_SECONDS if any(map(_is_suspended, _workers())) else 0.0
                self._check_wait(waited, suspended)
                continue
            if isinstance(answer, BaseException):
                raise explained(answer)
            return answer

    def _check_wait(self, waited: float, suspended: float) -> None:
        """Raise an error if the wait must end, and report that it is long, unless a report came not long ago.

        Args:
            waited: Seconds since the batch was asked for.
            suspended: Seconds for which a worker process has been suspended.
        """
        if self._stopped():
            raise WaitStoppedError
        if suspended > _SUSPENDED_SECONDS:
            raise DataError(
                f"a worker process that reads images has been suspended (SIGSTOP) for {_SUSPENDED_SECONDS:g} seconds: "
                "end what suspends it, or choose 0 workers to read the images in the run itself"
            )
        if waited > HANG_SECONDS:
            raise DataError(
                f"no batch came for {HANG_SECONDS / 60:g} minutes: reading the images hangs, for example on a network "
                "drive that is gone"
            )
        if waited > _NOTICE_SECONDS and time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            self._report(
                f"waiting for images: no batch came for {_NOTICE_SECONDS:g} seconds; the run ends if none comes within "
                f"{HANG_SECONDS / 60:g} minutes"
            )

    def close(self) -> None:
        """End the threads and worker processes. Worker processes that hang are killed."""
        if self._closed:
            return
        self._closed = True
        self._requests.put(False)
        self._thread.join(_GRACE_SECONDS)
        deadline = time.monotonic() + (_START_SECONDS if self._workers else 0)
        while self._thread.is_alive() and time.monotonic() < deadline:
            for worker in _workers():
                worker.kill()
            self._thread.join(_POLL_SECONDS)
        if not self._thread.is_alive():  # else Grain itself would wait for ever
            self._batches.close()
            if self._workers:
                _free_shared_memory()

    __del__ = close


def hangs() -> bool:
    """Wait up to 10 seconds for the threads of closed readers, and return whether one still hangs."""
    deadline = time.monotonic() + _LAST_BATCH_SECONDS
    threads = [thread for thread in threading.enumerate() if thread.name.startswith((_THREAD, _GRAIN_THREAD))]
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return any(thread.is_alive() for thread in threads)


def _free_shared_memory() -> None:
    """Delete the shared memory of batches that nobody has taken; what the process leaves at its end is a warning."""
    gc.collect()  # the exceptions that end Grain's iterators hold the last batches in reference cycles
    pool = getattr(SharedMemoryArray, "_del_thread_pool", None)
    if pool is not None:
        with suppress(ValueError):  # the process ends, and the pool has ended already
            pool.apply_async(int).wait(_GRACE_SECONDS)  # after all deletions, as the pool has one thread


def _workers() -> list[BaseProcess]:
    """Return Grain's worker processes of all readers; one that is starting is not among them yet."""
    return [process for process in multiprocessing.active_children() if "prefetch" in process.name]


def _is_suspended(worker: BaseProcess) -> bool:
    try:
        return psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _take(
    batches: Iterator[HostBatch],
    requests: "queue.SimpleQueue[bool]",
    answers: "queue.SimpleQueue[HostBatch | BaseException]",
) -> None:
    """Answer requests in the second thread. It holds no reference to the reader, so that the reader can be deleted."""
    while requests.get():
        try:
            answers.put(next(batches))
        except BaseException as error:
            answers.put(error)


def explained(error: BaseException) -> BaseException:
    """Return a DataError with a way out for a failure of the worker processes, and any other error unchanged."""
    fewer = "choose fewer workers, or 0 to read the images in the run itself"
    no_room = isinstance(error, OSError) and error.errno == errno.ENOSPC
    died = re.search(r"exit code (-?\d+)", str(error)) if isinstance(error, RuntimeError) else None
    if no_room or (died and int(died[1]) == -signal.SIGBUS):
        size = shutil.disk_usage(_SHARED_MEMORY).total / 2**20
        return DataError(
            f"{_SHARED_MEMORY}, the memory through which worker processes hand over their batches, is full at "
            f"{size:.0f} MiB: {fewer}, or give it more (docker run --shm-size=2g)"
        )
    if died and int(died[1]) < 0:
        name = signal.Signals(-int(died[1])).name
        reason = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return DataError(f"a worker process that reads images was killed by {name}{reason}: {fewer}")
    if died:
        return DataError(f"a worker process that reads images ended with status {died[1]}: {fewer}")
    return error
