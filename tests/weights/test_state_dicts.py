"""The weights of a GoogLeNet are found in what people save, by names and nesting only."""

from typing import Any

import numpy as np
import pytest

from flax_googlenet import PortingError
from flax_googlenet.weights.state_dicts import find_state_dict


@pytest.fixture(scope="module")
def network(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in state_dict.items() if not name.startswith("aux")}


def under(prefix: str, network: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in network.items()}


def found(content: Any, network: dict[str, np.ndarray], key: str | None = None) -> list[str]:
    """Return the notes; fail unless exactly the network is found."""
    state_dict, notes = find_state_dict(content, key)
    assert state_dict.keys() == network.keys()
    assert all(state_dict[name] is array for name, array in network.items())
    return notes


@pytest.mark.parametrize(
    "prefix", ["", "module.", "module.module.", "_orig_mod.", "_orig_mod.module.", "model.", "net.", "backbone.body."]
)
def test_any_prefix_that_all_names_share_is_removed(prefix: str, network: dict[str, np.ndarray]) -> None:
    assert found(under(prefix, network), network) == []
    assert found({"epoch": 1, "state_dict": under(prefix, network), "optimizer": {"state": {}}}, network) == []
    averaged = {"n_averaged": np.array(2), **under(prefix, network)}
    assert found(averaged, network) == []


def test_tensors_without_the_prefix_are_left_out_and_listed(network: dict[str, np.ndarray]) -> None:
    lightning = {"state_dict": {**under("model.", network), "criterion.weight": np.ones(5), "top1.total": np.ones(1)}}
    assert found(lightning, network) == [
        "left out entries that do not belong to the network: criterion.weight, top1.total"
    ]


def test_without_a_prefix_an_unknown_layer_is_kept_for_the_port_to_refuse(network: dict[str, np.ndarray]) -> None:
    state_dict, notes = find_state_dict({**network, "attention.weight": np.ones(5), "epoch": 3, "loss": np.array(0.4)})
    assert state_dict.keys() == {*network, "attention.weight"}
    assert notes == ["left out entries that do not belong to the network: epoch, loss"]


@pytest.mark.parametrize(
    ("averaged", "key"),
    [
        ("state_dict_ema", "state_dict_ema"),
        ("ema", "ema"),
        ("ema_state_dict", "ema_state_dict"),
        ("model_ema", "model_ema"),
        ("EMA", "EMA"),
    ],
)
def test_a_note_mentions_averaged_weights_and_the_key_takes_them(
    averaged: str, key: str, network: dict[str, np.ndarray]
) -> None:
    mean = {name: array.copy() for name, array in network.items()}
    for content in ({"state": network, averaged: under("module.", mean)}, {averaged: mean, "state": network}):
        assert found(content, network) == [f"took 'state'; the file's other weights have the key {key}"]
        assert found(content, mean, key) == []


def test_two_networks_in_one_mapping_are_distinguished_by_their_prefixes(network: dict[str, np.ndarray]) -> None:
    mean = {name: array.copy() for name, array in network.items()}
    content = {"state_dict": {**under("ema.module.", mean), **under("model.", network)}}
    assert found(content, network) == [
        "took 'state_dict.model'; the file's other weights have the key state_dict.ema.module"
    ]
    assert found(content, mean, "state_dict.ema.module") == []
    assert found(content, mean, "ema") == []


@pytest.mark.parametrize("key", [None, "state", "state.model"])
def test_a_network_is_found_at_any_depth(key: str | None, network: dict[str, np.ndarray]) -> None:
    assert found({"state": {"model": network}, "epoch": 3}, network, key) == []


def test_a_note_does_not_repeat_a_long_key(network: dict[str, np.ndarray]) -> None:
    (note,) = found({"k" * 900: network, "ema": dict(network)}, network)
    assert len(note) < 200


def test_networks_in_lists_and_tuples_are_found_by_their_indices(network: dict[str, np.ndarray]) -> None:
    other = {name: array.copy() for name, array in network.items()}
    assert found((network, {"state": {}, "param_groups": [{"lr": 0.1}]}), network) == []
    content = {"folds": [{"model": network}, {"model": other}], "losses": [0.4, 0.3]}
    assert found(content, network) == ["took 'folds.0.model'; the file's other weights have the key folds.1.model"]
    assert found(content, other, "folds.1") == []


def test_a_mapping_that_contains_itself_is_searched_once(network: dict[str, np.ndarray]) -> None:
    content: dict[str, Any] = {"model": network}
    content["self"] = content
    assert found(content, network) == []


def test_without_a_googlenet_the_fullest_mapping_is_returned_for_the_port_to_refuse() -> None:
    resnet = {"conv1.weight": np.ones(3), "fc.weight": np.ones(3), "fc.bias": np.ones(3)}
    assert find_state_dict({"loss": np.array(0.4), "net": resnet}).state_dict == resnet


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ([np.ones(3)], None, "it holds a list, not a state dict"),
        ({}, None, "no state dict found; the keys found: none"),
        ({"epoch": 1, "args": {}}, None, "no state dict found; the keys found: epoch, args"),
        (
            {"epoch": 1, "model": {"a": np.ones(3)}},
            "ema",
            "there is no state dict under the key ema; the keys found: epoch, model",
        ),
    ],
)
def test_contents_without_weights_are_refused_with_the_keys_found(content: Any, key: str | None, message: str) -> None:
    with pytest.raises(PortingError) as caught:
        find_state_dict(content, key)
    assert str(caught.value) == message
