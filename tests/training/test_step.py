"""The training step against torch.optim.SGD on torchvision's model, and what it does beyond PyTorch."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest
import reference
import torch
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict
from jax import numpy as jnp
from proof import FLOAT64_LIMIT, float32_limit, relative_error
from side_by_side import WEIGHT_DECAY, optax_sgd, torch_sgd
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.architecture import BLOCKS
from flax_googlenet.training import (
    TrainState,
    create_train_state,
    cross_entropy,
    eval_step,
    scale_heads,
    train_step,
)

MODEL64 = GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64)
NO_DROPOUT64 = MODEL64.clone(dropout=0.0, dropout_aux=0.0)
KEY = jax.random.key(0)
AVERAGE_DECAY = 0.8

Batch = dict[str, np.ndarray]
Tensors = dict[str, np.ndarray]
"""Parameters, statistics or gradients, by torchvision's names."""


def torch_in_training(state_dict: Tensors, frozen: Sequence[str] = ()) -> TorchGoogLeNet:
    model = reference.build_for_training(state_dict)
    for name in frozen:
        model.get_submodule(name).eval().requires_grad_(False)
    return model


def random_batches(steps: int, batch_size: int, size: int) -> list[Batch]:
    rng = np.random.default_rng([steps, batch_size, size])
    return [
        {
            "image": rng.standard_normal((batch_size, size, size, 3)),
            "label": rng.integers(0, 1000, batch_size),
        }
        for _ in range(steps)
    ]


def tensors(state: TrainState) -> Tensors:
    named = flax_googlenet.to_torchvision({"params": state.params, "batch_stats": state.batch_stats})
    return {name: np.array(x) for name, x in named.items() if not name.endswith("num_batches_tracked")}


def torch_tensors(model: TorchGoogLeNet) -> Tensors:
    state_dict = model.state_dict()
    return {k: v.numpy().copy() for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}


def largest_error(actual: Tensors, expected: Tensors) -> float:
    """Return the largest relative error of all tensors."""
    assert actual.keys() == expected.keys()
    return float(np.max([relative_error(actual[name], x) for name, x in expected.items()]))  # NaN wins, unlike in max()


def copied(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)  # np.asarray would be a view of memory that the next step reuses


def gradients_and_statistics(state: TrainState, params: Any) -> Tensors:
    """Return the gradients of the first step, which began with ``params``, and the statistics after it.

    After one step the momentum is the gradient plus the weight decay.
    """
    momentum = optax.tree.get(state.opt_state, "trace")
    gradients = jax.tree.map(lambda m, x: np.asarray(m, np.float64) - WEIGHT_DECAY * x, momentum, params)
    named = flax_googlenet.to_torchvision({"params": gradients, "batch_stats": copied(state.batch_stats)})
    return {name if "running" in name else f"gradient of {name}": x for name, x in named.items()}


def torch_gradients_and_statistics(model: TorchGoogLeNet) -> Tensors:
    gradients = {f"gradient of {name}": x.grad.numpy().copy() for name, x in model.named_parameters()}
    return gradients | {name: x.numpy().copy() for name, x in model.named_buffers() if "running" in name}


def errors_by_kind(actual: Tensors, expected: Tensors) -> dict[str, list[float]]:
    """Return the relative errors of the gradients and of both statistics."""
    errors = {}
    for kind, count in {"running_mean": 59, "running_var": 59, "gradient": 187}.items():
        names = [name for name in expected if kind in name]
        assert len(names) == count
        errors[kind] = [relative_error(actual[name], expected[name]) for name in names]
    return errors


