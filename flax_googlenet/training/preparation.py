"""Where a run starts: from new weights, from those of a file, or from its own newest checkpoint."""

import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Int

from flax_googlenet.commands.status import CommandError, Status
from flax_googlenet.files import read_regular_file
from flax_googlenet.model import MIN_SIZE, GoogLeNet, Variables
from flax_googlenet.training import checkpoints
from flax_googlenet.training.classes import find_classes
from flax_googlenet.training.datasets import DataError, Dataset
from flax_googlenet.training.devices import Devices
from flax_googlenet.training.finetune import balanced_class_weights, new_head, reorder_head
from flax_googlenet.training.outcome import BEST
from flax_googlenet.training.recipe import Recipe, RecipeError, make_optimizer
from flax_googlenet.training.step import TrainState, create_train_state
from flax_googlenet.training.tally import Tally
from flax_googlenet.weights.checkpoint import CheckpointError, Weights

CHECKPOINTS, RECIPE = "checkpoints", "recipe.json"  # in the folder of the run
_MAX_RECIPE_BYTES = 2**20

UNEQUAL = 10
"""A run warns if its largest class has at least so many times the images of its smallest one."""
_LISTED = 10  # class names in the first lines of a run

# The fields of a recipe that may differ when a run is resumed: they change no bit of it.
_CHANGE_NO_BIT = {"workers", "checkpoint_every", "keep", "max_corrupt", "patience"}


class Head(NamedTuple):
    """What becomes of the last layers of the weights that a run starts from."""

    order: Int[np.ndarray, "num_classes"] | None
    """For each class of the data, its place in the layers, which are kept; or None if new ones replace them."""
    reason: str
    """A sentence for the person."""


def find_head(class_names: tuple[str, ...], data: str, weights: Weights, path: str) -> Head:
    """Find out whether the weights have exactly the classes of the data, in any order, as ``find_classes`` does.

    Args:
        class_names: the class names of the data.
        data, path: what to call the data and the weights in messages.
        weights: the weights.
    """
    replaced = f"the head of {path} is replaced by a new one"
    num_classes = weights.model.num_classes
    try:
        match = find_classes(class_names, data, weights, path)
    except DataError:
        why = f"are not those of {data}" if weights.class_names else f"have no names, and {data} has {len(class_names)}"
        return Head(None, f"{replaced}: its {num_classes} classes {why}")
    if not match.is_one_to_one:
        return Head(None, f"{replaced}: {data} has only {len(class_names)} of its {num_classes} classes")
    why = "; ".join(match.notes) or f"its classes are those of {data}"
    return Head(np.argsort(match.wanted), f"the head of {path} is kept: {why}")


def describe_classes(dataset: Dataset, *, balanced: bool) -> list[str]:
    """Return lines that name the classes and count their images, with a warning if these are very unequal."""
    counts, names = np.bincount(dataset.labels, minlength=len(dataset.class_names)), dataset.class_names
    fewest, most = int(counts.argmin()), int(counts.argmax())
    images = f"{counts[fewest]} ({names[fewest]}) to {counts[most]} ({names[most]}) images each"
    if counts[fewest] == counts[most]:
        images = "1 image each" if counts[most] == 1 else f"{counts[most]} images each"
    listing = ", ".join(names if len(names) <= _LISTED else (*names[: _LISTED - 2], "...", names[-1]))
    lines = [f"{len(names)} classes: {listing}; {images}"]
    if not balanced and counts[most] >= UNEQUAL * counts[fewest]:
        lines.append(
            f"warning: {names[most]} has {counts[most]} images to train on and {names[fewest]} {counts[fewest]}: with "
            "--recipe.class-weights balanced every class counts the same"
        )
    return lines


def initial_state(
    devices: Devices,
    recipe: Recipe,
    train_data: Dataset,
    steps_per_epoch: int,
    weights: Weights | None,
    head: Head | None,
) -> tuple[TrainState, Callable[[], TrainState]]:
    """The state before the first step: its shapes, and how to compute it, the same in every process.

    Args:
        devices: that every array of the state is to be on.
        recipe: the recipe.
        train_data: the images to train on, for their classes.
        steps_per_epoch: batches in an epoch.
        weights: to start from; None for new ones.
        head: what becomes of their last layers; None where there are no weights.

    Raises:
        CommandError: if the recipe freezes blocks that the weights have not, or a batch is too small for BatchNorm.
    """
    if weights and (unknown := set(recipe.frozen) - weights.variables["params"].keys()):
        raise CommandError(Status.NOT_DONE, f"frozen: the weights have no {', '.join(sorted(unknown))}")

    num_classes = len(train_data.class_names)
    class_weights = None
    if recipe.class_weights == "balanced":
        class_weights = balanced_class_weights(train_data.labels, num_classes)

    @devices.jit
    def make(variables: Variables | None) -> TrainState:
        key = jax.random.key(recipe.seed)
        if weights is None or head is None or variables is None:
            model = GoogLeNet(num_classes=num_classes)
            variables = model.init(key, jnp.zeros((1, MIN_SIZE, MIN_SIZE, 3), jnp.float32))
        else:
            model = weights.model
            if head.order is None:
                model, variables = new_head(model, variables, num_classes, key)
            else:
                variables = reorder_head(variables, head.order)
        return create_train_state(
            model.clone(
                dropout=recipe.dropout,
                dropout_aux=recipe.dropout_aux,
                frozen=recipe.frozen,
                dtype=jnp.dtype(recipe.dtype).type,
            ),
            variables,
            make_optimizer(recipe, steps_per_epoch),
            label_smoothing=recipe.label_smoothing,
            class_weights=class_weights,
            aux_weight=recipe.aux_weight,
            average_decay=recipe.average_decay,
        )

    variables = weights.variables if weights else None
    shapes = jax.eval_shape(make, variables)
    if recipe.batch_size == 1:
        _require_statistics(shapes, recipe.image_size)
    return devices.shapes(shapes), lambda: make(variables)


