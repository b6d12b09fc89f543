"""The checkpoints of a run: they restore the same bits, and no damage, kill or full disk goes unnoticed."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from flax_googlenet import CheckpointError, GoogLeNet
from flax_googlenet.training import TrainState
from flax_googlenet.training.checkpoints import (
    CheckpointSaveError,
    Restored,
    find_damage,
    prune_checkpoints,
    restore_checkpoint,
    save_checkpoint,
    write_manifest,
)

EXTRA = {"data": {"position": 12345678901, "names": ["ä", "b"]}, "recipe": {"learning_rate": 0.1, "average": None}}

# Its state has an EmptyState, named tuples and a count.
OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(lambda step: 0.1 / step, momentum=0.9))


def random_bits(seed: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Any bits: infinities, denormals, negative zeros, NaNs of every payload."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return np.ascontiguousarray(bits).view(dtype).reshape(shape)


def make_state(seed: int = 0) -> TrainState:
    params = {
        "conv1": {"conv": {"kernel": random_bits(seed, (7, 7, 3, 8), np.float32)}},
        "fc": {"kernel": random_bits(seed + 1, (16, 10), np.float32), "bias": np.full(10, -0.0, np.float32)},
        "half": random_bits(seed + 2, (33,), ml_dtypes.bfloat16),
        "double": random_bits(seed + 3, (5,), np.float64),
    }
    params = jax.tree.map(jnp.asarray, params)
    opt_state = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(seed), OPTIMIZER.init(params))
    return TrainState(
        params=params,
        batch_stats={"conv1": {"bn": {"mean": jnp.asarray(random_bits(seed + 4, (8,), np.float32))}}},
        opt_state=opt_state,
        step=jnp.asarray(seed, jnp.int32),
        average=None,
        class_weights=None,
        model=GoogLeNet(),
        optimizer=OPTIMIZER,
        frozen=(),
        label_smoothing=0.0,
        aux_weight=0.3,
        average_decay=None,
    )


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, np.asarray(a).tobytes()) == (b.shape, b.dtype, np.asarray(b).tobytes())


def restored(folder: Path, like: Any, fail: Callable[[str], None] = pytest.fail) -> Restored:
    found = restore_checkpoint(folder, like, fail)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save_checkpoint(folder, step, make_state(step), EXTRA | {"step": step})
    return folder


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "copy"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state = make_state(3)
    assert (
        save_checkpoint(tmp_path / "new" / "folder", 1234, state, EXTRA)
        == tmp_path / "new" / "folder" / "step_00001234"
    )
    found = restored(tmp_path / "new" / "folder", jax.tree.map(jnp.zeros_like, state))
    assert (found.step, found.extra) == (1234, EXTRA)
    assert_same_bits(found.state, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found.state))


def test_numpy_arrays_stay_numpy_arrays(tmp_path: Path) -> None:
    state = {
        "seen": np.arange(7, dtype=np.int64),
        "best": np.float32(0.25),
        "average": random_bits(0, (3, 4), np.float32),
    }
    save_checkpoint(tmp_path, 1, state, {})
    found = restored(tmp_path, state)
    assert_same_bits(found.state, state)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found.state))


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert restore_checkpoint(tmp_path / "missing", make_state(), pytest.fail) is None
    for name in ("step_notes.txt", "step_9999999999", "step_" + "9" * 30):  # steps have 32 bits
        (tmp_path / name).touch()
    assert restore_checkpoint(tmp_path, make_state(), pytest.fail) is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("file", "Not a directory"), ("dangling link", "No such file"), ("somebody else's", "Permission denied")],
)
def test_a_folder_that_cannot_be_read_is_an_error_not_a_fresh_start(kind: str, reason: str, tmp_path: Path) -> None:
    folder, user = tmp_path / "checkpoints", os.geteuid()
    if kind == "file":
        folder.write_text("a file where the folder was")
    elif kind == "dangling link":
        folder.symlink_to(tmp_path / "a disk that is not mounted")
    else:
        folder.mkdir(0)
        os.seteuid(user or 65534)  # root reads everything
    try:
        with pytest.raises(CheckpointError, match=f"{folder} cannot be read: {reason}.*; put the folder .* back there"):
            restore_checkpoint(folder, make_state(), pytest.fail)
    finally:
        os.seteuid(user)


def test_the_newest_counts_and_sha256sum_accepts_its_manifest(two: Path) -> None:
    assert restored(two, make_state()).step == 2
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "manifest.sha256"], cwd=two / "step_00000002", check=True
    )


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {"x": jnp.float32(step)}, {})
    assert restored(tmp_path, {"x": jnp.float32(0)}).step == 100_000_000


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(copy: Path) -> None:
    (copy / "step_00000002" / "state" / "d" / "another").touch()
    (copy / "step_00000002" / os.fsdecode(b"\xff")).touch()
    messages: list[str] = []
    found = restored(copy, make_state(), messages.append)
    assert (found.step, found.extra["step"]) == (1, 1)
    assert_same_bits(found.state, make_state(1))
    assert len(messages) == 1
    assert str(copy / "step_00000002") in messages[0]
    assert "state/d/another" in messages[0]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_all_damaged_is_an_error_that_says_what_to_do_not_a_fresh_start(copy: Path) -> None:
    cut(copy / "step_00000001" / "extra.json")
    shutil.rmtree(copy / "step_00000002" / "state")
    messages: list[str] = []
    with pytest.raises(CheckpointError, match=r"all are damaged: put .* remove the folder") as error:
        restore_checkpoint(copy, make_state(), messages.append)
    assert str(copy) in str(error.value)
    assert ["step_00000002" in messages[0], "step_00000001" in messages[1]] == [True, True]


def test_another_state_is_refused_with_all_that_differs(two: Path) -> None:
    state = make_state()
    like = state.replace(params=state.params | {"fc": {"kernel": jnp.zeros((16, 11)), "scale": jnp.zeros(10)}})
    with pytest.raises(CheckpointError) as error:
        restore_checkpoint(two, like, pytest.fail)
    assert "missing: [\".params['fc']['scale']\"]" in str(error.value)
    assert "unexpected: [\".params['fc']['bias']\"]" in str(error.value)
    assert ".params['fc']['kernel'] float32[16, 10], expected float64[16, 11]" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "step": 2, "extra": {}}', "is of another version of flax_googlenet: format 2"),
        ('{"format": 1, "step": "2", "extra": {}}', "step must be an integer"),
        ('{"format": 1, "step": 2}', "extra.json differs from what flax_googlenet writes: 'extra'"),
        ("[" * 10**5, "extra.json differs from what flax_googlenet writes: maximum recursion depth"),
    ],
    ids=["format", "step", "missing", "deep"],
)
def test_a_forged_checkpoint_is_refused(content: str, message: str, copy: Path) -> None:
    newest = copy / "step_00000002"
    (newest / "extra.json").write_text(content)
    (newest / "manifest.sha256").unlink()
    write_manifest(newest)
    with pytest.raises(CheckpointError, match=message):
        restore_checkpoint(copy, make_state(), pytest.fail)


def test_saving_a_step_again_replaces_it(copy: Path) -> None:
    save_checkpoint(copy, 2, make_state(9), {"again": True})
    found = restored(copy, make_state())
    assert (found.step, found.extra) == (2, {"again": True})
    assert_same_bits(found.state, make_state(9))
    assert sorted(path.name for path in copy.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_replaced_one_counts_until_the_new_one_is_there(copy: Path) -> None:
    (copy / "step_00000002").rename(copy / "step_00000002.replaced")  # as a kill between the two renames leaves it
    assert_same_bits(restored(copy, make_state()).state, make_state(2))
    save_checkpoint(copy, 3, make_state(3), {})
    assert sorted(path.name for path in copy.iterdir()) == [f"step_0000000{step}" for step in (1, 2, 3)]


def test_a_damaged_checkpoint_of_a_later_step_is_removed_by_the_next_save(copy: Path) -> None:
    save_checkpoint(copy, 7, make_state(7), {})
    cut(copy / "step_00000007" / "extra.json")
    messages: list[str] = []
    assert restored(copy, make_state(), messages.append).step == 2
    save_checkpoint(copy, 5, make_state(5), {})
    assert sorted(path.name for path in copy.iterdir()) == [f"step_0000000{step}" for step in (1, 2, 5)]
    assert restored(copy, make_state()).step == 5


def test_prune_keeps_the_newest(copy: Path) -> None:
    save_checkpoint(copy, 3, make_state(3), {})
    prune_checkpoints(copy, 2)
    assert sorted(path.name for path in copy.iterdir()) == ["step_00000002", "step_00000003"]
    prune_checkpoints(copy, 5)
    assert restored(copy, make_state()).step == 3
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        prune_checkpoints(copy, 0)


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "folder", 1, make_state(), {"array": np.zeros(1)})
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointSaveError, match=f"{tmp_path}/file/step_00000001 was not saved: .*exists"):
        save_checkpoint(tmp_path / "file", 1, make_state(), {})


# The manifest: no change to any file goes unnoticed, and none is seen where there is none.

FILES = ("extra.json", "state/d/0a", "state/d/0b", "state/empty", "state/manifest.ocdbt", "manifest.sha256")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for name in FILES[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "state/empty" else rng.randbytes(300))
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    return tmp_path


@pytest.mark.parametrize("name", [name for name in FILES if name != "state/empty"])
def test_a_flipped_bit_anywhere_is_noticed(sealed: Path, name: str) -> None:
    rng, path = random.Random(name), sealed / name
    original = path.read_bytes()
    for place in range(len(original)):
        data = bytearray(original)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found = find_damage(sealed)
        assert found is not None, place
        assert name == "manifest.sha256" or name in found
    path.write_bytes(original)
    assert find_damage(sealed) is None


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("change", [cut, empty, lengthen, Path.unlink])
def test_a_file_cut_emptied_lengthened_or_missing_is_noticed(sealed: Path, change: Callable[[Path], None]) -> None:
    for name in FILES:
        if name == "state/empty" and change in (cut, empty):
            continue
        original = (sealed / name).read_bytes()
        change(sealed / name)
        assert name in (find_damage(sealed) or "")
        (sealed / name).write_bytes(original)
    assert find_damage(sealed) is None


def test_a_file_too_many_is_noticed(sealed: Path) -> None:
    (sealed / "state" / "d" / "another").touch()
    assert find_damage(sealed) == "these files differ from manifest.sha256: state/d/another"


# What follows needs processes of its own: other devices, limits and signals.

PRELUDE = """
import os, resource, signal, sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from jax import numpy as jnp
from flax_googlenet import CheckpointError
from flax_googlenet.training.checkpoints import CheckpointSaveError, restore_checkpoint, save_checkpoint
folder = Path(sys.argv[1])
def fail(message):
    raise AssertionError(message)
