"""What a run is going to do, checked against its data, weights and devices; and its state before the first step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Int

from flax_googlenet.architecture import BLOCKS, NETWORKS
from flax_googlenet.model import GoogLeNet, Variables
from flax_googlenet.training.classes import find_classes
from flax_googlenet.training.datasets import DataError, Dataset
from flax_googlenet.training.devices import Devices
from flax_googlenet.training.finetune import balanced_class_weights, new_head, reorder_head
from flax_googlenet.training.history import trainings_of
from flax_googlenet.training.recipe import Recipe, RecipeError, make_optimizer
from flax_googlenet.training.splits import open_data
from flax_googlenet.training.step import TrainState, create_train_state
from flax_googlenet.weights.checkpoint import Weights, load_weights

UNEQUAL = 10
"""A run warns if its largest class has at least this many times the images of its smallest class."""

_LISTED_CLASSES = 10  # in the first message of a run


class Head(NamedTuple):
    """What happens to the last layers of the weights that a run starts from."""

    order: Int[np.ndarray, "num_classes"] | None
    """The place of each class of the data in the layers if they are kept, or None if new layers replace them."""
    reason: str
    """A sentence that says what happens and why."""


class Plan(NamedTuple):
    """What a run is going to do. It stays the same from the first step to the last."""

    recipe: Recipe
    train_data: Dataset
    held_out: Dataset
    steps_per_epoch: int
    total_steps: int
    identity: dict[str, Any]
    """What must stay the same when the run is continued: its ``recipe``, ``data`` and ``weights``."""
    messages: tuple[str, ...]
    """What a person should know about the data: sentences."""

    def epoch(self, step: int) -> int:
        """Return the number of epochs that are over after a step."""
        return step // self.steps_per_epoch


def make_plan(
    data: str, recipe: Recipe, weights_path: Path | None, devices: Devices
) -> tuple[Plan, Weights | None, Head | None]:
    """Read the weights, find the images, and check that the recipe can be followed with them.

    Args:
        data: The data, as for ``open_data``.
        recipe: The recipe.
        weights_path: The file of weights to start from, or None for new ones.
        devices: The devices that share each batch.

    Returns:
        The plan, the weights to start from, if there are any, and what happens to their last layers.

    Raises:
        DataError: If the data cannot be trained on.
        RecipeError: If the recipe does not fit the data, the weights or the devices.
        CheckpointError: If the weights cannot be read.
    """
    if recipe.batch_size % jax.device_count():
        fitting = max(1, recipe.batch_size // jax.device_count()) * jax.device_count()
        reason = f"a batch of {recipe.batch_size} cannot be shared evenly by {devices}"
        raise RecipeError(f"{reason}: choose a batch_size of {fitting}, or another multiple")
    weights = load_weights(weights_path, dtype=jnp.float32) if weights_path else None
    variant = weights.model.variant if weights else recipe.variant
    if recipe.image_size < (min_size := NETWORKS[variant].min_size):
        raise RecipeError(f"image_size must be at least {min_size} for the network {variant!r}")
    blocks = set(weights.variables["params"] if weights else BLOCKS)
    if unknown := set(recipe.frozen) - blocks:
        raise RecipeError(f"frozen: the weights have no {', '.join(sorted(unknown))}")
    if blocks <= set(recipe.frozen):
        raise RecipeError("frozen has all blocks, so that nothing would train: leave out fc")
    earlier = trainings_of(str(weights_path), weights.metadata) if weights else ()
    train_data, held_out = open_data(data, held_out=recipe.held_out, seed=recipe.seed, earlier=earlier)
    steps_per_epoch = recipe.steps_per_epoch(len(train_data))
    total_steps = steps_per_epoch * recipe.epochs
    if not total_steps:
        largest = len(train_data) // jax.device_count() * jax.device_count()
        way_out = f"choose a batch_size of {largest} or less" if largest else f"a batch needs one for each of {devices}"
        raise RecipeError(f"{len(train_data)} images are less than a batch of {recipe.batch_size}: {way_out}")
    if total_steps < recipe.accumulate:
        raise RecipeError(
            f"{len(train_data)} images make {total_steps} steps, and a change of the weights takes "
            f"{recipe.accumulate}: set accumulate to {total_steps} or less, or train for more epochs"
        )
    head = find_head(train_data.class_names, data, weights, str(weights_path)) if weights else None
    balanced = recipe.class_weights == "balanced"
    messages = [*train_data.notes, *held_out.notes, *describe_classes(train_data, balanced=balanced)]
    messages.append(f"{len(train_data)} images to train on, {len(held_out)} held out, {total_steps} steps, {devices}")
    identity = {
        "recipe": dataclasses.asdict(recipe),
        "data": [train_data.fingerprint, held_out.fingerprint],
        "weights": weights.digest if weights else None,
    }
    unique = tuple(dict.fromkeys(messages))
    return Plan(recipe, train_data, held_out, steps_per_epoch, total_steps, identity, unique), weights, head


def find_head(class_names: tuple[str, ...], data: str, weights: Weights, path: str) -> Head:
    """Find out whether weights have exactly the classes of the data, in any order, by the rules of ``find_classes``.

    The arguments are those of ``find_classes``.
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
    return Head(np.argsort(match.labels), f"the head of {path} is kept: {why}")


