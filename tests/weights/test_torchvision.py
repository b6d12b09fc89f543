"""The map to torchvision's state dict: an exact bijection, strict in both directions, without a superfluous rule."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import proof
import pytest
import reference
import torch
import torchvision
from flax.traverse_util import flatten_dict
from jax import numpy as jnp
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet
from flax_googlenet import GoogLeNet, PortingError, from_torchvision, to_torchvision
from flax_googlenet.model import variable_shapes
from flax_googlenet.weights import torchvision as torchvision_map

StateDict = Mapping[str, np.ndarray]


def without(state_dict: StateDict, *parts: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in state_dict.items() if not any(part in key for part in parts)}


def test_from_torchvision_is_a_bijection_with_init(state_dict: StateDict, variables: dict[str, Any]) -> None:
    expected = flatten_dict(variable_shapes(GoogLeNet()))
    actual = flatten_dict(variables)
    assert {path: (x.shape, x.dtype) for path, x in actual.items()} == {
        path: (x.shape, x.dtype) for path, x in expected.items()
    }
    keys = [torchvision_map.torch_key(path) for path in expected]
    assert len(set(keys)) == len(keys)
    assert set(keys) == set(without(state_dict, "num_batches_tracked"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dropped", "num_classes", "keys"),
    [
        ((), 1000, 364),
        (("num_batches_tracked",), 1000, 305),
        (("aux",), 1000, 344),
        (("aux", "num_batches_tracked"), 10, 287),
        ((), 1, 364),
    ],
)
def test_any_state_dict_of_torchvisions_network_is_accepted(
    dropped: tuple[str, ...], num_classes: int, keys: int
) -> None:
    tensors = reference.random_checkpoint(num_classes)
    state_dict = without({key: tensor.numpy() for key, tensor in tensors.items()}, *dropped)
    assert len(state_dict) == keys
    variables = from_torchvision(state_dict)
    model = GoogLeNet(num_classes=num_classes, aux_logits="aux" not in dropped)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda x: x.shape, variable_shapes(model))


def test_the_round_trip_is_bit_exact_and_torchvision_loads_it(state_dict: StateDict, torch32: TorchGoogLeNet) -> None:
    back = to_torchvision(from_torchvision(state_dict))
    assert back.keys() == state_dict.keys() == torch32.state_dict().keys()
    for key, array in back.items():
        assert (array.dtype, array.shape) == (state_dict[key].dtype, state_dict[key].shape), key
        if not key.endswith("num_batches_tracked"):
            assert array.tobytes() == state_dict[key].tobytes(), key
    model = torchvision.models.googlenet(weights=None, init_weights=False)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in back.items()}, strict=True)


def test_the_round_trip_from_flax_is_bit_exact() -> None:
    shapes = variable_shapes(GoogLeNet(num_classes=3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    again = from_torchvision(to_torchvision(variables))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, variables))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_dtypes_are_kept(state_dict: StateDict, dtype: Any) -> None:
    cast = {key: x if key.endswith("num_batches_tracked") else x.astype(dtype) for key, x in state_dict.items()}
    variables = from_torchvision(cast)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(dtype)}
    assert all(
        array.tobytes() == cast[key].tobytes() for key, array in to_torchvision(variables).items() if "num" not in key
    )


def test_the_port_shares_no_memory_with_the_checkpoint() -> None:
    tensors = reference.random_checkpoint(num_classes=2)
    variables = from_torchvision(tensors)
    before = jax.tree.map(np.copy, variables)
    for tensor in tensors.values():
        tensor.zero_()
    assert jax.tree.all(jax.tree.map(np.array_equal, before, variables))


def test_one_error_lists_everything_that_is_wrong(state_dict: StateDict) -> None:
    bad = without(state_dict, "conv2.conv.weight", "aux2.fc2.bias")
    nan, negative = bad["fc.bias"].copy(), bad["conv1.bn.running_var"].copy()
    nan[3], negative[5] = np.nan, -1e-9
    bad |= {
        "layer1.weight": np.zeros(1),
        "branch5.num_batches_tracked": np.array(0),
        "conv3.conv.weight": np.zeros((192, 64, 5, 5)),
        "aux1.fc1.bias": np.zeros(1024, np.int64),
        "fc.bias": nan,
        "conv1.bn.running_var": negative,
        "inception3a.branch1.bn.bias": torch.zeros(64, requires_grad=True),  # type: ignore[dict-item]
    }
    with pytest.raises(PortingError) as caught:
        from_torchvision(bad)
    problems = caught.value.problems
    assert problems.pop("unreadable")[0].startswith(
        "inception3a.branch1.bn.bias (Can't call numpy() on Tensor that req"
    )
    assert problems == {
        "missing": ["aux2.fc2.bias", "conv2.conv.weight"],
        "unexpected": ["layer1.weight", "branch5.num_batches_tracked"],
        "wrong shape": ["conv3.conv.weight (192, 64, 5, 5), expected (192, 64, 3, 3)"],
        "not floating point": ["aux1.fc1.bias int64"],
        "not finite": ["fc.bias"],
        "negative variance": ["conv1.bn.running_var"],
    }
    for names in problems.values():
        assert str(names) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["inception4c.branch3.1.conv.weight", "aux2.conv.bn.running_mean"])
def test_values_that_are_not_finite_are_refused_by_key(state_dict: StateDict, key: str, value: float) -> None:
    bad = {**state_dict, key: state_dict[key].copy()}
    bad[key].flat[-1] = value
    with pytest.raises(PortingError) as caught:
        from_torchvision(bad)
    assert caught.value.problems == {"not finite": [key]}


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (
            lambda weights: {name.replace("fc.", "fc.1.") if name[:3] == "fc." else name: x for name, x in weights},
            "rename",
        ),
        (lambda weights: {f"{name}_orig" if name == "conv1.conv.weight" else name: x for name, x in weights}, "prune"),
        (lambda weights: {name: np.zeros(5) if name == "aux1.fc2.bias" else x for name, x in weights}, "leave out"),
        (lambda weights: {name: np.zeros(5) if name == "conv1.bn.bias" else x for name, x in weights}, ""),
    ],
    ids=["sequential head", "pruned", "auxiliary heads of other classes", "unknown"],
)
def test_usual_changes_of_a_network_are_refused_with_what_to_do(
    change: Callable[[Any], StateDict], advice: str, state_dict: StateDict
) -> None:
    with pytest.raises(PortingError) as caught:
        from_torchvision(change(state_dict.items()))
    assert advice in caught.value.advice
    assert bool(advice) == bool(caught.value.advice)
    assert str(caught.value).endswith(caught.value.advice)


def message(state_dict: Any) -> str:
    with pytest.raises(PortingError) as caught:
        from_torchvision(state_dict)
    assert caught.value.problems == {}
    return str(caught.value)


def test_a_model_is_refused_with_the_way_out(torch32: TorchGoogLeNet) -> None:
    assert message(torch32) == "expected a state dict, got GoogLeNet: pass model.state_dict()"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_training_checkpoint_is_refused_with_the_way_out(prefix: str, state_dict: StateDict) -> None:
    weights = {prefix + key: array for key, array in state_dict.items()}
    checkpoint = {"optimizer": {"state": {}}, "model": weights, "epoch": 3}
    assert message(checkpoint) == "this is a checkpoint that contains a state dict: pass checkpoint['model']"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "backbone."])
def test_names_with_a_prefix_are_refused_with_the_way_out(prefix: str, state_dict: StateDict) -> None:
    wrapped = {"n_averaged": np.array(2), **{prefix + key: array for key, array in state_dict.items()}}
    start, _, advice = message(wrapped).partition(": pass ")
    assert start == f"the names begin with {prefix!r}"
    unwrapped = eval(advice, {"state_dict": wrapped})  # the advice is code that works
    assert jax.tree.all(jax.tree.map(np.array_equal, from_torchvision(unwrapped), from_torchvision(state_dict)))


def test_another_network_is_refused() -> None:
    resnet = torchvision.models.resnet18(weights=None).state_dict()
    with pytest.raises(PortingError, match=r"missing: \['aux|missing: \[.*conv2\.conv\.weight"):
        from_torchvision(resnet)


def test_to_torchvision_lists_everything_that_is_wrong(variables: dict[str, Any]) -> None:
    flat = flatten_dict(variables)
    del flat["params", "conv2", "conv", "kernel"]
    flat["params", "conv1", "conv", "bias"] = np.zeros(64)
    flat["batch_stats", "conv3", "bn", "var"] = np.full(192, -1.0)
    flat["params", "fc", "kernel"] = np.zeros((1000, 1024))
    with pytest.raises(PortingError) as caught:
        to_torchvision(torchvision_map.unflatten_dict(flat))
    assert caught.value.problems == {
        "missing": ["params/conv2/conv/kernel"],
        "unexpected": ["params/conv1/conv/bias"],
        "wrong shape": ["params/fc/kernel (1000, 1024), expected (1024, 1000)"],
        "negative variance": ["batch_stats/conv3/bn/var"],
    }


def test_a_folded_network_is_refused() -> None:
    folded = jax.tree.map(lambda x: np.zeros(x.shape), variable_shapes(GoogLeNet(batch_norm=False)))
    with pytest.raises(PortingError, match=r"unexpected:.*params/conv1/conv/bias") as error:
        to_torchvision(folded)
    assert "folded" in error.value.advice


# Without any of the rules, either the state dict no longer fits, or a stage differs.

BREAK_NAMES = {
    "kernel": {"kernel": "bias"},
    "scale": {"scale": "bias", "bias": "weight"},
    "bias": {"bias": "weight"},
    "mean": {"mean": "running_var", "var": "running_mean"},
    "var": {"var": "running_mean"},
}


def is_noticed(state_dict: StateDict) -> bool:
    try:
        variables = from_torchvision(state_dict)
    except PortingError:
        return True
    images = proof.proof_images()[1].astype(np.float64)
    truth = reference.stages(reference.build(state_dict, transform_input=False, dtype=torch.float64), images)
    port = proof.flax_stages(GoogLeNet(), variables, images)
    return any(not proof.relative_error(port[name], truth[name]) < 1e-3 for name in truth)


@pytest.mark.slow
def test_the_unbroken_rules_are_not_noticed(state_dict: StateDict) -> None:
    assert not is_noticed(state_dict)


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAK_NAMES)
def test_breaking_a_name_is_noticed(name: str, state_dict: StateDict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BREAK_NAMES.keys() == torchvision_map.NAMES.keys()
    for flax_name, torch_name in BREAK_NAMES[name].items():
        monkeypatch.setitem(torchvision_map.NAMES, flax_name, torch_name)
    assert is_noticed(state_dict)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ndim", "axes"),
    [(4, (3, 2, 1, 0)), (4, (2, 3, 0, 1)), (4, (0, 1, 2, 3)), (2, (0, 1))],
    ids=["conv H and W swapped", "conv I and O swapped", "conv as it is", "linear as it is"],
)
def test_breaking_an_order_of_axes_is_noticed(
    ndim: int, axes: tuple[int, ...], state_dict: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torchvision_map.TORCH_AXES, ndim, axes)
    assert is_noticed(state_dict)


def test_breaking_the_names_of_branches_is_noticed(state_dict: StateDict) -> None:
    swapped = {key.replace("branch2.0", "branch2_0"): array for key, array in state_dict.items()}
    with pytest.raises(PortingError, match=r"missing:.*inception3a\.branch2\.0\.conv\.weight"):
        from_torchvision(swapped)


def exchanged(one: str, other: str) -> Callable[[str], str]:
    return lambda key: key.replace(one, "@").replace(other, one).replace("@", other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [("aux1.fc2", "aux2.fc2"), ("inception4b.branch2.1.bn.weight", "inception4b.branch2.1.bn.running_var")],
)
def test_swapping_tensors_of_one_shape_is_noticed(one: str, other: str, state_dict: StateDict) -> None:
    """Two auxiliary heads, or a scale and a variance, have the same shapes: only the stages show the difference."""
    rename = exchanged(one, other)
    variables = from_torchvision({rename(key): array for key, array in state_dict.items()})
    images = proof.proof_images()[1].astype(np.float64)
    truth = reference.stages(reference.build(state_dict, transform_input=False, dtype=torch.float64), images)
    port = proof.flax_stages(GoogLeNet(), variables, images)
    assert any(proof.relative_error(port[name], truth[name]) > 1e-3 for name in truth)


@pytest.mark.slow
def test_flattening_the_aux_features_as_nhwc_is_noticed(state_dict: StateDict) -> None:
    variables = from_torchvision(state_dict)
    kernel = variables["params"]["aux1"]["fc1"]["kernel"]
    variables["params"]["aux1"]["fc1"]["kernel"] = (
        kernel.reshape(128, 4, 4, 1024).transpose(1, 2, 0, 3).reshape(2048, 1024)
    )
    images = proof.proof_images()[1].astype(np.float64)
    truth = reference.stages(reference.build(state_dict, transform_input=False, dtype=torch.float64), images)
    port = proof.flax_stages(GoogLeNet(), variables, images)
    assert proof.relative_error(port["aux1"], truth["aux1"]) > 1e-3
    assert proof.relative_error(port["aux2"], truth["aux2"]) < 1e-12


def test_the_library_imports_no_torch() -> None:
    code = "import sys; from flax_googlenet import *; sys.exit(not {'torch', 'torchvision'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_those_of_the_contract() -> None:
    assert set(flax_googlenet.__all__) == {
        "BatchPredictor",
        "CheckpointError",
        "DownloadError",
        "ExportError",
        "GoogLeNet",
        "GoogLeNetError",
        "GoogLeNetOutput",
        "ImageError",
        "PortingError",
        "Predictor",
        "StateDictError",
        "decode_batch",
        "endpoints",
        "export",
        "fold_batch_norm",
        "from_caffe",
        "from_onnx",
        "from_tensorflow",
        "from_torchvision",
        "load",
        "load_metadata",
        "make_predictor",
        "preprocess",
        "preprocess_batch",
        "pretrained",
        "read_state_dict",
        "save",
        "to_torchvision",
    }
    assert set(flax_googlenet.__all__) <= set(dir(flax_googlenet))


def test_every_public_name_is_there_and_no_other() -> None:
    for name in flax_googlenet.__all__:
        assert getattr(flax_googlenet, name) is not None
    assert callable(flax_googlenet.training.train_step)
    with pytest.raises(AttributeError, match="has no attribute 'preproces'"):
        _ = flax_googlenet.preproces


def test_a_network_without_classes_has_a_wrong_shape(state_dict: StateDict) -> None:
    bad = {**state_dict, "fc.bias": np.zeros(0, np.float32), "fc.weight": np.zeros((0, 1024), np.float32)}
    with pytest.raises(PortingError, match=r"fc\.bias \(0,\), expected \(1000,\)"):
        from_torchvision(bad)


@pytest.mark.slow
def test_a_nan_on_one_of_the_images_is_not_proven(state_dict: StateDict, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [image[:1, :32, :32] for image in proof.proof_images()]
    images[1] = np.full_like(images[1], 3e38)  # overflows in both networks, so there is nothing to compare
    monkeypatch.setattr(proof, "proof_images", lambda: images)
    result = proof.prove(state_dict, GoogLeNet(), from_torchvision(state_dict))
    assert not result.ok
