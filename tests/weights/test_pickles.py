"""Hostile pickles in PyTorch's files: none is run, none takes long or fills the memory, and what is sound is read."""

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flax_googlenet.weights import pth
from flax_googlenet.weights.state_dicts import find_state_dict

VALUE = struct.pack("<f", 0.5)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def storage(kind: bytes = b"ctorch\nFloatStorage\n", key: str = "0", length: int = 1) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(length) + b"tQ"


def tensor(stored: bytes = storage(), offset: int = 0, shape: bytes = b"K\1\x85", strides: bytes = b"K\1\x85") -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + number(offset) + shape + strides + b"\x89" + hooks + b"tR"


def state_dict(value: bytes) -> bytes:
    return b"\x80\2}(" + text("fc.bias") + value + b"u."


def beside(value: bytes) -> bytes:
    """Return the pickle of a state dict with one sound tensor and something else."""
    return b"\x80\2}(" + text("fc.bias") + tensor() + text("beside") + value + b"u."


def shape(*lengths: int) -> bytes:
    return b"(" + b"".join(map(number, lengths)) + b"t"


EXPLODING = b")" + b"q\1h\1\x86" * 100  # a tuple of the same tuple twice, and so on: 2**100 elements
SAME_HASH = b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(60_000))
PAIRS = b"](" + b"".join(text(f"x{i}") + b"N\x86q\2" for i in range(20_000)) + b"e"

COPIES = b"](" + b"ccollections\nCounter\nh\1\x85R" * 1000 + b"e"
MANY_AXES = tensor(shape=shape(*[1] * 64), strides=shape(*[1] * 64))
LONG_TEXTS = b"".join(text("x" * 498 + chr(192 + i)) + b"q" + bytes([i]) + b"0" for i in range(60))
LONG_CLASSES = b"](" + b"".join(b"h" + bytes([i, ord("h"), j]) + b"\x93" for i in range(60) for j in range(60)) + b"e"