@pytest.fixture(scope="module")
def lockstep(state_dict: Tensors, variables64: dict[str, Any]) -> dict[str, Any]:
    """30 steps of both libraries in float64 without dropout. The average that ours keeps changes nothing else."""
    batches = random_batches(30, 8, 56)
    model = torch_in_training(state_dict)
    optimizer = torch_sgd(model)
    expected_losses, expected_first = [], {}
    for batch in batches:
        expected_losses.append(reference.train_step(model, optimizer, batch["image"], batch["label"]))
        expected_first = expected_first or torch_gradients_and_statistics(model)

    given = jax.tree.map(jnp.array, variables64)
    state = create_train_state(NO_DROPOUT64, given, optax_sgd(), average_decay=AVERAGE_DECAY)
    losses, watched, first = [], [], {}
    for step, batch in enumerate(batches):
        with jax.no_tracing(step > 0):  # it compiles once
            state, metrics = train_step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
        watched.append(copied((state.params["conv1"], state.batch_stats["conv1"])))
        first = first or gradients_and_statistics(state, variables64["params"])
    return {
        "batches": batches,
        "given": given,
        "state": state,
        "losses": np.array(losses),
        "expected_losses": np.array(expected_losses),
        "expected": torch_tensors(model),
        "first": first,
        "expected_first": expected_first,
        "watched": watched,
    }


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a TPU has no float64")
def test_thirty_steps_are_those_of_torch_optim_sgd(lockstep: dict[str, Any]) -> None:
    """Training is chaotic: a difference grows tenfold in about five steps."""
    errors = np.abs(lockstep["losses"] / lockstep["expected_losses"] - 1)
    final = largest_error(tensors(lockstep["state"]), lockstep["expected"])
    print(f"loss: first step {errors[0]:.1e}, largest {errors.max():.1e}; parameters and statistics {final:.1e}")
    assert errors[0] < 1e-14  # 7e-16 measured
    assert errors.max() < 1e-7  # 1e-10 measured
    assert final < 1e-6  # 2e-9 measured
    assert lockstep["losses"].std() > 0.1  # they are not all the same
    assert int(lockstep["state"].step) == 30


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a TPU has no float64")
def test_the_gradients_and_statistics_of_a_step_are_torchs(lockstep: dict[str, Any]) -> None:
    for kind, errors in errors_by_kind(lockstep["first"], lockstep["expected_first"]).items():
        error = float(np.max(errors))
        print(f"{kind}: largest error of {len(errors)} {error:.1e}")
        assert error < (1e-10 if kind == "gradient" else FLOAT64_LIMIT)


@pytest.mark.slow
@pytest.mark.parity
def test_three_steps_in_float32_are_torchs(state_dict: Tensors, variables: dict[str, Any]) -> None:
    """On GPUs and TPUs, float32 computes exactly at the precision "highest" alone."""
    # With this seed, rounding decides no ReLU and no maximum of the first step differently in PyTorch. With most others
    # it decides one, which changes the gradients by 1e-2.
    rng = np.random.default_rng(1)
    batches = [{"image": rng.standard_normal((8, 64, 64, 3)), "label": rng.integers(0, 1000, 8)} for _ in range(3)]

    def pytorch(precision: str) -> tuple[list[float], Tensors]:
        model = reference.build_for_training(state_dict, getattr(torch, precision))
        optimizer, losses, first = torch_sgd(model), [], {}
        for batch in batches:
            losses.append(reference.train_step(model, optimizer, batch["image"].astype(precision), batch["label"]))
            first = first or torch_gradients_and_statistics(model)
        return losses, first

    model = GoogLeNet(precision="highest", dropout=0.0, dropout_aux=0.0)
    state = create_train_state(model, variables, optax_sgd())
    losses, first = [], {}
    for batch in batches:
        state, metrics = train_step(state, {**batch, "image": batch["image"].astype(np.float32)}, KEY)
        losses.append(float(metrics["loss"]))
        first = first or gradients_and_statistics(state, variables["params"])
    (truth, true_first), (theirs, their_first) = pytorch("float64"), pytorch("float32")
    ours, pytorch32 = errors_by_kind(first, true_first), errors_by_kind(their_first, true_first)
    ours["loss"], pytorch32["loss"] = [relative_error(losses, truth)], [relative_error(theirs, truth)]
    for kind, errors in ours.items():
        # The largest error of a gradient is a matter of chance: rounding decides a ReLU or a maximum differently.
        total = np.median if kind == "gradient" else np.max
        error, limit = float(total(errors)), float32_limit(float(total(pytorch32[kind])))
        print(f"{kind}: float32 {error:.1e}, at most {limit:.1e}")
        assert error <= limit, kind
    assert len(set(losses)) == 3


