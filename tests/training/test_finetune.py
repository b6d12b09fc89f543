"""Fine-tuning: a new head, frozen blocks, and new BatchNorm statistics. ``test_step.py`` has its steps."""

import operator
from typing import Any

import jax
import numpy as np
import optax
import pytest
import reference
import torch
from flax.traverse_util import flatten_dict
from jax import numpy as jnp
from proof import relative_error
from sklearn.utils.class_weight import compute_class_weight
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.architecture import BLOCKS, HEADS
from flax_googlenet.training import (
    balanced_class_weights,
    create_train_state,
    freeze,
    new_head,
    reestimate_batch_norm,
    train_step,
)

MODEL64 = GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64, dropout=0.0, dropout_aux=0.0)
KEY = jax.random.key(0)


def random_images(batch_size: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch_size, size, size, 3))


@pytest.mark.slow
def test_a_new_head_is_freshly_initialised_and_everything_else_is_kept(variables: dict[str, Any]) -> None:
    model, new = new_head(GoogLeNet(), variables, 7, KEY)
    assert model == GoogLeNet(num_classes=7)
    old, leaves = flatten_dict(variables), flatten_dict(new)
    assert old.keys() == leaves.keys()
    replaced = {path for path in leaves if leaves[path] is not old[path]}
    layers = [("fc",), ("aux1", "fc2"), ("aux2", "fc2")]
    assert replaced == {("params", *layer, leaf) for layer in layers for leaf in ("kernel", "bias")}

    images = jnp.zeros((1, 15, 15, 3), jnp.float32)
    initial = jax.jit(lambda key: {path: flatten_dict(model.init(key, images))[path] for path in replaced})(KEY)
    for path in replaced:
        np.testing.assert_array_equal(leaves[path], initial[path])
    torch_model = TorchGoogLeNet(num_classes=7, init_weights=False)
    state_dict = {k: torch.from_numpy(np.array(x)) for k, x in flax_googlenet.to_torchvision(new).items()}
    torch_model.load_state_dict(state_dict, strict=True)


def test_a_new_head_adds_no_auxiliary_heads(variables: dict[str, Any]) -> None:
    headless = {
        collection: {name: block for name, block in tree.items() if not name.startswith("aux")}
        for collection, tree in variables.items()
    }
    model, new = new_head(GoogLeNet(aux_logits=False), headless, 7, KEY)
    assert model == GoogLeNet(num_classes=7, aux_logits=False)
    assert new["params"].keys() == headless["params"].keys()
    assert new["params"]["fc"]["kernel"].shape == (1024, 7)


@pytest.mark.slow
def test_frozen_blocks_have_no_backward_pass(variables64: dict[str, Any]) -> None:
    batch = {"image": random_images(2, 64), "label": np.array([0, 1])}

    def operations(frozen: tuple[str, ...]) -> float:
        state = create_train_state(MODEL64, variables64, optax.sgd(0.1), frozen=frozen)
        return jax.jit(train_step).lower(state, batch, KEY).cost_analysis()["flops"]

    body = tuple(name for name in BLOCKS if name not in HEADS)
    assert operations(body) < operations(()) / 2


def test_weight_decay_leaves_frozen_blocks_alone() -> None:
    params = {"conv1": jnp.ones(2), "fc": jnp.ones(2)}
    optimizer = freeze(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0, momentum=0.9)), ["conv1"])
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["conv1"], 0)
    np.testing.assert_array_equal(updates["fc"], -0.5)


def test_names_that_no_block_has_are_refused(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no block is named conv9; the blocks are .*conv1"):
        create_train_state(GoogLeNet(), variables, optax.sgd(0.1), frozen=("conv1", "conv9"))
    with pytest.raises(ValueError, match=r"no block is named conv9; the blocks are conv1"):
        GoogLeNet().apply(variables, np.zeros((1, 15, 15, 3), np.float32), frozen=("conv9",))
    for use in (
        lambda: create_train_state(GoogLeNet(), variables, optax.sgd(0.1), frozen="conv1"),
        lambda: GoogLeNet().apply(variables, np.zeros((1, 15, 15, 3), np.float32), frozen="conv1"),
        lambda: freeze(optax.sgd(0.1), "conv1").init(variables["params"]),
    ):
        with pytest.raises(TypeError, match=r'got a string: write \("conv1",\)'):
            use()


def test_the_names_may_be_a_list(variables: dict[str, Any]) -> None:
    state = create_train_state(GoogLeNet(), variables, optax.sgd(0.1), frozen=["conv1"])
    hash(jax.tree.structure(state))  # jax.jit needs the hash to find the compiled step


@pytest.mark.slow
def test_reestimated_statistics_are_those_of_torchs_update_bn(
    state_dict: dict[str, np.ndarray], variables64: dict[str, Any]
) -> None:
    torch_model = reference.build(state_dict, transform_input=False, dtype=torch.float64)
    batches = [{"image": 2 + 3 * random_images(4, 32, seed)} for seed in range(3)]
    torch.optim.swa_utils.update_bn(
        [torch.from_numpy(batch["image"]).permute(0, 3, 1, 2) for batch in batches], torch_model
    )
    expected = torch_model.state_dict()
    actual = reestimate_batch_norm(MODEL64.clone(dropout=0.2), variables64, batches)
    assert all(map(operator.is_, jax.tree.leaves(actual["params"]), jax.tree.leaves(variables64["params"])))
    for name, x in flax_googlenet.to_torchvision(actual).items():
        if name.endswith(("running_mean", "running_var")):
            assert relative_error(x, expected[name].numpy()) < 1e-12, name  # 1e-13 measured


@pytest.mark.slow
def test_reestimation_leaves_frozen_blocks_alone_and_needs_a_batch(variables64: dict[str, Any]) -> None:
    frozen = tuple(name for name in BLOCKS if name != "inception5b")
    new = reestimate_batch_norm(MODEL64, variables64, [{"image": random_images(2, 64)}], frozen)["batch_stats"]
    for name, old in variables64["batch_stats"].items():
        same = jax.tree.map(np.array_equal, new[name], old)
        assert set(jax.tree.leaves(same)) == {name in frozen}, name
    with pytest.raises(ValueError, match="one batch or more"):
        reestimate_batch_norm(MODEL64, variables64, [])
    with pytest.raises(ValueError, match="no BatchNorm"):
        reestimate_batch_norm(GoogLeNet(variant="bvlc"), {"params": {}}, [])


def test_balanced_class_weights_are_those_of_scikit_learn() -> None:
    labels = np.repeat(np.arange(4), [1, 5, 9, 25])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(balanced_class_weights(labels, 4), expected, rtol=1e-15)
    assert balanced_class_weights(labels, 5)[4] == 40 / 5  # a class without images
