"""Checkpoint files return what was saved, reveal any flipped bit, and survive a kill at any moment."""

import errno
import fcntl
import hashlib
import json
import lzma
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import reference
import safetensors.numpy
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp

import flax_googlenet
from flax_googlenet import CheckpointError, GoogLeNet
from flax_googlenet.files import write_atomically
from flax_googlenet.model import variable_shapes
from flax_googlenet.weights.checkpoint import load_weights

SMALL = GoogLeNet(num_classes=2, aux_logits=False)


def made(model: GoogLeNet, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.random(x.shape).astype(x.dtype), variable_shapes(model))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    flax_googlenet.save(path, SMALL, made(SMALL), {"class_names": ["cat", "dog"]})
    return path


def equal(left: Any, right: Any) -> bool:
    return jax.tree.structure(left) == jax.tree.structure(right) and jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        GoogLeNet(),
        SMALL,
        GoogLeNet(num_classes=7, transform_input=True, dropout=0.1, dropout_aux=0.2, precision="highest"),
        GoogLeNet(num_classes=7, aux_logits=False, batch_norm=False),
        GoogLeNet(num_classes=7, dtype=jnp.float64, param_dtype=jnp.float64),
        GoogLeNet(num_classes=7, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
        GoogLeNet(num_classes=7, dtype=jnp.float16),
    ],
)
def test_a_model_and_its_variables_come_back_as_they_were(model: GoogLeNet, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    variables = made(model)
    flax_googlenet.save(path, model, variables)
    loaded, loaded_variables = flax_googlenet.load(path)
    assert loaded == model
    assert equal(loaded_variables, variables)
    assert flax_googlenet.load_metadata(path) == {}


def test_a_precision_from_jaxs_enum_comes_back_as_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    flax_googlenet.save(path, SMALL.clone(precision=jax.lax.Precision.HIGH), made(SMALL))
    assert flax_googlenet.load(path)[0].precision == "high"


def test_metadata_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"class_names": ["Größe", '"quoted"'], "parity": {"fc": 1e-15}, "source": None}
    variables = made(SMALL)
    flax_googlenet.save(path, SMALL, variables, metadata)
    assert flax_googlenet.load_metadata(path) == metadata
    itself: list[Any] = []
    itself.append(itself)
    for refused, kind in ((path, TypeError), (itself, CheckpointError), (10**5000, CheckpointError)):
        with pytest.raises(kind, match=r"JSON|the metadata cannot be stored"):
            flax_googlenet.save(path, SMALL, variables, {"refused": refused})
    assert flax_googlenet.load_metadata(path) == metadata


@pytest.mark.usefixtures("unchecked_annotations")  # the number of classes is NumPy's, too
def test_arrays_and_tuples_in_metadata_are_stored_as_json_and_nan_as_null(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {
        "class_names": np.array(["cat", "dog"]),
        "accuracy": np.float32(0.5),
        "matrix": (np.arange(4).reshape(2, 2), jnp.asarray(1.5, jnp.bfloat16)),
        "flags": {"done": np.bool_(True), "loss": float("nan"), "rates": np.array([np.inf, 1.0])},
    }
    flax_googlenet.save(path, SMALL.clone(num_classes=np.int64(2)), made(SMALL), metadata)
    assert flax_googlenet.load(path)[0] == SMALL
    assert flax_googlenet.load_metadata(path) == {
        "class_names": ["cat", "dog"],
        "accuracy": 0.5,
        "matrix": [[[0, 1], [2, 3]], 1.5],
        "flags": {"done": True, "loss": None, "rates": [None, 1.0]},
    }


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (["cat"], "class_names must have one name for each of the 2 classes, got 1"),
        (("cat", "dog", "cow"), "class_names must have one name for each of the 2 classes, got 3"),
        (["cat", 7], "class_names must be strings, but that of class 1 is 7"),
        ("ab", "class_names must be a list of 2 strings, got a str"),
        ({0: "cat", 1: "dog"}, "class_names must be a list of 2 strings, got a dict"),
    ],
)
def test_class_names_that_are_not_one_string_for_each_class_are_refused(
    class_names: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        flax_googlenet.save(tmp_path / "model.safetensors", SMALL, {}, {"class_names": class_names})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float64, "float32", "bfloat16", np.dtype("float16")])
