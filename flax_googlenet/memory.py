"""The C library's memory, in which a CPU computes. Imports nothing but ctypes."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_memory() -> None:
    """Has the C library keep what this process frees, for what it allocates next.

    A training step on a CPU allocates more than a gigabyte and frees it again. By default that goes back to the system,
    and the next step pays for it anew, by hundreds of thousands of page faults. How much faster a step is without them
    stands in the README's table.

    For the rest of the process; call it before JAX computes, as the threads of XLA choose their heaps when they first
    allocate. It does nothing where the C library is not glibc, and nothing for the memory of a GPU or TPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large arrays lie in the heap, too: a mapping of their own would end with them
        mallopt(_M_TRIM_THRESHOLD, -1)  # that heap never shrinks
        mallopt(_M_ARENA_MAX, 1)  # it serves all threads: what one has freed, another takes
