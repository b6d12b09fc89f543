"""The folder of a run: the names in it, its lock, the checkpoint to continue from, and the files of weights."""

import dataclasses
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from flax_googlenet.errors import GoogLeNetError, printable
from flax_googlenet.files import lock, read_regular_file
from flax_googlenet.training.checkpoints import OtherStateError, prune_checkpoints, restore_checkpoint, save_checkpoint
from flax_googlenet.training.recipe import Recipe, RecipeError
from flax_googlenet.training.step import TrainState
from flax_googlenet.training.stopping import RunCounts
from flax_googlenet.weights.checkpoint import CheckpointError, save

CHECKPOINTS = "checkpoints"
RECIPE = "recipe.json"
LAST_WEIGHTS = "model.safetensors"
BEST_WEIGHTS = "best.safetensors"
_LOCK = ".lock"
_MAX_RECIPE_BYTES = 2**20

# The fields of a recipe that may change when a run is continued: they change no bit of what a step computes.
_WITHOUT_EFFECT = {"workers", "checkpoint_every", "keep", "max_corrupt", "patience"}


class WorkdirError(GoogLeNetError, RuntimeError):
    """The folder of a run cannot be used: it holds another run, or it cannot be read or written."""


class WorkdirInUseError(WorkdirError):
    """Another process trains in the folder; the message names it."""


@contextmanager
def claim(workdir: str | os.PathLike[str], warn: Callable[[str], object] = warnings.warn) -> Iterator[None]:
    """Make ``workdir`` if there is no such folder, and keep other runs out of it until the block ends.

    The claim is the kernel's lock on ``workdir/.lock``, which ends with the process even if that is killed.

    Args:
        workdir: The folder of the run.
        warn: Called with a warning if the file system has no locks, so that the claim keeps nobody out.

    Raises:
        WorkdirInUseError: If another run has claimed the folder.
        OSError: If the folder cannot be made.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a+", encoding="utf-8") as file:  # not "w": the other run's line is read below
        try:
            lock(file, warn)
        except BlockingIOError:
            file.seek(0)
            holder = printable(file.read().strip()) or "another process"
            raise WorkdirInUseError(
                f"{folder} is in use by {holder}: wait for it to end, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
        file.truncate(0)


def save_run(workdir: Path, counts: RunCounts, state: TrainState, identity: dict[str, Any], keep: int) -> Path:
    """Save a checkpoint for ``resume_run``, remove all but the newest ``keep``, and return the folder of the new one.

    All processes call this.

    Raises:
        CheckpointSaveError: If it cannot be saved.
    """
    values = dataclasses.asdict(counts)
    path = save_checkpoint(workdir / CHECKPOINTS, values.pop("step"), state, {"identity": identity, "tally": values})
    if jax.process_index() == 0:
        prune_checkpoints(workdir / CHECKPOINTS, keep)
    return path


def resume_run(
    workdir: Path, shapes: TrainState, identity: dict[str, Any], override: bool, report: Callable[[str], None]
) -> tuple[RunCounts, TrainState] | None:
    """Read the newest undamaged checkpoint in the folder of a run. All processes call this.

    Args:
        workdir: The folder of the run.
        shapes: The shapes, dtypes and shardings of the state.
        identity: What makes the run the same: its ``recipe``, ``data`` and ``weights``, as JSON can hold them.
        override: Whether to continue although the identity has changed.
        report: Called in the first process with a message about each damaged checkpoint, and with a warning if the run
            was trained on other data before.

    Returns:
        What the run has counted and its state, or None if there is no checkpoint.

    Raises:
        WorkdirError: If the checkpoint belongs to another recipe, other data or other weights, or if the recipe of the
            run cannot be read.
        RecipeError: If the recipe of the run is damaged.
        CheckpointError: If all checkpoints are damaged, if their folder cannot be read, or if the newest undamaged one
            belongs to another network or optimizer, or to a later version.
    """
    folder, recipe = workdir / CHECKPOINTS, workdir / RECIPE
    changes: list[str] = []
    if folder.is_dir() and os.path.lexists(recipe):  # compared first: the state of another recipe may not fit
        try:
            before = dataclasses.asdict(Recipe.from_json(read_regular_file(recipe, _MAX_RECIPE_BYTES)))
            changes = _changes(identity | {"recipe": before}, identity)
        except OSError as error:
            raise WorkdirError(f"cannot read {recipe}: {error.strerror}") from error
        except RecipeError as error:
            if not override:
                raise RecipeError(f"{recipe}: {error}") from error
        if changes and not override:
            raise _another_run(workdir, changes, ", or set override")
    try:
        restored = restore_checkpoint(folder, shapes, report)
    except OtherStateError as error:
        if not changes:
            raise
        raise _another_run(workdir, changes) from error
    if restored is None:
        return None
    try:
        before = restored.extra["identity"]
        changes = _changes(before, identity)
        counts = RunCounts(step=restored.step, **restored.extra["tally"])
    except (KeyError, TypeError) as error:
        message = f"{folder}: the checkpoint of step {restored.step} is of another version of flax_googlenet: {error}"
        raise CheckpointError(message) from error
    if changes and not override:
        raise _another_run(workdir, changes, ", or set override")
    has_other_data = before["data"] != identity["data"]
    if has_other_data:
        if jax.process_index() == 0:
            report("warning: the run was trained on other data before, and may have seen images that are held out now")
        past = {"trained_on": before["data"][0], "recipe": before["recipe"]}
        counts.trained_before = [past, *counts.trained_before]
    # Accuracies on other images cannot be compared, and no message may name best weights that somebody has removed.
    if has_other_data or not (workdir / BEST_WEIGHTS).exists():
        counts.best_step, counts.best_accuracy = 0, 0.0
    return counts, restored.state


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return how the identity of a run differs from the one before, in words."""
    # A recipe of an earlier version lacks the newer fields. Their defaults are how that version trained.
    before = before | {"recipe": dataclasses.asdict(Recipe()) | before["recipe"]}
    before, now = json.loads(json.dumps([before, now]))  # tuples become lists
    fields = [
        f"{name} {before['recipe'].get(name)}, now {value}"
        for name, value in now["recipe"].items()
        if value != before["recipe"].get(name) and name not in _WITHOUT_EFFECT
    ]
    return fields + [f"other {name}" for name in ("data", "weights") if before[name] != now[name]]


def _another_run(workdir: Path, changes: list[str], way_out: str = "") -> WorkdirError:
    return WorkdirError(f"{workdir} holds a run with {'; '.join(changes)}: choose another folder{way_out}")


def write_weights(path: Path, state: TrainState, metadata: dict[str, Any]) -> None:
    """Write the weights to evaluate, which are the moving average if the state has one, with the network in float32.

    Raises:
        OSError: If they cannot be written.
    """
    variables = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), state.eval_variables)
    save(path, state.model.clone(dtype=jnp.float32), variables, metadata)
