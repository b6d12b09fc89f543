"""The manifest of a folder: no change to any of its files goes unnoticed, and none is seen where there is none."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from flax_googlenet.training.manifest import damage, seal

FILES = ("extra.json", "state/d/0a", "state/d/0b", "state/empty", "state/manifest.ocdbt", "manifest.sha256")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for name in FILES[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "state/empty" else rng.randbytes(300))
    seal(tmp_path)
    assert damage(tmp_path) is None
    return tmp_path


@pytest.mark.parametrize("name", [name for name in FILES if name != "state/empty"])
def test_a_flipped_bit_anywhere_is_noticed(sealed: Path, name: str) -> None:
    rng, path = random.Random(name), sealed / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found = damage(sealed)
        assert found is not None, place
        assert name == "manifest.sha256" or name in found
    path.write_bytes(whole)
    assert damage(sealed) is None


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("change", [cut, empty, lengthen, Path.unlink])
def test_a_file_cut_emptied_lengthened_or_missing_is_noticed(sealed: Path, change: Callable[[Path], None]) -> None:
    for name in FILES:
        if name == "state/empty" and change in (cut, empty):
            continue
        whole = (sealed / name).read_bytes()
        change(sealed / name)
        assert name in (damage(sealed) or "")
        (sealed / name).write_bytes(whole)
    assert damage(sealed) is None


def test_a_file_too_many_is_noticed(sealed: Path) -> None:
    (sealed / "state" / "d" / "another").touch()
    assert damage(sealed) == "not as manifest.sha256 has it: state/d/another"