def _require_statistics(state: TrainState, image_size: int) -> None:
    """Refuse one small image a batch: where the layers leave one pixel of it, BatchNorm has no variance."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    apply = partial(state.model.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    try:
        jax.eval_shape(apply, {"params": state.params, "batch_stats": state.batch_stats}, image)
    except ValueError as error:
        reason = f"BatchNorm cannot train on one image of {image_size}x{image_size} pixels at a time"
        raise CommandError(Status.NOT_DONE, f"{reason}: choose --recipe.batch-size 2 or more") from error


def resume(
    workdir: Path, shapes: TrainState, identity: dict[str, Any], override: bool, fail: Callable[[str], None]
) -> tuple[Tally, TrainState] | None:
    """Goes on from the newest whole checkpoint in the folder, if there is one.

    Args:
        workdir: the folder of the run. All processes call this.
        shapes: those of the state.
        identity: what must be as it was, for JSON: ``recipe``, ``data`` and ``weights``.
        override: whether to go on if it is not.
        fail: takes the message about a checkpoint that is damaged, and a warning about other data than before.

    Returns:
        What was counted, and the state; None if there is no checkpoint.

    Raises:
        CommandError: if the checkpoint is of another recipe, other data or other weights, or the recipe of the run
            cannot be read.
        CheckpointError: if no checkpoint is whole, if the folder of the checkpoints cannot be read, or if the newest
            whole one is of another network or optimizer, or of a later version.
    """
    folder, recipe = workdir / CHECKPOINTS, workdir / RECIPE
    differing: list[str] = []
    if folder.is_dir() and os.path.lexists(recipe):  # first: another recipe may make another state
        try:
            before = dataclasses.asdict(Recipe.from_json(read_regular_file(recipe, _MAX_RECIPE_BYTES)))
            differing = _differing(identity | {"recipe": before}, identity)
        except OSError as error:
            raise CommandError(Status.NOT_DONE, f"cannot read {recipe}: {error.strerror}") from error
        except RecipeError as error:
            if not override:
                raise CommandError(Status.NOT_DONE, f"{recipe}: {error}") from error
        if differing and not override:
            raise _of_another_run(workdir, differing)
    try:
        restored = checkpoints.restore(folder, shapes, fail)
    except checkpoints.OtherStateError as error:
        if not differing:
            raise
        raise _of_another_run(workdir, differing, hint="") from error
    if restored is None:
        return None
    try:
        differing = _differing(restored.extra["identity"], identity)
        tally = Tally(step=restored.step, **restored.extra["tally"])
    except (KeyError, TypeError) as error:
        message = f"{folder}: the checkpoint of step {restored.step} is of another version of flax_googlenet: {error}"
        raise CheckpointError(message) from error
    if differing and not override:
        raise _of_another_run(workdir, differing)
    before = restored.extra["identity"]
    has_other_data = before["data"] != identity["data"]
    if has_other_data:
        if jax.process_index() == 0:
            fail("warning: the run was trained on other data before: they may have images that are held out now")
        past = {"trained_on": before["data"][0], "recipe": before["recipe"]}
        tally = dataclasses.replace(tally, trained_before=[past, *tally.trained_before])
    # Accuracies on other images do not compare, and best weights that somebody has removed are not to be named.
    if has_other_data or not (workdir / BEST).exists():
        tally = dataclasses.replace(tally, best_step=0, best_accuracy=0.0)
    return tally, restored.state


def weigh_classes(state: TrainState, devices: Devices, train_data: Dataset) -> TrainState:
    """Return a resumed state whose class weights, if it has any, are those of the data, which --override may change."""
    if state.class_weights is None:
        return state
    weights = balanced_class_weights(train_data.labels, len(train_data.class_names))
    return state.replace(class_weights=devices.replicate(weights.astype(state.class_weights.dtype)))


def save(workdir: Path, tally: Tally, state: TrainState, identity: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint for ``resume``; all processes call this. Raises ``CheckpointSaveError``."""
    extra = {"identity": identity, "tally": {k: v for k, v in dataclasses.asdict(tally).items() if k != "step"}}
    path = checkpoints.save(workdir / CHECKPOINTS, tally.step, state, extra)
    if jax.process_index() == 0:
        checkpoints.prune(workdir / CHECKPOINTS, keep)
    return path


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a message says of two runs that are not the same."""
    # A checkpoint of an earlier version lacks the fields that came later: their defaults are what it has trained with.
    before = before | {"recipe": dataclasses.asdict(Recipe()) | before["recipe"]}
    before, now = json.loads(json.dumps([before, now]))  # tuples as lists
    fields = [
        f"{name} {before['recipe'].get(name)}, now {value}"
        for name, value in now["recipe"].items()
        if value != before["recipe"].get(name) and name not in _CHANGE_NO_BIT
    ]
    return fields + [f"other {name}" for name in ("data", "weights") if before[name] != now[name]]


def _of_another_run(workdir: Path, differing: list[str], hint: str = ", or add --override") -> CommandError:
    return CommandError(
        Status.NOT_DONE, f"{workdir} holds a run with {'; '.join(differing)}: choose another folder{hint}"
    )