def test_load_takes_a_dtype_and_keeps_statistics_in_float32_at_least(small: Path, dtype: Any) -> None:
    model, variables = flax_googlenet.load(small, dtype=dtype)
    dtype = jnp.dtype(dtype)
    assert (model.dtype, model.param_dtype) == (dtype, dtype)
    assert jax.tree.map(lambda x: x.dtype, variables) == jax.tree.map(lambda x: x.dtype, variable_shapes(model))
    stats_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables["batch_stats"])} == {jnp.dtype(stats_dtype)}
    original = made(SMALL)["params"]["fc"]["kernel"]
    assert np.array_equal(variables["params"]["fc"]["kernel"], original.astype(dtype))


@pytest.mark.slow
def test_float64_without_64_bits_is_refused_not_rounded(small: Path, tmp_path: Path) -> None:
    path64 = tmp_path / "float64.safetensors"
    model = SMALL.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    flax_googlenet.save(path64, model, made(model))
    with jax.enable_x64(False):
        for path, dtype in ((path64, None), (small, jnp.float64)):
            with pytest.raises(CheckpointError, match=r"float64 needs jax.config.update\('jax_enable_x64', True\)"):
                flax_googlenet.load(path, dtype=dtype)
        assert flax_googlenet.load(path64, dtype=jnp.float32)[0].dtype == jnp.float32


def test_load_needs_neither_torch_nor_scikit_learn(small: Path) -> None:
    code = f"""
import sys
for name in ("torch", "torchvision", "sklearn"):
    sys.modules[name] = None
import flax_googlenet
model, variables = flax_googlenet.load({str(small)!r})
assert variables["params"]["fc"]["bias"].shape == (2,)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_sha256_is_that_of_the_file_with_its_digits_as_zeros(small: Path) -> None:
    data = small.read_bytes()
    with safetensors.safe_open(small, "np") as file:
        digest = json.loads(file.metadata()["flax_googlenet"])["sha256"]
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


@pytest.mark.slow
def test_any_flipped_bit_is_noticed(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    header_bits = 8 * (8 + int.from_bytes(data[:8], "little"))
    rng = random.Random(0)
    bits = [*range(64), *rng.sample(range(64, header_bits), 40), *rng.sample(range(header_bits, 8 * len(data)), 20)]
    metadata = data.index(b"__metadata__")
    bits += [
        8 * (metadata + i) + rng.randrange(8) for i in range(0, 600, 6)
    ]  # the configuration, the digest, the names
    flipped = tmp_path / "flipped.safetensors"
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(str(flipped))):
            flax_googlenet.load_metadata(flipped)  # reads and checks the whole file, as load does
    with pytest.raises(CheckpointError, match=re.escape(str(flipped))):
        flax_googlenet.load(flipped)


@pytest.mark.parametrize(
    "contents",
    [b"", b"x", b"\xff" * 8, b"\0" * 100, b"{}" * 50],
    ids=["empty", "one byte", "huge header", "zeros", "JSON"],
)
def test_a_file_of_another_kind_is_refused(contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "else.safetensors"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match="is not a checkpoint of flax_googlenet, or is damaged"):
        flax_googlenet.load(path)


@pytest.mark.parametrize(
    ("contents", "advice"),
    [(b"<!DOCTYPE html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
)
def test_a_file_of_a_known_kind_without_weights_is_named(contents: bytes, advice: str, tmp_path: Path) -> None:
    path = tmp_path / "else.safetensors"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: this is a .*{advice}"):
        flax_googlenet.load(path)


def test_a_checkpoint_of_pytorchs_is_refused_with_the_ways_to_port_it(tmp_path: Path) -> None:
    path = tmp_path / "my model.pth"
    torch.save(reference.random_checkpoint(num_classes=2), path)
    with pytest.raises(CheckpointError, match=re.escape(f"python convert/port_weights.py '{path}'")) as caught:
        flax_googlenet.load(path)
    assert "from_torchvision(flax_googlenet.read_state_dict(path))" in str(caught.value)
    assert "in the repository of this project" in str(caught.value)  # the wheel does not have the command


def test_a_truncated_file_is_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    for length in (100, 60_000, small.stat().st_size - 1):
        path.write_bytes(small.read_bytes()[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            flax_googlenet.load(path)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        flax_googlenet.load(tmp_path / "none.safetensors")


def forge(small: Path, path: Path, **changes: Any) -> None:
    """Write a file with other contents and the right sha256, which anybody can compute."""
    with safetensors.safe_open(small, "np") as file:
        content = json.loads(file.metadata()["flax_googlenet"])
    content |= {"sha256": "0" * 64, **changes}
    data = safetensors.numpy.save(safetensors.numpy.load_file(small), {"flax_googlenet": json.dumps(content)})
    path.write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("depth", 22, "a network with depth=22, which this version of flax_googlenet does not have: install a newer"),
        ("dtype", "foo", "holds no model of flax_googlenet: "),
        ("param_dtype", "int32", "holds no model of flax_googlenet: "),
        ("num_classes", "x", "holds no model of flax_googlenet: num_classes cannot be 'x'"),
        ("num_classes", True, "num_classes cannot be 'True'"),
        ("num_classes", -1, "num_classes cannot be '-1'"),
        ("num_classes", 2**40, "num_classes is 1099511627776, but params/fc/bias has a different length"),
        ("aux_logits", "no", "aux_logits cannot be 'no'"),
        ("dropout", [0.5], r"dropout cannot be '\[0.5\]'"),
        ("dropout_aux", float("nan"), "dropout_aux cannot be 'nan'"),
        ("precision", "exact", "belong to a network that JAX cannot build: (.|\\n)*but got exact"),
    ],
)
def test_contents_that_are_not_a_model_are_refused(
    name: str, value: Any, message: str, small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "forged.safetensors"
    with safetensors.safe_open(small, "np") as file:
        model = json.loads(file.metadata()["flax_googlenet"])["model"]
    forge(small, path, model={**model, name: value})
    with pytest.raises(CheckpointError, match=message):
        flax_googlenet.load(path)


def test_a_file_of_an_earlier_version_is_read(small: Path, tmp_path: Path) -> None:
    """It can have fewer fields, names and sizes of any kind in the metadata, and numbers that JSON does not have."""
    path = tmp_path / "earlier.safetensors"
    metadata = {"class_names": ["cat", "dog", 7], "loss": float("inf"), "recipe": {"image_size": 10**9}}
    forge(small, path, model={"num_classes": 2, "aux_logits": False}, metadata=metadata)
    weights = load_weights(path)
    assert weights.model == SMALL
    assert equal(weights.variables, made(SMALL))
    assert weights.metadata == metadata
    assert (weights.class_names, weights.image_size) == (None, 224)


@pytest.mark.parametrize("version", ["first", "second"])
def test_a_file_of_every_version_loads_for_ever(version: str, tmp_path: Path) -> None:
    """``first`` was written before files had a version. The weights repeat 0, 1/8, ... 6/8, so that they pack well."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(lzma.decompress(Path(__file__).with_name(f"{version}.safetensors.xz").read_bytes()))
    model = GoogLeNet(
        num_classes=3,
        aux_logits=False,
        transform_input=True,
        dropout=0.4,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        precision="highest",
    )
    shapes = sorted(flatten_dict(variable_shapes(model)).items())
    expected = {
        names: ((np.arange(np.prod(shape.shape)) + i) % 7 / 8).reshape(shape.shape).astype(shape.dtype)
        for i, (names, shape) in enumerate(shapes)
    }
    weights = load_weights(path)
    assert weights.model == model
    assert equal(weights.variables, unflatten_dict(expected))
    assert weights.metadata == {"class_names": ["daisy", "Größe", "薔薇"], "recipe": {"image_size": 64}}
    assert (weights.class_names, weights.image_size) == (["daisy", "Größe", "薔薇"], 64)


