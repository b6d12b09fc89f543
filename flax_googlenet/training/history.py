"""Reads from the metadata of a file of weights which images the weights were trained on."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax_googlenet.training.recipe import PRESETS, Recipe, RecipeError


class Training(NamedTuple):
    """What is known about one training of some weights."""

    weights: str
    """The name of the weights in messages."""
    held_out: float
    """The fraction of the images that was held out, as for ``open_data``."""
    seed: int
    """The seed of the choice of the held-out images, as for ``open_data``."""
    trained_on: str | None
    """The fingerprint of the images that the weights were trained on, or None if it is not known."""
    before: "tuple[Training, ...]" = ()
    """The known trainings of the same weights, the last one first. This training may be among them."""


def last_training(path: str, metadata: Mapping[str, Any]) -> Training:
    """Return the training that made the weights in a file, with all known trainings in ``before``.

    The held-out images of a file without a recipe are assumed to be those of the preset ``digits``.
    """
    recipe = recipe_of(metadata) or PRESETS["digits"]
    return Training(path, recipe.held_out, recipe.seed, metadata.get("trained_on"), trainings_of(path, metadata))


def trainings_of(path: str, metadata: Mapping[str, Any]) -> tuple[Training, ...]:
    """Return all known trainings of the weights in a file, the last one first."""
    pasts = [(recipe_of(past), past["trained_on"]) for past in past_trainings(metadata)]
    return tuple(Training(path, recipe.held_out, recipe.seed, data) for recipe, data in pasts if recipe)


def past_trainings(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the known trainings as a new file stores them under ``trained_before``, the last one first."""
    before = metadata.get("trained_before")
    return [
        {"trained_on": entry["trained_on"], "recipe": entry["recipe"]}
        for entry in (metadata, *(before if isinstance(before, list) else ()))
        if isinstance(entry, Mapping) and isinstance(entry.get("trained_on"), str) and recipe_of(entry)
    ]


def recipe_of(metadata: Mapping[str, Any]) -> Recipe | None:
    """Return the recipe in metadata, or None if there is none. Metadata can hold anything under that name."""
    try:
        return Recipe.from_json(json.dumps(metadata["recipe"]))
    except (KeyError, RecipeError, RecursionError):
        return None
