"""The check that a reader refuses a hostile file at little cost."""

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from flax_googlenet import StateDictError


def assert_refused_cheaply(read: Callable[[Path], object], path: Path, message_length: int) -> None:
    """Check that a reader takes little time and memory for a file, and refuses it in one short line with its path."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(StateDictError) as error:
            read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5  # most of it for tracing the memory
    assert peak < 2**25
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + message_length
