"""The C library keeps memory in a process that asks for it, and in no other."""

import subprocess
import sys

import pytest

MEGABYTES_LEFT = """
import sys
import numpy as np
from pathlib import Path
from flax_googlenet.training import keep_memory

def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024

if "keep" in sys.argv:
    keep_memory()
before = resident()
np.ones(200 << 17)  # 200 MB, freed at once
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")
def test_what_is_freed_stays_with_the_process_once_it_keeps_memory() -> None:
    def left(*arguments: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", MEGABYTES_LEFT, *arguments]))

    assert left("keep") > 190
    assert left() < 10
