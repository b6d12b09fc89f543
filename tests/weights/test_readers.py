"""What each reader says of a file that another one reads."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flax_googlenet
from flax_googlenet import CheckpointError, StateDictError

READERS = {
    ".caffemodel": flax_googlenet.from_caffe,
    ".pb": flax_googlenet.from_tensorflow,
    ".onnx": flax_googlenet.from_onnx,
    ".pth": flax_googlenet.read_state_dict,
}


@pytest.mark.parametrize("read", READERS.values())
@pytest.mark.parametrize("suffix", [".caffemodel", ".pb", ".onnx", ".ONNX"])
def test_a_file_for_another_reader_is_refused_with_its_name(
    read: Callable[[Path], Any], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"network{suffix}"
    path.write_bytes(b"\x0a\x04name")  # a message of Protocol Buffers without weights
    right = READERS[suffix.lower()]
    with pytest.raises(StateDictError, match=re.escape(f"{path}: ")) as refusal:
        read(path)
    assert (f"flax_googlenet.{right.__name__}(path) reads" in str(refusal.value)) == (read != right)


@pytest.mark.parametrize("suffix", READERS)
def test_load_names_the_reader_of_another_format_and_the_command(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"network{suffix}"
    path.write_bytes(b"\x0a\x04name")
    advice = f"flax_googlenet.{READERS[suffix].__name__}(path)", f"python convert/port_weights.py {path}"
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, advice))):
        flax_googlenet.load(path)