READ = {
    "a number of bytes": b"c__builtin__\nbytearray\n(" + number(3 << 30) + b"tR",
    "a size of an array": b"cnumpy\nzeros\n(" + number(1 << 40) + b"tR",
    "a call of the shell": b"cposix\nsystem\n" + text("touch trap") + b"\x85R",
    "an import": b"csubprocess\nPopen\n" + text("touch trap") + b"\x85R}b",
    "a method": b"cbuiltins\nstr.format\n" + text("{0.__class__}") + b"\x85R",
    "a tuple that explodes": EXPLODING,
    "a key that explodes": b"}" + EXPLODING + b"Ns",
    "an argument that explodes": b"cmodule\nfunction\n" + EXPLODING + b"R",
    "a stride of 62 bits along an axis of one element": tensor(strides=shape(2**62)),
    "deep tuples": b")" + b"\x85" * 500_000,
    "deep lists": b"]" * 250_000 + b"a" * 249_999,
    "deep dicts": b"}K\1" * 130_000 + b"N" + b"s" * 130_000,
    "a list that contains itself": b"]q\1h\1a",
    "a dict that contains itself": b"}q\1" + text("x") + b"h\1s",
    "a long key": b"}" + text("x" * 4_000_000) + b"Ns",
    "a long string": text("x" * 4_000_000),
    "keys of the same hash": b"}(" + SAME_HASH + b"u",
    "a large number in the memo": b"Nr\xff\xff\xff\x7f",
    "many dicts": b"](" + b"}q\1" * 260_000 + b"e",
    "a long list under many names": b"]("
    + b"N" * 200_000
    + b"eq\1}("
    + b"".join(b"M" + struct.pack("<H", i) + b"h\1" for i in range(60_000))
    + b"u\x86",
    "a deep name": b"}" + text(".".join(["conv1"] * 160)) + tensor() + b"s",
}
REFUSED = {
    "too many steps": (beside(b")" + b"\x85" * 1_000_000), "steps"),
    "a number of many bytes": (beside(b"\x8b" + struct.pack("<I", 100_000) + bytes(100_000)), "LONG4"),
    "a number of many digits": (beside(b"I" + b"9" * 100_000 + b"\n"), "opcode INT"),
    "an extension": (beside(b"\x82\1"), "EXT1"),
    "an instance by its name": (beside(b"(iposix\nsystem\n"), "INST"),
    "a key of its own": (b"\x80\2}" + text("x" * 4_000_000) + b"Ns.", "no state dict found"),
    "nothing in the memo": (beside(b"h\7"), "damaged"),
    "an empty stack": (b"\x80\2\x85.", "not a state dict"),
    "no mark": (b"\x80\2t.", "damaged"),
    "another protocol": (b"\x80\6" + beside(b"N")[2:], "protocol 6"),
    "long classes of a few texts": (beside(LONG_TEXTS + LONG_CLASSES), "cannot exist"),
    "a tensor under 200,000 names": (
        b"\x80\2}(" + b"".join(text(f"fc.{i}") + (b"h\1" if i else MANY_AXES + b"q\1") for i in range(200_000)) + b"u.",
        "200,000 tensors",
    ),
    "a dict copied often": (
        beside(b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(20_000)) + b"uq\1" + COPIES),
        "too often",
    ),
    "a list repeated often": (
        beside(PAIRS + b"q\3" + b"ccollections\nOrderedDict\nh\3\x85R0" * 10_000),
        "too often",
    ),
    "a list of long lists": (
        beside(b"(" + b"N" * 200_000 + b"t" + b"q\1](" + b"h\1" * 100_000 + b"eq\2ccollections\nOrderedDict\nh\2\x85R"),
        "not pairs",
    ),
    "a call with many arguments": (
        beside(b"ctorch._utils\n_rebuild_tensor_v2\nq\1(" + b"N" * 100_000 + b"tq\2R" + b"h\1h\2R" * 80_000),
        "100000 arguments",
    ),
    "a class whose name explodes": (beside(text("module") + EXPLODING + b"\x93"), "not text"),
    "a class whose module explodes": (beside(EXPLODING + text("name") + b"\x93"), "not text"),
    "a storage that is a number": (beside(b"K\1Q"), "not a storage"),
    "a storage that is nothing": (beside(b")Q"), "not a storage"),
    "a storage of another module": (beside(storage(b"cposix\nFloatStorage\n")), "not a storage"),
    "a storage of text": (beside(storage(text("FloatStorage"))), "not a storage"),
    "a storage of negative length": (beside(storage(length=-1)), "not a storage"),
    "a storage of two sizes": (beside(storage(length=2)), "two different sizes"),
    "a storage of two dtypes": (beside(storage(b"ctorch\nIntStorage\n")), "two different dtypes"),
    "a storage that is not there": (state_dict(tensor(storage(key="1"))), "more than the bytes stored"),
    "a storage that claims more": (state_dict(tensor(storage(length=2))), "more than the bytes stored"),
    "a storage of another dtype": (state_dict(tensor(storage(b"ctorch\nDoubleStorage\n"))), "more than the bytes"),
    "a negative offset": (state_dict(tensor(offset=-1)), "more than the bytes stored"),
    "an offset beyond the end": (state_dict(tensor(offset=1)), "more than the bytes stored"),
    "an offset of 62 bits": (state_dict(tensor(offset=2**62)), "more than the bytes stored"),
    "a negative stride": (state_dict(tensor(shape=shape(2), strides=shape(-1))), "more than the bytes stored"),
    "a negative length": (state_dict(tensor(shape=shape(-1))), "more than the bytes stored"),
    "a stride beyond the end": (state_dict(tensor(shape=shape(1, 2), strides=shape(1, 1))), "more than the bytes"),
    "a product beyond 64 bits": (
        state_dict(tensor(shape=shape(2**62, 4, 2**62), strides=shape(0, 0, 0))),
        "more than the bytes stored",
    ),
    "an empty tensor beyond 64 bits": (
        state_dict(tensor(shape=shape(2**62, 0, 2**62), strides=shape(0, 0, 0))),
        "more than the bytes stored",
    ),
    "a shape that explodes": (state_dict(tensor(shape=EXPLODING, strides=EXPLODING)), "wrong kind"),
    "a shape of many numbers": (
        state_dict(tensor(shape=b"(" + b"K\1" * 65 + b"t", strides=b"(" + b"K\1" * 65 + b"t")),
        "wrong kind",
    ),
    "a tensor of a number": (state_dict(tensor(stored=b"K\1")), "wrong kind"),
    "a tensor with too few arguments": (state_dict(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "arguments"),
    "a tensor whose state changes": (state_dict(tensor() + b"(" + storage() + b"K\0))tb"), "not known"),
    "a class where a weight should be": (state_dict(b"c__builtin__\nbytearray\nK\5\x85R"), "builtins.bytearray"),
}