class Later(GoogLeNet):
    """The network of a version to come, which has one more choice."""

    variant: str = "torchvision"


def test_a_file_of_a_later_version_loads_if_its_network_is_known_here(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "later.safetensors"
    flax_googlenet.save(path, Later(num_classes=2, aux_logits=False), made(SMALL), {"class_names": ["cat", "dog"]})
    assert path.read_bytes() == small.read_bytes()
    forge(small, path, version=99, note="new in version 99", metadata={"new in version 99": [1]})
    model, variables = flax_googlenet.load(path)
    assert model == SMALL
    assert equal(variables, made(SMALL))
    assert flax_googlenet.load_metadata(path) == {"new in version 99": [1]}


@pytest.mark.parametrize("changes", [{"model": 1}, {"metadata": [1]}])
def test_contents_of_another_kind_are_refused(changes: dict[str, Any], small: Path, tmp_path: Path) -> None:
    path = tmp_path / "forged.safetensors"
    forge(small, path, **changes)
    for read in (flax_googlenet.load, flax_googlenet.load_metadata):
        with pytest.raises(
            CheckpointError, match="holds no model of flax_googlenet: model and metadata must be objects"
        ):
            read(path)


VALUES = [None, True, -1, 2, 2**31, 2**40, 2**64, 10**400, 1e308, float("nan"), "", "x", "F32", "I64", "\ud800", [], {}]
VALUES += [[[]], [2**40], [0, 2**63], [1] * 70, [1.5]]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in the value with each of its keys."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def write_forged(path: Path, header: str, tensors: bytes) -> None:
    """Write a file with the right digest, if the header has a place for it."""
    data = len(header).to_bytes(8, "little") + header.encode() + tensors
    path.write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1))


