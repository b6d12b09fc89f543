"""Random files of PyTorch's are read as PyTorch reads them, bit for bit, in both formats.

EXAMPLES=2000 pytest tests/weights/test_pth_like_torch.py tries 2,000 files instead of 100.
"""

import collections
import decimal
import fractions
import functools
import io
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from flax_googlenet import StateDictError
from flax_googlenet.weights import pth
from flax_googlenet.weights.state_dicts import find_state_dict

EXAMPLES = int(os.environ.get("EXAMPLES", "100"))

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
ZIP_DTYPES = (*DTYPES, torch.uint16, torch.uint32, torch.uint64)  # PyTorch cannot read them in the legacy format
LAYERS = [
    f"inception{block}.branch{branch}.{layer}.{kind}"
    for block in ("3a", "3b", "4a", "4b", "4c")
    for branch, layers in (("1", ("conv", "bn")), ("2", ("0.conv", "0.bn", "1.conv", "1.bn")))
    for layer in layers
    for kind in ("weight", "bias", "running_mean", "running_var")
]
"""Enough of torchvision's names for a GoogLeNet to be recognised."""


@st.composite
def storages(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    dtype = draw(st.sampled_from(dtypes))
    values = np.frombuffer(draw(st.binary(min_size=0, max_size=24)) * 16, np.uint8)
    if dtype == torch.bool:
        return torch.from_numpy(values % 2 == 1)
    values = values[: len(values) // dtype.itemsize * dtype.itemsize].copy()
    return torch.from_numpy(values).view(dtype) if len(values) else torch.empty(0, dtype=dtype)


@st.composite
def views(draw: st.DrawFn, storage: torch.Tensor) -> torch.Tensor:
    """Return a tensor with any shape and strides that does not repeat its storage."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [draw(st.integers(0, 6)) for _ in shape]
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last >= len(storage) or np.prod(shape) > len(storage)):
        return storage  # as it is
    room = 0 if 0 in shape else len(storage) - 1 - last
    tensor = storage.as_strided(shape, strides, draw(st.integers(0, room)))
    if draw(st.integers(0, 3)) == 0:
        return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and draw(st.booleans()))
    return tensor


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=5),
    st.binary(min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([1, 2]), 1j, {1, 2}, bytearray(b"x")]),
)
BESIDE = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(), st.floats(), st.none()), inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=5,
)


@st.composite
def contents(draw: st.DrawFn) -> tuple[Any, bool]:
    """Return a state dict or a training checkpoint, and whether to save it as a zip."""
    is_zip = draw(st.booleans())
    blocks = draw(st.lists(storages(ZIP_DTYPES if is_zip else DTYPES), min_size=1, max_size=3))
    tensors = [draw(views(draw(st.sampled_from(blocks)))) for _ in range(draw(st.integers(1, 5)))]
    if draw(st.booleans()):
        names = LAYERS
    else:
        names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True))
    prefix = draw(st.sampled_from(["", "", "module.", "model.net.", "_orig_mod."]))
    state_dict: dict[Any, Any] = {prefix + name: tensors[i % len(tensors)] for i, name in enumerate(names)}
    if draw(st.booleans()):
        state_dict = collections.OrderedDict(state_dict)
        state_dict._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    if draw(st.booleans()):
        state_dict["n_averaged"] = torch.tensor(3)
    content: Any = state_dict
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(["model", "state_dict", "state"]))
        content = {"epoch": draw(BESIDE), key: content, "best": draw(BESIDE), "loss": draw(st.sampled_from(tensors))}
    if draw(st.booleans()) and content is not state_dict:
        content["ema"] = dict(state_dict)
    return content, is_zip


def edited(data: bytes, location: bytes, is_big_endian: bool) -> bytes:
    """Return a file of ``torch.save`` as another device, or a machine with the other byte order, would write it."""

    def relocate(pickled: bytes) -> bytes:
        return pickled.replace(b"X\3\0\0\0cpu", b"X" + len(location).to_bytes(4, "little") + location)

    if not zipfile.is_zipfile(io.BytesIO(data)):
        return relocate(data)
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            entry = source.read(name)
            if name == "archive/data.pkl":
                entry = relocate(entry)
            if name == "archive/byteorder" and is_big_endian:
                entry = b"big"
            target.writestr(name, entry)
    return result.getvalue()


def same(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    if theirs.dtype == torch.bfloat16:
        ours, theirs = ours.view(np.int16), theirs.view(torch.int16)
    expected = theirs.detach().numpy()
    return ours.dtype == expected.dtype and ours.shape == expected.shape and ours.tobytes() == expected.tobytes()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content_and_format=contents(),
    protocol=st.sampled_from([2, 2, 3, 4, 5]),
    location=st.sampled_from([b"cpu", b"cpu", b"mps", b"cuda:0"]),
    is_big_endian=st.booleans(),
    key=st.sampled_from([*[None] * 6, "model", "state_dict", "ema", "state.model"]),
)
def test_a_random_file_is_read_as_pytorch_reads_it(
    content_and_format: tuple[Any, bool], protocol: int, location: bytes, is_big_endian: bool, key: str | None
) -> None:
    content, is_zip = content_and_format
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    # A longer word would need another length in the frames of protocols 4 and 5.
    data = edited(buffer.getvalue(), location if protocol < 4 or location == b"mps" else b"cpu", is_big_endian)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        path = Path(folder) / "model.bin"
        path.write_bytes(data)
        # With weights_only, PyTorch reads protocol 2 alone. From a path, it takes a legacy file for a zip if one of its
        # tensors has the first bytes of a zip at a certain place.
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=protocol == 2)
        try:
            expected = find_state_dict(loaded, key).state_dict
        except ValueError:
            with pytest.raises(StateDictError):
                pth.read(path, key)
            event("nothing to read")
            return
        found = pth.read(path, key)
    assert list(found.state_dict) == list(expected)
    for name, tensor in expected.items():
        assert same(found.state_dict[name], tensor), name
    event(f"{'zip' if is_zip else 'legacy'}, {'a network' if len(expected) > 50 else 'a few tensors'}")


class Trap:
    """Makes a folder when it is unpickled by a reader that trusts it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("posix.mkdir", Trap("trap")),
        ("fractions.Fraction", fractions.Fraction(1, 2)),
        ("decimal.Decimal", decimal.Decimal(1)),
        ("functools.partial", functools.partial(int, 3)),
        ("re._compile", re.compile("x")),
        ("torch.optim.sgd.SGD", torch.optim.SGD),
        ("torch.nn.modules.linear.Linear", torch.nn.Linear(1, 1)),
        ("torch.nn.modules.activation.ReLU", torch.nn.ReLU()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_weights_only_refuses_is_named_and_never_run(
    name: str, value: Any, protocol: int, is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = {layer: torch.ones(2) for layer in LAYERS}
    for content, path in (({"model": network, "args": value}, "beside.pth"), ({**network, "fc.bias": value}, "in.pth")):
        with warnings.catch_warnings(action="ignore"):
            torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
            with pytest.raises(pickle.UnpicklingError):
                torch.load(path, weights_only=True)
    found = pth.read("beside.pth")
    assert list(found.state_dict) == LAYERS
    assert name in found.notes[-1]
    with pytest.raises(StateDictError, match=name):
        pth.read("in.pth")
    assert not Path("trap").exists()