@pytest.mark.slow
def test_the_average_follows_the_parameters_and_statistics(lockstep: dict[str, Any]) -> None:
    average = copied((lockstep["given"]["params"]["conv1"], lockstep["given"]["batch_stats"]["conv1"]))
    for step, new in enumerate(lockstep["watched"], start=1):
        decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))
        average = jax.tree.map(lambda old, x, decay=decay: decay * old + (1 - decay) * x, average, new)
    state = lockstep["state"]
    actual = (state.average["params"]["conv1"], state.average["batch_stats"]["conv1"])
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-14 * np.abs(e).max())  # 2e-16 measured
    assert state.eval_variables["params"] is state.average["params"]
    assert state.replace(average=None).eval_variables["params"] is state.params


@pytest.mark.slow
def test_the_callers_variables_outlive_a_donated_state(lockstep: dict[str, Any], variables64: dict[str, Any]) -> None:
    jax.tree.map(np.testing.assert_array_equal, lockstep["given"], variables64)
    state = jax.tree.map(jnp.array, lockstep["state"])
    train_step(state, lockstep["batches"][0], KEY)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    with pytest.raises(ValueError, match="donated to an earlier train_step: continue with the state that it returned"):
        train_step(state, lockstep["batches"][0], KEY)
    with pytest.raises(ValueError, match="donated to an earlier train_step"):
        eval_step(state, lockstep["batches"][0])


def overflowing(state: TrainState) -> TrainState:
    """Return a state with a finite loss, and a gradient of conv2's kernel that exceeds float64."""
    params = {name: {**block} for name, block in state.params.items()}
    params["conv1"]["bn"] = {"scale": jnp.full(64, 1e300, jnp.float64), "bias": jnp.zeros(64, jnp.float64)}
    params["conv2"]["conv"] = {"kernel": jnp.zeros((1, 1, 64, 64), jnp.float64)}
    return state.replace(params=params)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["NaN in an image", "a label that is no class", "the gradient alone"])
def test_a_loss_or_gradient_that_is_not_finite_changes_no_bit(case: str, lockstep: dict[str, Any]) -> None:
    state = jax.tree.map(jnp.array, lockstep["state"])
    batch = copied(lockstep["batches"][0])
    if case == "NaN in an image":
        batch["image"][3, 5, 7, 0] = np.nan
    elif case == "a label that is no class":
        batch["label"][2] = -1
    else:
        state = overflowing(state)
    before = copied(state)
    after, metrics = train_step(state, batch, KEY)
    assert not metrics["finite"]
    assert bool(np.isfinite(metrics["loss"])) == (case == "the gradient alone")
    assert jax.tree.map(np.ndarray.tobytes, before) == jax.tree.map(lambda x: np.asarray(x).tobytes(), after)

    if case != "the gradient alone":
        after, metrics = train_step(after, lockstep["batches"][1], KEY)
        assert metrics["finite"]
        assert int(after.step) == int(before.step) + 1