def test_more_tensors_than_any_network_has_are_refused_before_they_are_made(tmp_path: Path) -> None:
    path = tmp_path / "forged.safetensors"
    content = json.dumps({"sha256": "0" * 64, "model": {}, "metadata": {}})
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    tensors = dict.fromkeys(map(str, range(10_000)), empty)
    write_forged(path, json.dumps({"__metadata__": {"flax_googlenet": content}, **tensors}), b"")
    with pytest.raises(CheckpointError, match="holds no model of flax_googlenet: it has 10,001 tensors"):
        flax_googlenet.load(path)


def test_a_forged_header_is_a_checkpoint_error_or_is_read(tmp_path: Path) -> None:
    """20,000 headers like these and 3,000 on a complete network were tried: none did anything else."""
    path = tmp_path / "forged.safetensors"
    rng = random.Random(0)
    outcomes = []
    for _ in range(300):
        # The number of classes is always wrong: for a right one, the shapes of the network would be computed each time.
        content = {"sha256": "0" * 64, "model": {"num_classes": 3, "dropout": 0.2, "dtype": "float32"}, "metadata": {}}
        tensors: dict[str, Any] = {
            "params/fc/bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "params/fc/kernel": {"dtype": "F16", "shape": [2, 1], "data_offsets": [8, 12]},
        }
        container, key = rng.choice(list(places(rng.choice([content, tensors]))))
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
        header = json.dumps({"__metadata__": {"flax_googlenet": json.dumps(content)}, **tensors})
        if rng.random() < 0.2:  # text that json.dumps does not write: any byte, or a value nested too deep
            place = rng.choice([match.end() for match in re.finditer(r"[:,] ", header)])
            inserted = rng.choice(["[" * 10**4, '{"a":' * 10**4, "9" * 5000 + ",", rng.choice('[]{}:,9e-\\"\0')])
            header = header[:place] + inserted + header[place:]
        write_forged(path, header, bytes(12))
        with pytest.raises(CheckpointError) as caught:
            flax_googlenet.load(path)
        outcomes.append(str(caught.value).removeprefix(str(path))[:40])
        with suppress(CheckpointError):
            outcomes.append(type(flax_googlenet.load_metadata(path)).__name__)
    assert outcomes.count("dict") > 150
    assert sum(" holds no model of flax_googlenet" in outcome for outcome in outcomes) > 250


def test_a_file_that_is_not_regular_or_too_large_is_not_read(tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)  # nobody writes to it, so waiting for data would never end
    large.touch()
    os.truncate(large, 60 * 10**9)  # a sparse file
    for path, message in (
        (pipe, "it is not a regular file"),
        (Path("/dev/zero"), "it is not a regular file"),
        (large, "it has 60,000,000,000 bytes, and at most 4,294,967,296 are read"),
        (tmp_path, "Is a directory"),
    ):
        for read in (flax_googlenet.load, flax_googlenet.load_metadata):
            with pytest.raises(OSError, match=re.escape(f"{message}: '{path}'")):
                read(path)
        with pytest.raises(CheckpointError, match=re.escape(f"cannot read {path}: {message}")):
            load_weights(path)


