"""The checkpoints of a run: folders ``step_00001234`` that Orbax writes, with checksums, complete or not there at all.

Such a folder holds ``state/``, in Orbax's format, ``extra.json`` and ``manifest.sha256``, which lists the checksums of
all files: ``sha256sum --check manifest.sha256`` verifies them. A folder is written under a hidden name and renamed once
it is on the disk, so that a kill at any moment leaves the earlier checkpoints as they were.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # the paths that Orbax's handlers take
from jax.experimental import multihost_utils

from flax_googlenet.errors import GoogLeNetError, printable
from flax_googlenet.files import read_regular_file, replace_synced, sync
from flax_googlenet.weights.checkpoint import CheckpointError
from flax_googlenet.weights.checks import with_problems

_FORMAT = 1
_MANIFEST = "manifest.sha256"
_REPLACED = ".replaced"  # ends the name of a checkpoint while a new one of the same step takes its place
_NAME = re.compile(rf"step_([0-9]{{8,10}})({re.escape(_REPLACED)})?")
_MAX_BYTES = 2**30  # of extra.json and of the manifest
_NONE, _ALL_DAMAGED, _UNREADABLE = -1, -2, -3  # sent by the first process to the others in place of a step


class CheckpointSaveError(GoogLeNetError, RuntimeError):
    """A checkpoint could not be saved. The earlier ones are untouched."""


class OtherStateError(CheckpointError):
    """A checkpoint is undamaged, but belongs to another network or optimizer."""


class Restored(NamedTuple):
    """What ``save_checkpoint`` was given; the state has the shardings that ``restore_checkpoint`` was asked for."""

    step: int
    state: Any
    extra: dict[str, Any]


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return Path(os.path.abspath(folder)) / f"step_{step:08d}"


def save_checkpoint(folder: str | os.PathLike[str], step: int, state: Any, extra: dict[str, Any]) -> Path:
    """Write ``folder/step_<step>`` and wait until it is on the disk. Every process of the run calls this.

    A checkpoint of the same step is replaced. Those of later steps are removed: ``restore_checkpoint`` skipped them.

    Args:
        folder: The folder of the checkpoints, which is made if necessary. All processes must see the same one.
        step: The number of the step, at least 0.
        state: Any pytree of JAX and NumPy arrays, sharded or not, none of them empty.
        extra: Anything that JSON can hold. The first process's value is stored.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointSaveError: In every process, if one of them could not write its part, for example to a full disk.
        TypeError: If JSON cannot hold ``extra``.
    """
    content = json.dumps({"format": _FORMAT, "step": step, "extra": extra})
    target = checkpoint_path(folder, step)
    # Each save has its own hidden name: after a failed one, threads of TensorStore may still write to its folder.
    token = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    beside = target.with_name(f".{target.name}.{token:08x}.tmp")
    handler = ocp.PyTreeCheckpointHandler()

    def begin() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        (beside / "state").mkdir(parents=True)
        _reserve(beside / "reserved", state)

    def write() -> None:
        if not beside.is_dir():
            raise FileNotFoundError(errno.ENOENT, "not seen by every process: is the file system shared?", str(beside))
        handler.save(epath.Path(beside / "state"), args=ocp.args.PyTreeSave(_by_name(state)))

    def finish() -> None:
        handler.finalize(epath.Path(beside / "state"))
        (beside / "extra.json").write_text(content, encoding="utf-8")
        write_manifest(beside)
        if target.exists():  # a rename does not replace a folder that has files in it
            replace_synced(target, target.with_name(target.name + _REPLACED))
        replace_synced(beside, target)
        _remove_leftovers(target.parent)
        for later, path in _checkpoints(target.parent).items():
            if later > step:
                _remove(path)

    try:
        _together(begin, first_only=True)
        _together(write)
        _together(finish, first_only=True)
    except Exception as error:
        if jax.process_index() == 0:
            _remove_leftovers(target.parent)
        reason = printable(str(error).partition(" [source locations=")[0])  # TensorStore adds places in its source
        raise CheckpointSaveError(f"{target} was not saved: {reason}") from error
    return target


def restore_checkpoint(folder: str | os.PathLike[str], like: Any, report: Callable[[str], None]) -> Restored | None:
    """Read the newest undamaged checkpoint, to the last bit. Every process of the run calls this.

    Args:
        folder: The folder of the checkpoints.
        like: A pytree of the same structure, whose leaves have the shapes, dtypes and shardings of the result.
        report: Called in the first process with a message about each damaged checkpoint, which is skipped.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        CheckpointError: If all checkpoints are damaged, if the newest undamaged one is of another version, if
            ``folder`` is not a folder or cannot be read, or if the processes do not see the same folder.
        OtherStateError: If names, shapes or dtypes differ from those of ``like``; the message lists all that do.
    """
    checkpoints, problem = {}, None
    try:
        checkpoints = _checkpoints(Path(os.path.abspath(folder)))
    except OSError as error:
        problem = error
    newest = _UNREADABLE if problem else _newest_undamaged(checkpoints, report)
    step = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if step == _UNREADABLE:
        reason = problem.strerror if problem else "the first process has the reason"
        raise CheckpointError(
            f"{os.fspath(folder)} cannot be read: {reason}; put the folder of the checkpoints back there, or remove it "
            "to start from the beginning"
        ) from problem
    if step == _NONE:
        return None
    if step == _ALL_DAMAGED:
        raise CheckpointError(
            f"{os.fspath(folder)} has checkpoints, but all are damaged: put an undamaged copy of one there, "
            "or remove the folder to start from the beginning"
        )
    if step not in checkpoints:
        raise CheckpointError(f"{os.fspath(folder)} is not seen by every process: is the file system shared?")
    path = checkpoints[step]
    content = _content(path)
    handler = ocp.PyTreeCheckpointHandler()
    source = epath.Path(path / "state")
    wanted = _by_name(like)
    _check(path, wanted, handler.metadata(source).tree)
    # Orbax takes no scalars of NumPy here, only arrays.
    arrays = {name: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for name, leaf in wanted.items()}
    arguments = ocp.checkpoint_utils.construct_restore_args(arrays)
    tensors = handler.restore(source, args=ocp.args.PyTreeRestore(wanted, restore_args=arguments))
    restored = jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in wanted])
    return Restored(content["step"], restored, content["extra"])


def prune_checkpoints(folder: str | os.PathLike[str], keep: int) -> None:
    """Remove all checkpoints but the newest ``keep``, at least 1. Only the first process calls this."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    checkpoints = _checkpoints(Path(folder))
    for step in sorted(checkpoints)[:-keep]:
        _remove(checkpoints[step])


