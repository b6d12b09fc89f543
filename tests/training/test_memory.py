"""The C library keeps memory in a process that asks for it, and in no other."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = """
import ctypes, threading
from pathlib import Path

{}

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]


def in_heap(size):
    address = libc.malloc(size)
    lines = Path("/proc/self/maps").read_text().splitlines()
    heap = [range(*(int(x, 16) for x in line.split()[0].split("-"))) for line in lines if line.endswith("[heap]")]
    found.append(any(address in x for x in heap))
    libc.free(address)


def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


found = []
in_heap(100 * 2**20)
thread = threading.Thread(target=in_heap, args=[1000])
thread.start()
thread.join()
blocks = (ctypes.c_void_p * 1600)()  # made first: what lies above them in the heap would keep it from shrinking
before = resident()
for i in range(1600):
    blocks[i] = libc.malloc(2**16)  # 100 MB in all
    ctypes.memset(blocks[i], 1, 2**16)
for block in blocks:
    libc.free(block)
found.append(resident() - before > 90)
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that can be told to keep memory")
@pytest.mark.parametrize(
    ("statement", "keeps"),
    [
        ("", "False"),
        ("from flax_googlenet.training import keep_memory; keep_memory()", "True"),
        ("from flax_googlenet import cli; cli.main(['train', 'missing', '--workdir', 'run'])", "True"),
    ],
    ids=["a process", "one that asks for it", "the train command"],
)
def test_one_heap_keeps_what_is_freed_where_that_is_asked_for(statement: str, keeps: str, tmp_path: Path) -> None:
    """A large array and one of another thread lie in the heap, and the heap stays as large as it was."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", SHOW.format(statement)]
    shown = subprocess.check_output(command, env=environment, cwd=tmp_path, text=True).split()
    assert shown == [keeps, keeps, keeps]


HOLES = """
import ctypes
import jax
from flax_googlenet.training import keep_memory

keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]


def allocate(count):
    blocks = [libc.malloc(2**16) for _ in range(count)]
    assert None not in blocks
    return blocks


def free(blocks):
    for block in blocks:
        libc.free(block)


def reused(blocks):
    again = allocate(len(blocks))
    free(again)
    return len({*blocks} & {*again}) / len(blocks)


compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiled.append((event, seconds)))
jax.jit(lambda x: x + 1)(1)
(event, seconds), = [x for x in compiled if "backend_compile" in x[0]]
assert 0 < seconds < 1, "or this machine is too slow for the test"

blocks = allocate(8000)
holes = blocks[::2]  # neighbours would become one
free(holes)
for seconds in (0.9, 1.1):
    jax.monitoring.record_event_duration_secs(event, seconds)
    print(reused(holes))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that can be told to keep memory")
def test_after_a_long_compilation_the_holes_in_the_heap_are_out_of_use() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    shown = subprocess.check_output([sys.executable, "-c", HOLES], env=environment, text=True)
    before, after = map(float, shown.split())
    assert before > 0.9  # JAX itself takes some
    assert after == 0