"""


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> list[tuple[str, str]]:
    """Return what each wrote to stdout and stderr, once all have ended with status 0."""
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def test_sharded_and_replicated_arrays_come_back_and_may_be_placed_otherwise(tmp_path: Path) -> None:
    code = """
jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("batch",))
split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("batch",), ()))
values = {"split": np.arange(64, dtype=np.float32).reshape(8, 8) / 3, "whole": np.arange(5, dtype=np.int32)}
state = {name: jax.device_put(value, {"split": split, "whole": whole}[name]) for name, value in values.items()}
save_checkpoint(folder, 1, state, {})
for like in (state, {"split": jax.device_put(values["split"], whole), "whole": jax.device_put(values["whole"], whole)},
             {name: jax.device_put(value, jax.devices()[1]) for name, value in values.items()}):
    found = restore_checkpoint(folder, like, fail)
    for name, value in values.items():
        assert np.asarray(found.state[name]).tobytes() == value.tobytes()
        assert found.state[name].sharding == like[name].sharding, found.state[name].sharding
"""
    assert finish(start(code, tmp_path)) == [("", "")]


def test_a_full_disk_is_reported_and_nothing_of_that_save_stays(tmp_path: Path) -> None:
    """The limit on the size of a file stands in for the disk: it needs no root."""
    code = """