def _together(action: Callable[[], None], first_only: bool = False) -> None:
    """Run the action in every process, or only in the first; if it fails in one, all raise, and none waits for it."""
    failure = None
    if jax.process_index() == 0 or not first_only:
        try:
            action()
        except Exception as error:  # Orbax and TensorStore document no exceptions
            failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(failure is not None)))
    if failure is not None:
        raise failure
    if failed.size:
        raise RuntimeError(f"process {failed[0]} could not write its part")


def _by_name(state: Any) -> dict[str, Any]:
    """Return the leaves by path. Orbax gets no other structure, as it would store that of optax's tuples."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def _reserve(path: Path, state: Any) -> None:
    """Raise an OSError if the disk or the quota has no room for a state.

    Orbax would raise as well, but halfway through a save each of its writes prints a traceback when it fails.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        size = sum(leaf.nbytes + 2**13 for leaf in jax.tree.leaves(state))  # 8 KiB: Orbax's metadata of an array
        with open(path, "xb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        path.unlink()


def _check(path: Path, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    problems = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted],
        "wrong shape or dtype": [
            f"{name} {stored[name].dtype}{list(stored[name].shape)}, expected {leaf.dtype}{list(leaf.shape)}"
            for name, leaf in wanted.items()
            if name in stored and (stored[name].shape, stored[name].dtype) != (leaf.shape, leaf.dtype)
        ],
    }
    if any(problems.values()):
        raise OtherStateError(with_problems(f"{path} belongs to another network or optimizer:", problems))


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular_file(path / "extra.json", _MAX_BYTES))
        if not (type(content["step"]) is int and isinstance(content["extra"], dict)):
            raise TypeError("step must be an integer and extra an object")
        stored_format = content["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}/extra.json differs from what flax_googlenet writes: {error}") from error
    if stored_format != _FORMAT:
        raise CheckpointError(f"{path} is of another version of flax_googlenet: format {stored_format}")
    return content


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return all checkpoints by step, damaged or not. One that was being replaced counts if the new one is not there.

    Raises:
        OSError: If ``folder`` exists and cannot be listed, for example because it is a file or a broken link.
    """
    try:
        names = sorted(os.listdir(folder), reverse=True)  # "step_00000001" after "step_00000001.replaced"
    except FileNotFoundError:
        if os.path.lexists(folder):
            raise
        return {}
    matches = filter(None, map(_NAME.fullmatch, names))
    return {int(match[1]): folder / match[0] for match in matches if int(match[1]) < 2**31}


def _newest_undamaged(checkpoints: dict[int, Path], report: Callable[[str], None]) -> int:
    if jax.process_index() != 0:
        return _NONE  # the first process decides
    for step in sorted(checkpoints, reverse=True):
        problem = find_damage(checkpoints[step])
        if problem is None:
            return step
        report(f"{checkpoints[step]} is damaged and is skipped: {problem}")
    return _ALL_DAMAGED if checkpoints else _NONE


def write_manifest(folder: Path) -> None:
    """Write the checksums of all files in a folder and below, and wait until the files and the list are on the disk."""
    (folder / _MANIFEST).write_bytes(_checksums(folder))
    for path in (*folder.rglob("*"), folder):
        sync(path)


def find_damage(folder: Path) -> str | None:
    """Return which files were changed, removed or added since ``write_manifest``, or cannot be read; None if none."""
    try:
        stored, computed = read_regular_file(folder / _MANIFEST, _MAX_BYTES), _checksums(folder)
    except OSError as error:
        return str(error)
    if stored == computed:
        return None
    lines = set(stored.splitlines()) ^ set(computed.splitlines())
    names = sorted({line[66:].decode(errors="replace") for line in lines})
    return f"these files differ from {_MANIFEST}: {', '.join(names)}"


def _checksums(folder: Path) -> bytes:
    """Return a line with sha256, two spaces and the name for each file but the manifest, ordered by name."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / _MANIFEST:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return os.fsencode("".join(lines))  # a name may be of any bytes


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill halfway leaves no damaged checkpoint."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.removed")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what failed or killed saves left behind, and put a checkpoint back whose replacement never came."""
    for hidden in folder.glob(".step_*"):
        shutil.rmtree(hidden, ignore_errors=True)
    for aside in folder.glob(f"step_*{_REPLACED}"):
        target = aside.with_suffix("")
        if target.exists():
            _remove(aside)
        else:
            replace_synced(aside, target)
