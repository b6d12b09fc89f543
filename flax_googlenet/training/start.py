"""Where a run starts: from new weights, from those of a file, or from its own newest checkpoint."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import numpy as jnp

from flax_googlenet.files import Weights
from flax_googlenet.model import MIN_SIZE, GoogLeNet, Variables
from flax_googlenet.status import CommandError, Status
from flax_googlenet.training import checkpoints
from flax_googlenet.training.datasets import Dataset
from flax_googlenet.training.devices import Devices
from flax_googlenet.training.finetune import balanced_class_weights, new_head
from flax_googlenet.training.recipe import Recipe, RecipeError, make_optimizer
from flax_googlenet.training.step import TrainState, create_train_state
from flax_googlenet.training.tally import Tally

CHECKPOINTS, RECIPE = "checkpoints", "recipe.json"  # in the folder of the run

_CHANGE_NO_BIT = {
    "workers",
    "checkpoint_every",
    "keep",
    "max_corrupt",
    "patience",
}  # fields that need not be as they were


def initial_state(
    devices: Devices, recipe: Recipe, train_data: Dataset, steps_per_epoch: int, weights: Weights | None
) -> tuple[TrainState, Callable[[], TrainState]]:
    """The state before the first step: its shapes, and how to compute it, the same in every process.

    Args:
        devices: that every array of the state is to be on.
        recipe: the recipe.
        train_data: the images to train on, for their classes.
        steps_per_epoch: batches in an epoch.
        weights: to start from; None for new ones. Their last layers stay if they are of the same classes: by name, or
            by number where the file has no names.

    Raises:
        CommandError: if the recipe freezes blocks that the weights have not.
    """
    if weights and (unknown := set(recipe.frozen) - weights.variables["params"].keys()):
        raise CommandError(Status.NOT_DONE, f"frozen: the weights have no {', '.join(sorted(unknown))}")

    class_names = train_data.class_names
    class_weights = None
    if recipe.class_weights == "balanced":
        class_weights = balanced_class_weights(train_data.labels, len(class_names))

    @devices.jit
    def make(variables: Variables | None) -> TrainState:
        key = jax.random.key(recipe.seed)
        if weights is None or variables is None:
            model = GoogLeNet(num_classes=len(class_names))
            variables = model.init(key, jnp.zeros((1, MIN_SIZE, MIN_SIZE, 3), jnp.float32))
        else:
            model = weights.model
            if model.num_classes != len(class_names) or weights.class_names not in (None, list(class_names)):
                model, variables = new_head(model, variables, len(class_names), key)
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
    return devices.shapes(jax.eval_shape(make, variables)), lambda: make(variables)


def resume(
    workdir: Path, shapes: TrainState, identity: dict[str, Any], override: bool, fail: Callable[[str], None]
) -> tuple[Tally, TrainState] | None:
    """Goes on from the newest whole checkpoint in the folder, if there is one.

    Args:
        workdir: the folder of the run. All processes call this.
        shapes: those of the state.
        identity: what must be as it was, for JSON: ``recipe``, ``data`` and ``weights``.
        override: whether to go on if it is not.
        fail: takes the message about a checkpoint that is damaged.

    Returns:
        What was counted, and the state; None if there is no checkpoint.

    Raises:
        CommandError: if the checkpoint is of another recipe, other data or other weights.
        CheckpointError: if no checkpoint is whole, or it is of another network or optimizer.
    """
    folder, recipe = workdir / CHECKPOINTS, workdir / RECIPE
    differing: list[str] = []
    if folder.is_dir() and recipe.is_file():  # first: another recipe may make another state
        try:
            before = dataclasses.asdict(Recipe.from_json(recipe.read_bytes()))
            differing = _differing(identity | {"recipe": before}, identity)
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
    differing = _differing(restored.extra["identity"], identity)
    if differing and not override:
        raise _of_another_run(workdir, differing)
    tally = Tally(step=restored.step, **restored.extra["tally"])
    if restored.extra["identity"]["data"] != identity["data"]:  # accuracies on other images do not compare
        tally = dataclasses.replace(tally, best_step=0, best_accuracy=0.0)
    return tally, restored.state


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
