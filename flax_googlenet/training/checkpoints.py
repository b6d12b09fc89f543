"""A run's checkpoints: folders ``step_00001234``, filled by Orbax, checksummed, and either whole or not there.

A folder holds ``state/`` (Orbax's own), ``extra.json`` and ``manifest.sha256``. It is written under a hidden name and
renamed once the disk has it, so that a kill at any moment leaves the earlier checkpoints alone.
"""

import errno
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
from flax_googlenet.files import read_regular_file, replace_synced
from flax_googlenet.training.manifest import damage, seal
from flax_googlenet.weights.checkpoint import CheckpointError

_FORMAT = 1
_REPLACED = ".replaced"  # what a save puts aside for a new folder of the same step
_NAME = re.compile(rf"step_([0-9]{{8,10}})({re.escape(_REPLACED)})?")
_MAX_EXTRA_BYTES = 2**30
_NONE, _ALL_DAMAGED, _UNREADABLE = -1, -2, -3  # what the first process sends to the others in place of a step


class CheckpointSaveError(GoogLeNetError, RuntimeError):
    """A checkpoint that could not be saved; the earlier ones are as they were."""


class OtherStateError(CheckpointError):
    """A checkpoint that is whole, but of another network or optimizer."""


class Restored(NamedTuple):
    """What ``save`` was given, the state with the shardings that ``restore`` was asked for."""

    step: int
    state: Any
    extra: dict[str, Any]


def save(folder: str | os.PathLike[str], step: int, state: Any, extra: dict[str, Any]) -> Path:
    """Writes ``folder/step_<step>`` and waits until the disk has it. Every process of the run calls this.

    A checkpoint of the same step is replaced. Those of later steps are removed: they are what ``restore`` passed over.

    Args:
        folder: of the checkpoints, made if it is not there; all processes must see the same one.
        step: updates applied so far, at least 0.
        state: any pytree of JAX and NumPy arrays, sharded or not; none may be empty.
        extra: anything JSON can hold. The first process's is stored.

    Returns:
        The checkpoint's own folder.

    Raises:
        CheckpointSaveError: in every process, if one could not write its part: the disk is full, ...
        TypeError: if ``extra`` is not for JSON.
    """
    content = json.dumps({"format": _FORMAT, "step": step, "extra": extra})
    target = Path(os.path.abspath(folder)) / f"step_{step:08d}"
    # A name of its own: after a failed save, threads of TensorStore may still write to that one's folder.
    token = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    beside = target.with_name(f".{target.name}.{token:08x}.tmp")
    handler = ocp.PyTreeCheckpointHandler()

    def begin() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        (beside / "state").mkdir(parents=True)
        _reserve(beside / "reserved", _size(state))

    def write() -> None:
        if not beside.is_dir():
            raise FileNotFoundError(errno.ENOENT, "not seen by every process: is the file system shared?", str(beside))
        handler.save(epath.Path(beside / "state"), args=ocp.args.PyTreeSave(_by_name(state)))

    def finish() -> None:
        handler.finalize(epath.Path(beside / "state"))
        (beside / "extra.json").write_text(content, encoding="utf-8")
        seal(beside)
        if target.exists():  # a rename replaces no folder that has files in it
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
        raise CheckpointSaveError(f"{target} was not saved: {_reason(error)}") from error
    return target


def restore(folder: str | os.PathLike[str], like: Any, fail: Callable[[str], None]) -> Restored | None:
    """Reads the newest checkpoint that is whole, to the last bit. Every process of the run calls this.

    Args:
        folder: as ``save`` was given it.
        like: a pytree of the state's structure; its leaves' shapes, dtypes and shardings are those of the result.
        fail: called in the first process with a message for each checkpoint that is damaged and passed over.

    Returns:
        None if there is no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints but none is whole, if what is at ``folder`` is not a folder that can
            be read, or if the newest whole one is of another state than ``like``, by names, shapes and dtypes: an
            OtherStateError, which lists all that differ.
    """
    checkpoints, problem = {}, None
    try:
        checkpoints = _checkpoints(Path(os.path.abspath(folder)))
    except OSError as error:
        problem = error
    newest = _UNREADABLE if problem else _newest_whole(checkpoints, fail)
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
            f"{os.fspath(folder)} has checkpoints, but none is whole: put an undamaged copy of one there, "
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
    arguments = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if isinstance(leaf, np.ndarray | np.generic)
        else ocp.ArrayRestoreArgs(sharding=leaf.sharding)
        for name, leaf in wanted.items()
    }
    tensors = handler.restore(source, args=ocp.args.PyTreeRestore(wanted, restore_args=arguments))
    restored = jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in wanted])
    return Restored(content["step"], restored, content["extra"])


