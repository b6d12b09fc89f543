"""Recipes are strict JSON with values that make sense; their schedules and optimizer are PyTorch's."""

import dataclasses
import json
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from jax import numpy as jnp

from flax_googlenet.architecture import NETWORKS
from flax_googlenet.model import GoogLeNet, variable_shapes
from flax_googlenet.training.recipe import PRESETS, Recipe, RecipeError, make_optimizer, schedule


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_survives_json(name: str) -> None:
    assert Recipe.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_json_of_an_earlier_version_gets_the_defaults_of_newer_fields() -> None:
    assert Recipe.from_json('{"epochs": 3, "crop_area": [0.5, 1]}') == Recipe(epochs=3, crop_area=(0.5, 1.0))


def test_unknown_fields_of_a_later_version_are_named() -> None:
    with pytest.raises(RecipeError, match="unknown fields: colour, shape"):
        Recipe.from_json(json.dumps(dataclasses.asdict(Recipe()) | {"shape": 1, "colour": "red"}))


@pytest.mark.parametrize("variant", NETWORKS)
def test_a_recipe_can_train_every_network(variant: Any) -> None:
    assert Recipe.from_json(Recipe(variant=variant).to_json()).variant == variant


@pytest.mark.parametrize("text", ["", "[]", "3", '{"epochs": ', b"\xff", "[" * 10**5, '{"seed": ' + "9" * 5000 + "}"])
def test_text_that_is_not_a_recipe_is_refused(text: str | bytes) -> None:
    with pytest.raises(RecipeError, match="not a recipe that to_json wrote"):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"schedule": "linear"}, "schedule must be one of constant, step, cosine, poly"),
        ({"crop_area": (1.0, 0.5)}, "crop_area must be ascending"),
        ({"frozen": ("conv9",)}, "frozen must name blocks among conv1"),
        ({"image_size": 14}, "image_size must be at least 15"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite float"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite float"),
        ({"learning_rate": 10**400}, "learning_rate must be finite float"),
        ({"epochs": 10**400}, "epochs must be less than 2**31"),
        ({"crop_area": (0.5, float("inf"))}, "crop_area must be tuple[finite float, finite float]"),
        ({"seed": 1.5, "epochs": "90"}, "seed must be int; epochs must be int"),
        ({"flip": 1}, "flip must be bool"),
        ({"frozen": "conv1"}, "frozen must be tuple[str, ...]"),
        ({"average_decay": 1.0}, "average_decay must be more than 0 and less than 1"),
        ({"warmup_epochs": -1.0}, "warmup_epochs must be at least 0"),
        ({"epochs": 0, "keep": 0}, "epochs must be at least 1; keep must be at least 1"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        dataclasses.replace(Recipe(), **change)
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.from_json(json.dumps(dataclasses.asdict(Recipe()) | change))


def rates(recipe: Recipe, steps_per_epoch: int, epochs: list[float]) -> list[float]:
    rate = schedule(recipe, steps_per_epoch)
    with jax.numpy_dtype_promotion("standard"):  # as in train_step
        return [float(rate(jnp.asarray(round(epoch * steps_per_epoch), jnp.int32))) for epoch in epochs]


def test_the_papers_learning_rate_falls_by_4_percent_every_8_epochs() -> None:
    expected = [0.01, 0.01, 0.01 * 0.96, 0.01 * 0.96**2, 0.01 * 0.96**31]
    np.testing.assert_allclose(rates(PRESETS["paper"], 100, [0, 7.99, 8, 23.99, 249]), expected, rtol=1e-6)


def test_caffes_learning_rate_falls_with_the_square_root_of_the_steps_that_are_left() -> None:
    expected = [0.01 * (1 - epoch / 60) ** 0.5 for epoch in (0, 15, 45, 59)]
    np.testing.assert_allclose(rates(PRESETS["bvlc"], 100, [0, 15, 45, 59]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "warmup", "rest"),
    [
        (PRESETS["imagenet"], 50, 850),
        (dataclasses.replace(PRESETS["finetune"], epochs=1), 5, 5),  # a short run warms up for half of its steps
        (dataclasses.replace(PRESETS["digits"], epochs=1, warmup_epochs=0.1), 1, 9),
    ],
)
def test_the_learning_rate_is_pytorchs_linear_warm_up_from_one_step_and_then_a_cosine_to_0(
    recipe: Recipe, warmup: int, rest: int
) -> None:
    sgd = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    linear = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=1 / warmup, total_iters=warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=rest)
    scheduler = torch.optim.lr_scheduler.SequentialLR(sgd, [linear, cosine], milestones=[warmup])
    expected = []
    for _ in range(warmup + rest):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    with jax.numpy_dtype_promotion("standard"):
        rate = schedule(recipe, steps_per_epoch=10)(jnp.arange(warmup + rest))
    assert rate[0] == pytest.approx(recipe.learning_rate / warmup, rel=1e-6)  # so the first step has an effect
    np.testing.assert_allclose(rate, expected, rtol=1e-5, atol=1e-9)