@pytest.mark.parametrize("dtype", [jnp.int32, "float8_e4m3fn", "double precision", []])
def test_any_dtype_but_the_four_is_refused(dtype: Any, small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype must be float64, float32, float16 or bfloat16"):
        flax_googlenet.load(small, dtype=dtype)
    with pytest.raises(CheckpointError, match="dtype must be float64, float32, float16 or bfloat16"):
        flax_googlenet.save(tmp_path / "model.safetensors", SMALL.clone(dtype=dtype), {})


def test_a_precision_without_a_name_is_refused(tmp_path: Path) -> None:
    model = SMALL.clone(precision=("high", "highest"))
    with pytest.raises(CheckpointError, match="cannot be stored: use None or a name such as 'highest'"):
        flax_googlenet.save(tmp_path / "model.safetensors", model, made(SMALL))


def test_save_refuses_variables_of_another_model_and_lists_them(tmp_path: Path) -> None:
    variables = made(SMALL)
    del variables["params"]["conv2"]["conv"]["kernel"]
    variables["params"]["conv1"]["conv"]["bias"] = np.zeros(64)
    variables["params"]["fc"]["bias"] = np.zeros(3)
    variables["batch_stats"]["conv1"]["bn"]["mean"] = np.zeros(64, int)
    with pytest.raises(CheckpointError) as caught:
        flax_googlenet.save(tmp_path / "bad.safetensors", SMALL, variables)
    for line in (
        "missing: ['params/conv2/conv/kernel']",
        "unexpected: ['params/conv1/conv/bias']",
        "wrong shape: ['params/fc/bias (3,), expected (2,)']",
        "wrong dtype: ['batch_stats/conv1/bn/mean int64']",
    ):
        assert line in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.mkdir()
    with pytest.raises(FileExistsError, match="not a regular file"):
        flax_googlenet.save(path, SMALL, made(SMALL))
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_not_replaced_by_a_file() -> None:
    with pytest.raises(FileExistsError, match="not a regular file"):
        write_atomically("/dev/null", b"")
    assert Path("/dev/null").is_char_device()


def test_writing_through_a_link_keeps_the_link_and_the_umask(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_new_file_has_the_permissions_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for mode in (0o600, 0o664, 0o400):
        write_atomically(path, b"old")
        path.chmod(mode)
        write_atomically(path, b"new")
        assert path.stat().st_mode & 0o7777 == mode
    if os.geteuid() == 0:
        os.chown(path, 1234, 5678)
        write_atomically(path, b"new")
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_a_new_file_has_the_access_control_list_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    # acl(5): the owner may read and write, user 1234 may read, the group and others may do nothing.
    entries = [(1, 6, 2**32 - 1), (2, 4, 1234), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1)]
    access = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", access)
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # any other error is a defect of this test
            raise
        pytest.skip("the file system has no access control lists")
    write_atomically(path, b"new")
    assert os.getxattr(path, "system.posix_acl_access") == access


def test_a_write_removes_the_leftovers_of_kills_an_hour_ago_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    leftover, young, written, linked, folder = (tmp_path / f".{path.name}.0123456{i}.tmp" for i in range(5))
    names = (".other.01234567.tmp", f".{path.name}.0123.tmp", f"{path.name}.01234567.tmp")
    others = [tmp_path / name for name in names]
    for file in (leftover, young, written, *others):
        file.touch()
    linked.symlink_to(others[0])
    folder.mkdir()
    kept = {file.name for file in tmp_path.iterdir()} - {leftover.name}
    for file in tmp_path.iterdir():
        if file != young:
            os.utime(file, (time.time() - 3700,) * 2, follow_symlinks=False)
    with open(written, "rb") as suspended:
        fcntl.flock(suspended, fcntl.LOCK_EX)  # as a process does that was suspended during a write
        write_atomically(path, b"new")
    assert {file.name for file in tmp_path.iterdir()} == kept | {path.name}


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    code = f"""
import numpy as np, sys
from flax_googlenet import GoogLeNet, save
from flax_googlenet.model import variable_shapes
import jax
model = GoogLeNet(num_classes=2, aux_logits=False)
shapes = variable_shapes(model)
versions = [jax.tree.map(lambda x: np.full(x.shape, i, x.dtype), shapes) for i in range(2)]
i = 0
while True:
    save({str(path)!r}, model, versions[i % 2], {{"version": i % 2}})
    i += 1
    print(i, flush=True)
"""
    rng = random.Random(0)
    seen: set[int] = set()
    kills = 0
    while kills < 5 or seen != {0, 1}:
        kills += 1
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(rng.randint(1, 2)):  # versions: where saving is slow, the last one is the one found
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        _, variables = flax_googlenet.load(path)
        version = flax_googlenet.load_metadata(path)["version"]
        seen.add(version)
        assert {float(x.min()) for x in jax.tree.leaves(variables)} == {version}
        assert {float(x.max()) for x in jax.tree.leaves(variables)} == {version}
        assert kills < 50


def test_the_same_input_makes_the_same_bytes(small: Path, tmp_path: Path) -> None:
    code = """
import sys
import flax_googlenet
_, source, target = sys.argv
flax_googlenet.save(target, *flax_googlenet.load(source), flax_googlenet.load_metadata(source))
"""
    subprocess.run([sys.executable, "-c", code, str(small), str(tmp_path / "again.safetensors")], check=True)
    assert (tmp_path / "again.safetensors").read_bytes() == small.read_bytes()


def test_bfloat16_is_stored_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    variables = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), made(SMALL))
    flax_googlenet.save(path, SMALL.clone(param_dtype="bfloat16"), variables)
    assert equal(flax_googlenet.load(path)[1], variables)