READER = """
import json, re, sys, time
from pathlib import Path
from flax_googlenet.weights import pth

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

sys.set_int_max_str_digits(0)
pth.read(sys.argv[1])
for path in sys.argv[1:]:
    memory, start = peak(), time.process_time()
    try:
        result = [float(pth.read(path).state_dict["fc.bias"][0]), None]
    except pth.StateDictError as error:
        result = [None, str(error)]
    print(json.dumps([*result, time.process_time() - start, peak() - memory]), flush=True)
"""


Results = dict[str, tuple[float | None, str | None, float, int]]
"""Name of a file -> value of its tensor, error, seconds, and growth of the peak memory while it was read."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Files with all these pickles, read by one process, which a crash would end."""
    folder = tmp_path_factory.mktemp("hostile")
    pickles = {"sound": beside(b"N"), **{name: beside(value) for name, value in READ.items()}}
    pickles |= {name: pickle for name, (pickle, _) in REFUSED.items()}
    for name, pickle in pickles.items():
        with zipfile.ZipFile(folder / f"{name}.pth", "w") as archive:
            archive.writestr("archive/data.pkl", pickle)
            archive.writestr("archive/data/0", VALUE)
    process = subprocess.run(
        [sys.executable, "-c", READER, *(folder / f"{name}.pth" for name in pickles)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.returncode == 0, process.stderr + list(pickles)[len(lines)]
    assert not (folder / "trap").exists()
    return dict(zip(pickles, lines, strict=True))


@pytest.mark.parametrize("name", ["sound", *READ])
def test_a_hostile_value_beside_the_weights_costs_nothing_and_the_weights_are_read(name: str, results: Results) -> None:
    value, error, seconds, memory = results[name]
    assert (value, error) == (0.5, None)
    assert seconds < 10
    assert memory < 100e6


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_pickle_is_refused_with_its_reason(name: str, results: Results) -> None:
    value, error, seconds, memory = results[name]
    assert value is None
    assert error is not None
    assert REFUSED[name][1] in error
    assert len(error) < 600
    assert seconds < 10
    assert memory < 100e6


def pair(name: str, value: bytes) -> bytes:
    return text(name) + value + b"\x86"


SCALAR = tensor(shape=b")", strides=b")")


@pytest.mark.parametrize(
    ("pickle", "entries"),
    [
        pytest.param(
            b"\x80\2}(" + text("x") + b"}(" + text("fc.bias") + tensor() + b"uq\1"
            + text("y") + b"ccollections\nCounter\nh\1\x85R" + text("fc.bias") + SCALAR + b"su.",
            {},
            id="a copy that is changed",
        ),
        pytest.param(
            b"\x80\2}(" + text("fc.bias") + tensor()
            + text("x") + b"ccollections\nOrderedDict\n](" + pair("a", SCALAR) + pair("b", SCALAR) + b"e\x85\x81u.",
            {},
            id="a dict whose contents are given to __new__",
        ),
        pytest.param(b"\x80\2}(U\x05t\xc3\xaate" + tensor() + b"u.", {}, id="a name from Python 2"),
        pytest.param(
            state_dict(tensor()),
            {"archive/data/archive/data.pkl": state_dict(SCALAR)},
            id="a storage with the name of the pickle",
        ),
        pytest.param(state_dict(tensor(storage(key="archive/four"))), {"archive/four": VALUE}, id="not a storage"),
    ],
)  # fmt: skip
def test_what_no_pickler_writes_is_read_as_pytorch_reads_it_or_refused(
    pickle: bytes, entries: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "model.pth"
    sound = {"archive/data.pkl": pickle, "archive/version": b"3\n", "archive/data/0": VALUE}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (sound | entries).items():
            archive.writestr(name, data)
    try:
        expected = find_state_dict(torch.load(path, weights_only=True)).state_dict
    except RuntimeError:
        with pytest.raises(pth.StateDictError):
            pth.read(path)
        return
    found = pth.read(path).state_dict
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.numpy(), strict=True)