def prune(folder: str | os.PathLike[str], keep: int) -> None:
    """Removes all checkpoints but the newest ``keep``, at least 1. To be called in the first process."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    checkpoints = _checkpoints(Path(folder))
    for step in sorted(checkpoints)[:-keep]:
        _remove(checkpoints[step])


def _together(action: Callable[[], None], first_only: bool = False) -> None:
    """Runs the action in every process, or the first only. If it fails in one, all raise: none waits for ever."""
    failure = None
    if jax.process_index() == 0 or not first_only:
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise whatever they like
            failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(failure is not None)))
    if failure is not None:
        raise failure
    if failed.size:
        raise RuntimeError(f"process {failed[0]} could not write its part")


def _by_name(state: Any) -> dict[str, Any]:
    """The leaves by their path. Orbax is given no other structure: it would store that of optax's tuples too."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def _size(state: Any) -> int:
    """Bytes that the state takes on the disk, at most: that of its values, and Orbax's notes about each array."""
    return sum(leaf.nbytes + 2**13 for leaf in jax.tree.leaves(state))


def _reserve(path: Path, size: int) -> None:
    """Raises an OSError at once where the disk, or the quota, has not the room.

    Orbax would raise as well, but when it fails half-way, each of its writes under way prints a traceback.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
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
        listing = "\n".join(f"{kind}: {names}" for kind, names in problems.items() if names)
        raise OtherStateError(f"{path} is not of this run's state:\n{listing}")


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular_file(path / "extra.json", _MAX_EXTRA_BYTES))
        if not (type(content["step"]) is int and isinstance(content["extra"], dict)):
            raise TypeError("step must be an integer and extra an object")
        stored_format = content["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}/extra.json is not as flax_googlenet writes it: {error}") from error
    if stored_format != _FORMAT:
        raise CheckpointError(f"{path} is of another version of flax_googlenet: format {stored_format}")
    return content


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Every checkpoint by its step, whole or not. One put aside counts where a kill came before its successor.

    Raises:
        OSError: if ``folder`` is there and cannot be listed: it is a file, a link that leads nowhere, ...
    """
    try:
        names = sorted(os.listdir(folder), reverse=True)  # "step_00000001" after "step_00000001.replaced"
    except FileNotFoundError:
        if os.path.lexists(folder):
            raise
        return {}
    matches = filter(None, map(_NAME.fullmatch, names))
    return {int(match[1]): folder / match[0] for match in matches if int(match[1]) < 2**31}


def _newest_whole(checkpoints: dict[int, Path], fail: Callable[[str], None]) -> int:
    if jax.process_index() != 0:
        return _NONE  # the first process decides
    for step in sorted(checkpoints, reverse=True):
        problem = damage(checkpoints[step])
        if problem is None:
            return step
        fail(printable(f"{checkpoints[step]} is damaged and is passed over: {problem}"))
    return _ALL_DAMAGED if checkpoints else _NONE


def _remove(path: Path) -> None:
    """Renames it first: a kill half-way must not leave a damaged checkpoint."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.removed")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """What failed and killed saves left behind; a checkpoint put aside whose successor did not come is put back."""
    for hidden in folder.glob(".step_*"):
        shutil.rmtree(hidden, ignore_errors=True)
    for aside in folder.glob(f"step_*{_REPLACED}"):
        target = aside.with_suffix("")
        if target.exists():
            _remove(aside)
        else:
            replace_synced(aside, target)


def _reason(error: Exception) -> str:
    """One line: TensorStore adds the places in its source."""
    return printable(str(error).partition(" [source locations=")[0])