small, large = {"x": jnp.arange(8, dtype=jnp.float32)}, {"x": jnp.zeros(300_000, jnp.float32)}
save_checkpoint(folder, 1, small, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try:
    save_checkpoint(folder, 2, large, {})
except CheckpointSaveError as error:
    print(error)
print(sorted(os.listdir(folder)))
assert restore_checkpoint(folder, small, fail).step == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save_checkpoint(folder, 2, large, {})
assert restore_checkpoint(folder, large, fail).step == 2
"""
    [(output, errors)] = finish(start(code, tmp_path))
    lines = output.splitlines()
    assert errors == ""
    assert lines == [f"{tmp_path}/step_00000002 was not saved: [Errno 27] File too large", "['step_00000001']"]


def test_a_save_that_fails_inside_orbax_leaves_nothing(tmp_path: Path) -> None:
    code = """
good, bad = {"x": jnp.arange(8, dtype=jnp.float32)}, {"x": jnp.ones(8), "empty": jnp.zeros((0, 3))}
save_checkpoint(folder, 1, good, {})
try:
    save_checkpoint(folder, 2, bad, {})
except CheckpointSaveError as error:
    print(error)
save_checkpoint(folder, 3, good, {})
print(sorted(os.listdir(folder)))
"""
    [(output, errors)] = finish(start(code, tmp_path))
    lines = output.splitlines()
    assert errors == ""
    assert lines[0].startswith(f"{tmp_path}/step_00000002 was not saved: Cannot save arrays with zero size")
    assert lines[1] == "['step_00000001', 'step_00000003']"


KILLS = 5


@pytest.mark.slow
def test_after_a_kill_at_any_moment_of_a_save_an_undamaged_checkpoint_is_there(tmp_path: Path) -> None:
    code = """
step = int(sys.argv[2])
while True:
    step += 1
    for time in range(2):  # the second replaces the first
        save_checkpoint(folder, step, {"x": jnp.full((64, 64), step, jnp.float32)}, {"time": time})
        print(step, flush=True)
"""
    like = {"x": jnp.zeros((64, 64), jnp.float32)}
    rng = random.Random(0)
    last, leftovers = 0, 0
    for _ in range(KILLS):
        process = start(code, tmp_path, last)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        output, errors = process.communicate(timeout=60)
        assert errors == ""
        leftovers += any(path.name.startswith(".") for path in tmp_path.iterdir())
        printed = int(output.splitlines()[-1]) if output else last + 1
        found = restored(tmp_path, like)
        assert found.step >= printed
        assert_same_bits(found.state, {"x": jnp.full((64, 64), found.step, jnp.float32)})
        last = found.step
    assert leftovers > 0  # or no kill came during a save
    save_checkpoint(tmp_path, last + 1, like, {})
    assert all(path.name.startswith("step_") and not path.suffix for path in tmp_path.iterdir())


@pytest.mark.slow
def test_a_kill_between_the_renames_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    code = """
state = {"x": jnp.arange(8, dtype=jnp.float32)}
save_checkpoint(folder, 1, state, {"version": "old"})
left = [int(sys.argv[2])]
def kill(event, arguments):  # before it happens
    if event == "os.rename" and Path(arguments[1]).parent == folder:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
sys.addaudithook(kill)
save_checkpoint(folder, 1, state, {"version": "new"})
"""
    folders = [tmp_path / str(renames) for renames in range(3)]  # the old one aside, the new one in its place, old away
    for process in [start(code, folder, folder.name) for folder in folders]:
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == -signal.SIGKILL
    versions = [restored(folder, {"x": jnp.zeros(8, jnp.float32)}).extra["version"] for folder in folders]
    assert versions == ["old", "old", "new"]


@pytest.fixture
def address() -> str:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    return f"localhost:{port}"


TWO_PROCESSES = """
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
mesh = jax.make_mesh((2,), ("batch",))
values = {"split": np.arange(64, dtype=np.float32).reshape(8, 8) / 3, "whole": np.arange(5, dtype=np.int32)}
shardings = {"split": jax.NamedSharding(mesh, jax.P("batch")), "whole": jax.NamedSharding(mesh, jax.P())}
state = {k: jax.make_array_from_callback(v.shape, shardings[k], v.__getitem__) for k, v in values.items()}
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_one_checkpoint(tmp_path: Path, address: str) -> None:
    code = """
for step in (1, 2):
    save_checkpoint(folder, step, state, {"step": step})
if jax.process_index() == 0:
    os.truncate(folder / "step_00000002" / "extra.json", 1)
messages = []
found = restore_checkpoint(folder, state, messages.append)
for name, value in values.items():
    assert found.state[name].sharding == shardings[name]
    for shard in found.state[name].addressable_shards:
        assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes()
print(found.step, found.extra, len(messages))
try:
    restore_checkpoint(folder if jax.process_index() == 0 else folder / "on another host", state, messages.append)
except CheckpointError as error:
    print(error)
"""
    outputs = finish(*(start(TWO_PROCESSES + code, tmp_path, address, index) for index in range(2)))
    assert outputs[0][0].endswith("1 {'step': 1} 1\n")
    unseen = f"{tmp_path}/on another host is not seen by every process: is the file system shared?"
    assert outputs[1][0].endswith(f"1 {{'step': 1}} 0\n{unseen}\n")
    single = {"split": jnp.zeros((8, 8), jnp.float32), "whole": jnp.zeros(5, jnp.int32)}
    found = restored(tmp_path, single, [].append)  # one process reads what two wrote
    split, whole = np.arange(64, dtype=np.float32).reshape(8, 8) / 3, np.arange(5, dtype=np.int32)
    assert_same_bits(found.state, {"split": split, "whole": whole})


@pytest.mark.slow
def test_if_one_process_cannot_write_all_raise_and_none_waits(tmp_path: Path, address: str) -> None:
    code = """
try:
    save_checkpoint(folder, 1, state, {})
except CheckpointSaveError as error:
    print(error)
"""
    folders = [tmp_path / "shared", tmp_path / "on another host"]
    outputs = finish(*(start(TWO_PROCESSES + code, folders[index], address, index) for index in range(2)))
    assert outputs[0][0].endswith(f"{folders[0]}/step_00000001 was not saved: process 1 could not write its part\n")
    assert "not seen by every process: is the file system shared?" in outputs[1][0]
    assert list(folders[0].iterdir()) == []