class Masks(torch.nn.Module):
    """A stand-in for torch.nn.Dropout that multiplies by given masks, one in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[np.ndarray] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.from_numpy(self.queue.pop(0))


def dropout_masks(variables: dict[str, Any], images: np.ndarray, key: jax.Array) -> dict[str, np.ndarray]:
    """Return the masks of all dropout layers of the Flax model, with values 0 and 1 / (1 - rate)."""
    masks = {}

    def replace(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if not isinstance(context.module, nn.Dropout):
            return call(*args, **kwargs)
        name = ".".join(context.module.path)
        masks[name] = call(jnp.ones_like(args[0]), **kwargs)
        return args[0]

    with nn.intercept_methods(replace):
        MODEL64.apply(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    return masks


@pytest.fixture(scope="module")
def finetuned(state_dict: Tensors, variables64: dict[str, Any]) -> dict[str, Any]:
    """6 steps of both libraries with dropout by the same masks, and with what fine-tuning adds.

    PyTorch freezes blocks with requires_grad False and eval(), which turns off the dropout of aux1, and has two
    parameter groups.
    """
    batches = random_batches(6, 8, 64)
    frozen = tuple(name for name in BLOCKS if name not in ("inception5b", "aux2", "fc"))
    model = torch_in_training(state_dict, frozen)
    model.dropout, model.aux2.dropout = Masks(), Masks()
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith(("fc.", "aux"))].append(parameter)
    optimizer = torch.optim.SGD(
        [{"params": groups[True], "lr": 0.01}, {"params": groups[False]}], lr=0.001, momentum=0.9, weight_decay=0.1
    )
    sgd = scale_heads(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.001, momentum=0.9)), 10.0)
    loss = {"label_smoothing": 0.1, "class_weights": np.random.default_rng(0).uniform(0, 2, 1000)}
    state = create_train_state(MODEL64, variables64, sgd, frozen=frozen, **loss)
    masks_of = jax.jit(dropout_masks)  # XLA leaves out all of the network but the masks
    seen, errors = [], []
    for step, batch in enumerate(batches):
        masks = masks_of(variables64, batch["image"], jax.random.fold_in(KEY, step))
        for name in ("dropout", "aux2.dropout"):
            model.get_submodule(name).queue.append(np.array(masks[name]))
        seen.append(np.asarray(masks["aux2.dropout"]))
        expected = reference.train_step(model, optimizer, batch["image"], batch["label"], **loss)
        state, metrics = train_step(state, batch, KEY)
        errors.append(abs(float(metrics["loss"]) / expected - 1))
    assert len(masks) == 3
    return {"state": state, "frozen": frozen, "errors": errors, "expected": torch_tensors(model), "masks": seen}


@pytest.mark.slow
def test_with_dropout_smooth_labels_and_class_weights_the_steps_are_torchs_if_it_gets_the_same_masks(
    finetuned: dict[str, Any],
) -> None:
    largest = max(finetuned["errors"])
    final = largest_error(tensors(finetuned["state"]), finetuned["expected"])
    print(f"dropout: loss off by {largest:.1e}, parameters and statistics by {final:.1e}")
    assert largest < 1e-13  # 2e-16 measured
    assert final < 1e-13  # 3e-15 measured
    first, second, *_ = finetuned["masks"]
    assert (first != second).mean() > 0.3  # new masks in every step, from one key


@pytest.mark.slow
def test_frozen_blocks_and_a_learning_rate_for_the_heads_are_torchs(
    finetuned: dict[str, Any], state_dict: Tensors
) -> None:
    state = finetuned["state"]
    for name, actual in tensors(state).items():
        original = state_dict[name].astype(np.float64)
        atol = 1e-13 * np.abs(original).max()  # 4e-15 measured
        np.testing.assert_allclose(actual, finetuned["expected"][name], rtol=0, atol=atol)
        assert np.array_equal(actual, original) == (name.partition(".")[0] in finetuned["frozen"]), name
    assert not any(x.shape[:1] == (7,) for x in jax.tree.leaves(state.opt_state)), "conv1 has no momentum"


TOP = ("inception5b", "fc")
BELOW_TOP = tuple(name for name in BLOCKS if name not in TOP)
"""Blocks to freeze: training the last two alone compiles in a quarter of the time."""
TOP64 = NO_DROPOUT64.clone(aux_logits=False)


def torch_top(state_dict: Tensors) -> TorchGoogLeNet:
    model = torch_in_training(state_dict, BELOW_TOP)
    model.aux_logits = False
    return model


def torch_loss(model: TorchGoogLeNet, batch: Batch) -> torch.Tensor:
    logits = model(torch.from_numpy(batch["image"]).permute(0, 3, 1, 2))
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch["label"]))


@pytest.mark.slow
def test_bfloat16_computes_with_float32_parameters_statistics_and_loss(
    state_dict: Tensors, variables: dict[str, Any]
) -> None:
    (batch,) = random_batches(1, 8, 64)
    expected = torch_loss(torch_top(state_dict), batch).item()
    bfloat16 = TOP64.clone(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    state = create_train_state(bfloat16, variables, optax_sgd(), frozen=BELOW_TOP, average_decay=0.9)
    types = jax.tree.map(lambda x: x.dtype, state)
    state, metrics = train_step(state, {**batch, "image": batch["image"].astype(np.float32)}, KEY)
    assert jax.tree.map(lambda x: x.dtype, state) == types
    assert {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats))} == {jnp.dtype("float32")}
    assert {metrics[name].dtype for name in ("loss", "accuracy", "grad_norm")} == {jnp.dtype("float32")}
    kernel = state.params["fc"]["kernel"]
    assert (kernel.astype(jnp.bfloat16).astype(jnp.float32) != kernel).mean() > 0.9  # not rounded to bfloat16
    error = abs(float(metrics["loss"]) / expected - 1)
    print(f"bfloat16: loss off by {error:.1e}")
    assert 1e-6 < error < 2e-2  # 1e-3 measured; less would be float32, more another function


def accumulated(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    # By default, MultiSteps accumulates in float32.
    return optax.MultiSteps(optimizer, every_k_schedule=2, accumulator_dtype=jnp.float64).gradient_transformation()


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_one_large_batch_without_batch_norm(variables64: dict[str, Any]) -> None:
    model, folded = flax_googlenet.fold_batch_norm(TOP64, variables64)
    (whole,) = random_batches(1, 8, 64)
    large = optax_sgd(learning_rate=1.0)  # so that the step is large against the rounding of the parameters
    state = create_train_state(model, folded, accumulated(large), frozen=BELOW_TOP)
    for half in ({k: x[i : i + 4] for k, x in whole.items()} for i in (0, 4)):
        state, _ = train_step(state, half, KEY)
    expected, _ = train_step(create_train_state(model, folded, large, frozen=BELOW_TOP), whole, KEY)
    for name in TOP:
        for path, new in flatten_dict(expected.params[name]).items():
            step = np.asarray(new) - flatten_dict(folded["params"][name])[path]
            error = np.abs(flatten_dict(state.params[name])[path] - new).max() / np.abs(step).max()
            assert error < 1e-13, (name, path)  # 3e-15 measured


@pytest.mark.slow
def test_accumulated_gradients_with_batch_norm_are_those_of_torch(
    state_dict: Tensors, variables64: dict[str, Any]
) -> None:
    """Each small batch is normalised by its own statistics, as in PyTorch, so this is not one large batch."""
    model = torch_top(state_dict)
    optimizer = torch_sgd(model)
    state = create_train_state(TOP64, variables64, accumulated(optax_sgd()), frozen=BELOW_TOP)
    for step, batch in enumerate(random_batches(4, 4, 64)):
        loss = torch_loss(model, batch)
        (loss / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
        state, metrics = train_step(state, batch, KEY)
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-13)  # 1e-15 measured
        assert largest_error(tensors(state), torch_tensors(model)) < 1e-13, step  # 5e-15 measured


@pytest.mark.parametrize("kind", ["numbers", "probabilities"])
@pytest.mark.parametrize("class_weights", [None, np.arange(17) / 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_torchs(label_smoothing: float, class_weights: np.ndarray | None, kind: str) -> None:
    rng = np.random.default_rng(0)
    logits, labels = 10 * rng.standard_normal((64, 17)), rng.integers(0, 17, 64)
    if kind == "probabilities":
        labels = rng.dirichlet(np.ones(17), 64)
    weight = None if class_weights is None else torch.from_numpy(class_weights)
    loss = torch.nn.CrossEntropyLoss(weight, label_smoothing=label_smoothing, reduction="none")
    expected = loss(torch.from_numpy(logits), torch.from_numpy(labels)).numpy()
    actual = cross_entropy(logits, labels, label_smoothing, class_weights)
    np.testing.assert_allclose(actual, expected, atol=1e-14, rtol=1e-14)


@pytest.fixture(scope="module")
def soft(variables64: dict[str, Any]) -> dict[str, Any]:
    """One step of only the last layer on soft labels; its kernel is 0, so the logits are its bias. With FrozenDicts."""
    frozen = tuple(name for name in BLOCKS if name != "fc")
    model, folded = flax_googlenet.fold_batch_norm(TOP64, variables64)
    rng = np.random.default_rng(0)
    bias, class_weights = rng.standard_normal(1000), rng.uniform(0, 2, 1000)
    folded["params"]["fc"] = {"kernel": np.zeros((1024, 1000)), "bias": bias}
    labels = rng.dirichlet(np.ones(1000), 3)
    labels[0, bias.argmax()] = 1  # they sum to 2, which PyTorch does not normalise
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    state = create_train_state(
        model, freeze(folded), optimizer, frozen=frozen, label_smoothing=0.1, class_weights=class_weights
    )
    batch = {"image": np.zeros((3, 16, 16, 3)), "label": labels}
    after, metrics = train_step(state, batch, KEY)
    return {"batch": batch, "bias": bias, "class_weights": class_weights, "state": after, "metrics": metrics}


@pytest.mark.slow
def test_soft_labels_are_learnt_and_evaluated_as_in_torch(soft: dict[str, Any]) -> None:
    labels = torch.from_numpy(soft["batch"]["label"])
    logits = torch.from_numpy(soft["bias"]).expand(3, -1).clone().requires_grad_()
    loss = torch.nn.CrossEntropyLoss(torch.from_numpy(soft["class_weights"]), label_smoothing=0.1)(logits, labels)
    loss.backward()
    assert float(soft["metrics"]["loss"]) == pytest.approx(loss.item(), rel=1e-14)
    assert float(soft["metrics"]["accuracy"]) == pytest.approx(1 / 3)
    bias = soft["bias"] - 0.1 * logits.grad.sum(0).numpy()
    np.testing.assert_allclose(soft["state"].params["fc"]["bias"], bias, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_an_optimizer_that_needs_the_loss_gets_it(soft: dict[str, Any]) -> None:
    plateau = soft["state"].opt_state.inner_states["trained"].inner_state[1]
    assert float(plateau.best_value) == pytest.approx(float(soft["metrics"]["loss"]), rel=1e-6)  # stored in float32


def test_an_optimizer_that_needs_more_is_refused_by_what_it_needs(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs more \(.*value_fn.*\): choose one without a line search"):
        create_train_state(GoogLeNet(aux_logits=False), {"params": {"fc": variables["params"]["fc"]}}, optax.lbfgs())


STATE = TrainState(
    {}, {}, (), jnp.int32(0), None, None, GoogLeNet(), optax.with_extra_args_support(optax_sgd()), (), 0, 0.3, None
)
LABELS = np.array([0, 1, 2, 3])
ONE_HOT = np.eye(1000)[LABELS]


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (LABELS[:, None], ValueError, r"got int64 of shape \(4, 1\): use labels\[:, 0\]"),
        (LABELS[:1], ValueError, r"got int64 of shape \(1,\): there must be one for each image"),
        (LABELS[:3], ValueError, r"got int64 of shape \(3,\): there must be one for each image"),
        (np.asarray(1), ValueError, r"got int64 of shape \(\): there must be one for each image"),
        (LABELS.astype(float), ValueError, r"got float64 of shape \(4,\): use labels.astype\(numpy.int32\)"),
        (ONE_HOT.astype(int), ValueError, r"got int64 of shape \(4, 1000\): use labels.argmax\(-1\)"),
        (ONE_HOT.astype(bool), ValueError, r"got bool of shape \(4, 1000\): use labels.argmax\(-1\)"),
        (ONE_HOT[:, :999], ValueError, r"soft labels floating point \[4, 1000\], got float64 of shape \(4, 999\)"),
        (LABELS.tolist(), TypeError, r"got list: pass numpy.asarray\(labels\)"),
        (torch.from_numpy(LABELS), TypeError, r"got torch.Tensor: pass numpy.asarray\(labels\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_the_way_out(label: Any, error: Any, message: str) -> None:
    batch = {"image": np.zeros((4, 32, 32, 3), np.float32), "label": label}
    for step in (lambda: train_step(STATE, batch, KEY), lambda: eval_step(STATE, batch)):
        with pytest.raises(error, match=message):
            step()
    if error is ValueError:
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda label: train_step(STATE, batch | {"label": label}, KEY), label)
        with pytest.raises(error, match=message):
            cross_entropy(np.zeros((4, 1000)), label)


BATCH = {"image": np.zeros((4, 32, 32, 3), np.float32), "label": LABELS}


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("batch", "key", "error", "message"),
    [
        (tuple(BATCH.values()), KEY, TypeError, r'got a tuple: pass {"image": images, "label": labels}'),
        (
            {"pixel_values": 0, "labels": 0},
            KEY,
            ValueError,
            "without image and label; its keys are pixel_values, labels",
        ),
        ({"image": BATCH["image"]}, KEY, ValueError, "without label; its keys are image"),
        (
            {**BATCH, "image": torch.zeros(4, 32, 32, 3)},
            KEY,
            TypeError,
            r"got torch.Tensor: pass numpy.asarray\(images\)",
        ),
        ({**BATCH, "image": np.zeros((4, 32, 32, 3), np.uint8)}, KEY, ValueError, "uint8: scale to"),
        ({**BATCH, "image": np.zeros((4, 3, 32, 32))}, KEY, ValueError, r"NCHW\? use images.transpose"),
        (BATCH, 0, TypeError, r"one random key such as jax.random.key\(0\), got int"),
        (BATCH, None, TypeError, r"one random key such as jax.random.key\(0\), got NoneType"),
        (BATCH, jax.random.split(KEY), TypeError, r"got key<fry> of shape \(2,\)"),
    ],
)
def test_a_batch_or_key_that_does_not_fit_is_refused_with_the_way_out(
    batch: Any, key: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        train_step(STATE, batch, key)


def test_heads_that_do_not_fit_the_model_are_refused_before_any_step(variables: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"fc is for 1000 classes and the model for 5: use new_head\(model, variables, 5, "
    ):
        create_train_state(GoogLeNet(num_classes=5), variables, optax_sgd())
    params = {name: block for name, block in variables["params"].items() if name != "aux1"}
    with pytest.raises(
        ValueError, match=r"no aux1: train model\.clone\(aux_logits=False\), or add the aux1 of model.init"
    ):
        create_train_state(GoogLeNet(), {**variables, "params": params}, optax_sgd())


def test_the_loss_is_float32_at_least_and_not_a_number_for_a_label_that_is_no_class() -> None:
    rng = np.random.default_rng(0)
    logits, labels = 10 * rng.standard_normal((64, 17)), rng.integers(0, 17, 64)
    assert cross_entropy(logits.astype(jnp.bfloat16), labels).dtype == jnp.float32
    for function in (cross_entropy, jax.jit(cross_entropy)):  # XLA could simplify the NaN away
        assert np.isnan(function(logits[:2], np.array([-1, 17]))).all()
    many = rng.standard_normal((64, 300))  # more classes than 8 bits can number
    np.testing.assert_array_equal(
        cross_entropy(many, labels.astype(np.uint8)), cross_entropy(many, labels), strict=True
    )


@pytest.mark.slow
def test_debug_nans_stops_at_a_label_that_is_no_class_and_at_no_sound_batch() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 17))
    for labels in (np.arange(4), np.full((4, 17), 1 / 17)):
        with jax.debug_nans(True):
            jax.jit(cross_entropy)(logits, labels)
            with jax.disable_jit():
                cross_entropy(logits, labels)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        cross_entropy(logits, np.array([0, 1, 2, 17]))


def test_class_weights_of_another_number_of_classes_are_refused(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"one weight for each of 1000 classes, got shape \(999,\)"):
        create_train_state(GoogLeNet(), variables, optax_sgd(), class_weights=np.ones(999))


@pytest.mark.slow
def test_evaluation_is_torchs_with_the_average_and_without_the_rows_that_fill_up_the_batch(
    torch64: TorchGoogLeNet, variables64: dict[str, Any]
) -> None:
    zeros = jax.tree.map(np.zeros_like, variables64)
    images = random_batches(1, 8, 64)[0]["image"]
    with torch.inference_mode():
        logits = torch64(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    labels = np.full(8, -1, np.int32)
    for row, place in enumerate([0, 0, 1, 4, 5, 17]):  # the label is the likeliest class, the next, ...
        labels[row] = np.argsort(-logits[row])[place]
    counted = torch.from_numpy(logits[:6]), torch.from_numpy(labels[:6]).long()
    expected = torch.nn.functional.cross_entropy(*counted).item()

    state = create_train_state(MODEL64, zeros, optax_sgd(), label_smoothing=0.1).replace(average=variables64)
    metrics = eval_step(state, {"image": images, "label": labels})
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-13)  # 3e-16 measured
    assert float(metrics["accuracy"]) == pytest.approx(2 / 6)
    assert float(metrics["top5"]) == pytest.approx(4 / 6)
    assert int(metrics["count"]) == 6
    as_numpy = jax.tree.map(np.asarray, state)  # as a state from a file may be
    nothing = eval_step(as_numpy, {"image": images, "label": np.full_like(labels, -1)})
    assert {float(value) for value in nothing.values()} == {0.0}


_ON_FOUR_DEVICES = """
import json
import jax, numpy as np, optax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType
from flax_googlenet import GoogLeNet, endpoints
from flax_googlenet.architecture import BLOCKS
from flax_googlenet.model import variable_shapes
from flax_googlenet.training import create_train_state, eval_step, new_head, reestimate_batch_norm, train_step

