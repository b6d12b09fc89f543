"""Google's GoogLeNet, the variant "inception5h", against a plain network in PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bvlc
import jax
import numpy as np
import pytest
import reference
import torch
from inception5h import Inception5h
from jax import numpy as jnp
from proof import relative_error

import flax_googlenet
from flax_googlenet import GoogLeNet, endpoints
from flax_googlenet.inference import gpu
from flax_googlenet.inference.predictor import _inference_graph, _tuned_graph
from flax_googlenet.model import InceptionAux
from flax_googlenet.weights import caffe

MODEL = GoogLeNet(variant="inception5h", num_classes=1008)
MODEL64 = MODEL.clone(dtype=jnp.float64, param_dtype=jnp.float64)

Images = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    return bvlc.random_weights(1008, network=Inception5h)


@pytest.fixture(scope="module")
def variables64(state_dict: dict[str, np.ndarray]) -> dict[str, Any]:
    variables = caffe.network("random weights", state_dict, "inception5h")[1]
    return jax.tree.map(lambda x: x.astype(np.float64), variables)


@pytest.fixture(scope="module")
def torch64(state_dict: dict[str, np.ndarray]) -> bvlc.BVLCGoogLeNet:
    return bvlc.build(state_dict, torch.float64, Inception5h)


@pytest.mark.parametrize(
    ("h", "w"), [(16, 15), *(pytest.param(*size, marks=pytest.mark.slow) for size in [(97, 132), (224, 227)])]
)
def test_every_stage_is_pytorchs_in_float64(
    h: int, w: int, variables64: dict[str, Any], torch64: bvlc.BVLCGoogLeNet, random_images: Images
) -> None:
    images = random_images(2, h, w)
    expected = reference.stages(torch64, images)
    actual = jax.jit(lambda v, x: endpoints(MODEL64, v, x))(variables64, images)
    assert actual.keys() == expected.keys() - {"aux1", "aux2"}
    assert {"norm1", "norm2"} < actual.keys()
    for name, stage in actual.items():
        assert relative_error(stage, expected[name]) < 1e-12, name  # 4e-15 measured


@pytest.mark.parametrize("size", [(14, 14), (15, 16), (13, 15), (1, 4), (17, 17)])
def test_auxiliary_heads_have_tensorflows_pool_where_it_makes_4x4_values(
    size: tuple[int, int], variables64: dict[str, Any], torch64: bvlc.BVLCGoogLeNet
) -> None:
    x = np.random.default_rng(0).random((2, *size, 508))
    head = InceptionAux(1008, variant="inception5h", batch_norm=False, dtype=jnp.float64, param_dtype=jnp.float64)
    ours = head.apply({"params": variables64["params"]["aux1"]}, jnp.asarray(x), False)
    theirs = torch64.aux1(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    assert relative_error(ours, theirs) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 75), (75, 64)])
def test_predictor_and_exported_file_compute_its_logits(
    size: tuple[int, int],
    variables64: dict[str, Any],
    torch64: bvlc.BVLCGoogLeNet,
    random_images: Images,
    tmp_path: Path,
) -> None:
    images = random_images(2, *size)
    expected = reference.stages(torch64, images)["fc"]
    assert relative_error(flax_googlenet.make_predictor(MODEL64, variables64)(images), expected) < 1e-12
    logits = jax.jit(_inference_graph(MODEL64, "gpu"))(gpu.prepare(variables64["params"]), images)
    assert relative_error(logits, expected) < 1e-12
    assert _tuned_graph(MODEL64, "tpu") is None
    flax_googlenet.export(tmp_path / "5h.stablehlo", MODEL64, variables64, ["cpu"])  # for images of any size
    program = jax.export.deserialize(bytearray((tmp_path / "5h.stablehlo").read_bytes()))
    assert relative_error(program.call(images), expected) < 1e-12


@pytest.mark.slow
def test_gradients_in_training_are_pytorchs(
    variables64: dict[str, Any], state_dict: dict[str, np.ndarray], random_images: Images
) -> None:
    images = random_images(2, 47, 64)
    weights = np.cos(np.arange(2016.0)).reshape(2, 1008)
    model = bvlc.build(state_dict, torch.float64, Inception5h)
    (model(torch.from_numpy(images).permute(0, 3, 1, 2)) * torch.from_numpy(weights)).sum().backward()

    def loss(variables: Any) -> Any:
        untrained = MODEL64.clone(aux_logits=False, dropout=0.0)
        return (untrained.apply(variables, images, train=True).logits * weights).sum()

    gradients = jax.jit(jax.grad(loss))(variables64)["params"]
    for name in ("conv1", "conv2", "conv3"):
        theirs = model.get_submodule(name).conv.weight.grad.permute(2, 3, 1, 0).numpy()
        assert relative_error(gradients[name]["conv"]["kernel"], theirs) < 1e-10, name