def describe_classes(dataset: Dataset, *, balanced: bool) -> list[str]:
    """Return a line with the class names and the numbers of their images, and a warning if these differ greatly.

    With ``balanced``, the loss weighs the classes, and no warning is needed.
    """
    counts, names = np.bincount(dataset.labels, minlength=len(dataset.class_names)), dataset.class_names
    fewest, most = int(counts.argmin()), int(counts.argmax())
    images = f"{counts[fewest]} ({names[fewest]}) to {counts[most]} ({names[most]}) images each"
    if counts[fewest] == counts[most]:
        images = "1 image each" if counts[most] == 1 else f"{counts[most]} images each"
    listed = names if len(names) <= _LISTED_CLASSES else (*names[: _LISTED_CLASSES - 2], "...", names[-1])
    lines = [f"{len(names)} classes: {', '.join(listed)}; {images}"]
    if not balanced and counts[most] >= UNEQUAL * counts[fewest]:
        lines.append(
            f"warning: {names[most]} has {counts[most]} images to train on and {names[fewest]} {counts[fewest]}: set "
            "class_weights to balanced, so that every class counts the same"
        )
    return lines


def initial_state(
    plan: Plan, weights: Weights | None, head: Head | None, devices: Devices
) -> tuple[TrainState, Callable[[], TrainState]]:
    """Return the shapes of the state before the first step, and the function that computes this state.

    Every device gets a copy of the state. Without weights to start from, ``head`` is None, too.

    Raises:
        RecipeError: If BatchNorm cannot train with such small batches.
    """
    recipe, num_classes = plan.recipe, len(plan.train_data.class_names)
    class_weights = None
    if recipe.class_weights == "balanced":
        class_weights = balanced_class_weights(plan.train_data.labels, num_classes)

    @devices.jit
    def make(variables: Variables | None) -> TrainState:
        key = jax.random.key(recipe.seed)
        if weights is None or head is None or variables is None:
            model = GoogLeNet(variant=recipe.variant, num_classes=num_classes)
            min_size = NETWORKS[recipe.variant].min_size
            variables = model.init(key, jnp.zeros((1, min_size, min_size, 3), jnp.float32))
        elif head.order is None:
            model, variables = new_head(weights.model, variables, num_classes, key)
        else:
            model, variables = weights.model, reorder_head(variables, head.order)
        return create_train_state(
            model.clone(dropout=recipe.dropout, dropout_aux=recipe.dropout_aux, dtype=jnp.dtype(recipe.dtype).type),
            variables,
            make_optimizer(recipe, plan.steps_per_epoch),
            frozen=recipe.frozen,
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
    """Raise a RecipeError if the layers reduce a single image to one pixel, of which BatchNorm has no variance."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables, rngs = {"params": state.params, "batch_stats": state.batch_stats}, {"dropout": jax.random.key(0)}
    apply = partial(state.model.apply, train=True, frozen=state.frozen, mutable=["batch_stats"], rngs=rngs)
    try:
        jax.eval_shape(apply, variables, image)
    except ValueError as error:
        reason = f"BatchNorm cannot train on one image of {image_size}x{image_size} pixels at a time"
        raise RecipeError(f"{reason}: choose a batch_size of 2 or more") from error


def update_class_weights(state: TrainState, plan: Plan, devices: Devices) -> TrainState:
    """Return a restored state whose class weights, if it has any, are those of the data, which may have changed."""
    if state.class_weights is None:
        return state
    weights = balanced_class_weights(plan.train_data.labels, len(plan.train_data.class_names))
    return state.replace(class_weights=devices.replicate(weights.astype(state.class_weights.dtype)))
