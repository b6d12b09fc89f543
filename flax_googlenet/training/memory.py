"""The C library's memory, which a CPU computes in."""

import ctypes

# Of malloc.h: M_MMAP_MAX, no block of memory from the system for one array alone; M_TRIM_THRESHOLD, nothing is given
# back; M_ARENA_MAX, one heap for all threads.
_OPTIONS = {-4: 0, -1: -1, -8: 1}


def keep_memory() -> None:
    """Has the C library keep what this process frees, for what it allocates next.

    A training step on a CPU allocates more than a gigabyte and frees it again. By default that goes back to the
    system, and the next step pays for it anew, by hundreds of thousands of page faults. Kept, a step of 16 images on
    two cores is 1.2 times as fast, and the peak 40 % lower, as all threads share one heap.

    For the rest of the process; call it before JAX computes anything. It does nothing where the C library is not
    glibc, and nothing for the memory of a GPU or TPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _OPTIONS.items():
            mallopt(option, value)
