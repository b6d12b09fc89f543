"""The C library's memory, in which a CPU computes."""

import ctypes
import functools
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_COMPILED = "/jax/core/compile/backend_compile_duration"  # what JAX calls the end of a compilation


@functools.cache
def keep_memory() -> None:
    """Has the C library keep what this process frees, for what it allocates next.

    A training step on a CPU allocates more than a gigabyte and frees it again. By default that goes back to the system,
    and the next step pays for it anew, by hundreds of thousands of page faults. How much faster a step is without them
    stands in the README's table. What compiling leaves behind is kept out of its way.

    For the rest of the process; call it before JAX computes, as the threads of XLA choose their heaps when they first
    allocate. It does nothing where the C library is not glibc, and nothing for the memory of a GPU or TPU.
    """
    if keep_freed():
        import jax  # here, for those who want only keep_freed

        jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def keep_freed() -> bool:
    """``keep_memory`` of a process that compiles nothing. Whether the C library is one that can be told so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt(_M_MMAP_MAX, 0)  # large arrays lie in the heap, too: a mapping of their own would end with them
    mallopt(_M_TRIM_THRESHOLD, -1)  # that heap never shrinks
    mallopt(_M_ARENA_MAX, 1)  # it serves all threads: what one has freed, another takes
    return True


def _after_compiling(event: str, duration_secs: float, **_: Any) -> None:
    if event == _COMPILED and duration_secs > 1:
        _retire_holes()


def _retire_holes() -> None:
    """Takes what is free in the heap now out of use; nearly all of it goes back to the system.

    A compiler leaves ten thousands of holes of all sizes, and to find one that fits, malloc walks through lists of
    them: a tenth of a step, measured. Retired, they are addresses, and the next step takes memory above them.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.malloc_trim(0)
    end = libc.sbrk(0)
    for size in (2**i for i in range(20, 12, -1)):  # to 8 KiB: below, the lists are short
        while (address := libc.malloc(size)) and address + size <= end:
            pass  # never written, so without memory but for the page of its header
        libc.free(address)  # from above the holes
