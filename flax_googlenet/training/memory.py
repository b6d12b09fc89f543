"""The C library's memory, in which a CPU computes."""

import ctypes
import functools
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX records it after each compilation
_LONG = 1  # second; a training step takes half a minute, and what shorter ones leave is little


@functools.cache  # a second call would register a second listener
def keep_memory() -> None:
    """Has the C library keep what this process frees, for what it allocates next.

    A training step on a CPU allocates more than a gigabyte and frees it again. By default that goes back to the system,
    and the next step pays for it anew, by hundreds of thousands of page faults. How much faster a step is without them
    stands in the README's table. The memory in which JAX has compiled is kept out of the way of the steps.

    For the rest of the process; call it before JAX computes, as the threads of XLA choose their heaps when they first
    allocate. It does nothing where the C library is not glibc, and nothing for the memory of a GPU or TPU.
    """
    if tune_malloc():
        import jax  # not above: a process without JAX can tune its malloc, too

        jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def tune_malloc() -> bool:
    """Tells glibc to keep in one heap what is freed; returns False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt(_M_MMAP_MAX, 0)  # large arrays lie in the heap, too: a mapping of their own would end with them
    mallopt(_M_TRIM_THRESHOLD, -1)  # that heap never shrinks
    mallopt(_M_ARENA_MAX, 1)  # it serves all threads: what one has freed, another takes
    return True


def _after_compiling(event: str, duration_secs: float, **_: Any) -> None:
    if event == _COMPILED and duration_secs > _LONG:
        _retire_holes()


class _Mallinfo2(ctypes.Structure):
    _fields_ = [("counts", ctypes.c_size_t * 10)]
    free_bytes = property(lambda self: self.counts[8])  # fordblks in malloc.h


def _retire_holes() -> None:
    """Takes what is free in the heap now out of use; its memory goes back to the system.

    A compiler leaves tens of thousands of holes, of all sizes, and to find one that fits, malloc walks through long
    lists, with the heap locked: 6 % of the CPU time of a training step by perf, and a sixth of its time, on two cores
    with AVX-512. Retired, they are addresses, and the next step takes memory above them.
    """
    libc = ctypes.PyDLL(None)  # keeps Python's lock: to take it back after each of so many calls may be slow
    if not hasattr(libc, "mallinfo2"):  # before glibc 2.33
        return
    libc.mallinfo2.restype = _Mallinfo2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_void_p]

    libc.malloc_trim(0)
    end = libc.sbrk(0)
    for size in (2**i for i in range(20, 12, -1)):  # to 8 KiB: with those below 32 KiB a step takes 2 % less
        # No more than glibc has free: another library may have replaced its malloc.
        for _ in range(libc.mallinfo2().free_bytes // size):
            block = libc.malloc(size)  # never written: only its header takes memory
            if block is None or block + size > end:
                libc.free(block)
                break
