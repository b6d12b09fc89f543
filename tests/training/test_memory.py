"""glibc keeps freed memory in a process that calls ``keep_memory``, and in no other."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import ctypes, threading
from pathlib import Path

{}

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]


def allocate_and_free(size):
    address = libc.malloc(size)
    lines = Path("/proc/self/maps").read_text().splitlines()
    heap = [range(*(int(x, 16) for x in line.split()[0].split("-"))) for line in lines if line.endswith("[heap]")]
    results.append(any(address in x for x in heap))
    libc.free(address)


def resident_megabytes():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


results = []
allocate_and_free(100 * 2**20)
thread = threading.Thread(target=allocate_and_free, args=[1000])
thread.start()
thread.join()
blocks = (ctypes.c_void_p * 1600)()  # allocated first: above the blocks in the heap, it would keep it from shrinking
before = resident_megabytes()
for i in range(1600):
    blocks[i] = libc.malloc(2**16)  # 100 MB in all
    ctypes.memset(blocks[i], 1, 2**16)
for block in blocks:
    libc.free(block)
results.append(resident_megabytes() - before > 90)
print(*results)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory changes glibc alone")
@pytest.mark.parametrize(
    ("statement", "keeps"),
    [
        ("", "False"),
        ("from flax_googlenet.training import keep_memory; keep_memory()", "True"),
        ("from flax_googlenet.commands import cli; cli.main(['train', 'missing', '--workdir', 'run'])", "True"),
    ],
    ids=["another process", "keep_memory", "the command train"],
)
def test_large_arrays_and_those_of_all_threads_lie_in_one_heap_that_does_not_shrink(
    statement: str, keeps: str, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", MEASURE.format(statement)]
    results = subprocess.check_output(command, env=environment, cwd=tmp_path, text=True).split()
    assert results == [keeps, keeps, keeps]