frozen = tuple(name for name in BLOCKS if name not in ("aux1", "fc"))  # the other blocks are only traced
model = GoogLeNet(num_classes=5, dtype=np.float64, param_dtype=np.float64)
rng = np.random.default_rng(0)
variables = jax.tree.map(lambda x: rng.uniform(0, 0.05, x.shape), variable_shapes(model))
images, labels, key = rng.standard_normal((8, 32, 32, 3)), np.arange(8) % 5, jax.random.key(0)
results = {}
# In one program, which compiles the network once. On explicit axes, they are called as in a loop of one's own.
evaluate_and_train = jax.jit(lambda *args: (eval_step(*args[:2]), train_step(*args)))
for name, axis_types in {"one": None, "explicit": (AxisType.Explicit,), "auto": (AxisType.Auto,)}.items():
    sgd, class_weights = optax.sgd(0.1, momentum=0.9), np.arange(1.0, 6)
    state = create_train_state(model, variables, sgd, frozen=frozen, class_weights=class_weights)
    batch = {"image": images, "label": labels}
    if axis_types:
        mesh = jax.make_mesh((4,), ("batch",), axis_types)
        split, whole = jax.NamedSharding(mesh, jax.P("batch")), jax.NamedSharding(mesh, jax.P())
        state, batch = jax.device_put((state, batch), (whole, split))
    results[name] = []
    for _ in range(3):
        if name == "explicit":
            evaluation, (state, metrics) = eval_step(state, batch), train_step(state, batch, key)
        else:
            evaluation, (state, metrics) = evaluate_and_train(state, batch, key)
        results[name] += [float(evaluation["loss"]), float(metrics["loss"])]
    if name == "explicit":
        soft = jax.device_put(np.eye(5)[labels], split)
        on_one = create_train_state(model, variables, optax.sgd(0.1))
        jax.eval_shape(train_step, on_one, batch | {"label": soft}, key)
        jax.eval_shape(lambda x: endpoints(model, variables, x), batch["image"])
        jax.eval_shape(lambda x: reestimate_batch_norm(model, variables, [{"image": x}], frozen), batch["image"])
        jax.eval_shape(lambda v: new_head(model, v, 3, key)[1], jax.device_put(variables, whole))
print(json.dumps(results))
"""


@pytest.mark.slow
def test_batches_that_are_split_over_explicit_or_automatic_axes_have_the_losses_of_one_device() -> None:
    done = subprocess.run([sys.executable, "-c", _ON_FOUR_DEVICES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert np.std(results["one"]) > 1e-3  # they are not all the same
    for name in ("explicit", "auto"):
        np.testing.assert_allclose(results[name], results["one"], rtol=1e-11, err_msg=name)