def test_with_accumulation_the_schedule_counts_weight_updates() -> None:
    one, four = (schedule(dataclasses.replace(Recipe(), accumulate=n), 100) for n in (1, 4))
    with jax.numpy_dtype_promotion("standard"):
        assert float(four(jnp.asarray(500))) == pytest.approx(float(one(jnp.asarray(2000))), rel=1e-6)


def train(recipe: Recipe, params: dict[str, Any], grads: list[dict[str, Any]]) -> dict[str, Any]:
    optimizer = make_optimizer(recipe, steps_per_epoch=10)
    state = optimizer.init(params)
    for grad in grads:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.fixture
def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "conv1": {"kernel": jnp.asarray(rng.standard_normal((2, 3))), "bias": jnp.asarray(rng.standard_normal(3))},
        "fc": {"kernel": jnp.asarray(rng.standard_normal((3, 4))), "bias": jnp.asarray(rng.standard_normal(4))},
    }


@pytest.fixture
def grads(params: dict[str, Any]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), params) for _ in range(6)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_optimizer_is_pytorchs_sgd_with_decay_of_the_kernels_and_a_rate_for_the_head(
    nesterov: bool, params: dict[str, Any], grads: list[dict[str, Any]]
) -> None:
    recipe = Recipe(learning_rate=0.1, nesterov=nesterov, schedule="constant", warmup_epochs=0.0, weight_decay=0.01)
    result = train(dataclasses.replace(recipe, head_learning_rate=10.0), params, grads)

    tensors = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), params)
    groups = [
        {"params": [x], "lr": 1.0 if block == "fc" else 0.1, "weight_decay": 0.01 if name == "kernel" else 0.0}
        for block, layer in tensors.items()
        for name, x in layer.items()
    ]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov)
    for grad in grads:
        for x, g in zip(jax.tree.leaves(tensors), jax.tree.leaves(grad), strict=True):
            x.grad = torch.tensor(np.asarray(g))
        sgd.step()
    # 2e-16 measured.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y.detach().numpy(), rtol=0, atol=1e-14), result, tensors)


def test_accumulation_averages_the_gradients(params: dict[str, Any], grads: list[dict[str, Any]]) -> None:
    recipe = Recipe(schedule="constant", warmup_epochs=0.0)
    means = [jax.tree.map(lambda *x: sum(x) / 3, *grads[i : i + 3]) for i in (0, 3)]
    small_steps = train(dataclasses.replace(recipe, accumulate=3), params, grads)
    # MultiSteps keeps a running mean with float32 factors: 6e-9 measured.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-7), small_steps, train(recipe, params, means)
    )


def test_the_biases_and_batchnorm_of_the_network_are_not_decayed() -> None:
    recipe = Recipe(learning_rate=1.0, schedule="constant", warmup_epochs=0.0, weight_decay=0.5, nesterov=False)
    ones = jax.tree.map(lambda x: np.ones([1] * len(x.shape)), variable_shapes(GoogLeNet())["params"])  # few shapes
    decayed = train(recipe, ones, [jax.tree.map(np.zeros_like, ones)])
    by_name = {(path[-1].key, float(x.max())) for path, x in jax.tree_util.tree_leaves_with_path(decayed)}
    assert by_name == {("kernel", 0.5), ("scale", 1.0), ("bias", 1.0)}
