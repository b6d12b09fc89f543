"""The paper's network, the variant "bvlc", against a plain network in PyTorch."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bvlc
import jax
import numpy as np
import pytest
import reference
import torch
from flax.traverse_util import flatten_dict
from jax import numpy as jnp
from PIL import Image
from proof import relative_error

import flax_googlenet
from flax_googlenet import GoogLeNet, endpoints
from flax_googlenet.architecture import BLOCKS
from flax_googlenet.inference import gpu, tpu
from flax_googlenet.inference.predictor import _inference_graph, _tuned_graph
from flax_googlenet.model import InceptionAux, variable_shapes
from flax_googlenet.training import RecipeError, train
from flax_googlenet.training.recipe import PRESETS
from flax_googlenet.weights import caffe

MODEL = GoogLeNet(variant="bvlc", dropout=0.0, dropout_aux=0.0)
MODEL64 = MODEL.clone(dtype=jnp.float64, param_dtype=jnp.float64)

Images = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    return bvlc.random_weights()


@pytest.fixture(scope="module")
def variables(state_dict: dict[str, np.ndarray]) -> dict[str, Any]:
    return caffe.network("random weights", state_dict)[1]


@pytest.fixture(scope="module")
def variables64(variables: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: x.astype(np.float64), variables)


@pytest.fixture(scope="module")
def torch64(state_dict: dict[str, np.ndarray]) -> bvlc.BVLCGoogLeNet:
    return bvlc.build(state_dict, torch.float64)


@pytest.mark.parametrize(
    ("h", "w"), [(31, 31), *(pytest.param(*size, marks=pytest.mark.slow) for size in [(97, 131), (225, 223)])]
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
        assert relative_error(stage, expected[name]) < 1e-12, name  # 3e-15 measured


@pytest.mark.parametrize("size", [(14, 14), (12, 13), (15, 14), (1, 4)])
def test_auxiliary_heads_have_caffes_pool_where_it_makes_4x4_values(
    size: tuple[int, int], variables64: dict[str, Any], torch64: bvlc.BVLCGoogLeNet
) -> None:
    x = np.random.default_rng(0).random((2, *size, 512))
    head = InceptionAux(1000, variant="bvlc", batch_norm=False, dtype=jnp.float64, param_dtype=jnp.float64)
    ours = head.apply({"params": variables64["params"]["aux1"]}, jnp.asarray(x), False)
    theirs = torch64.aux1(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    assert relative_error(ours, theirs) < 1e-12


@pytest.mark.slow
def test_all_heads_and_gradients_in_training_are_pytorchs(
    variables64: dict[str, Any], state_dict: dict[str, np.ndarray], random_images: Images
) -> None:
    images = random_images(2, 192, 192)
    weights = np.cos(np.arange(2000.0)).reshape(2, 1000)
    model = bvlc.build(state_dict, torch.float64)
    outputs: dict[str, torch.Tensor] = {}
    for block in ("inception4a", "inception4d"):
        model.get_submodule(block).register_forward_hook(lambda _, __, x, block=block: outputs.update({block: x}))
    logits = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = (logits, model.aux2(outputs["inception4d"]), model.aux1(outputs["inception4a"]))
    sum((head * torch.from_numpy(weights)).sum() for head in expected).backward()

    @jax.jit
    def heads_and_gradients(variables: Any) -> Any:
        def loss(variables: Any) -> Any:
            output = MODEL64.apply(variables, images, train=True)
            return sum((head * weights).sum() for head in output), output

        return jax.grad(loss, has_aux=True)(variables)

    gradients, output = heads_and_gradients(variables64)
    for ours, theirs in zip(output, expected, strict=True):
        assert relative_error(ours, theirs.detach().numpy()) < 1e-12
    torch_gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    expected_gradients = flatten_dict(caffe.network("gradients", torch_gradients)[1])
    assert len(expected_gradients) == 2 * 64
    for path, gradient in flatten_dict(gradients).items():
        assert relative_error(gradient, expected_gradients[path]) < 1e-10, path


def test_it_has_as_many_parameters_as_its_caffe_files_say() -> None:
    def count(model: GoogLeNet) -> int:
        return sum(x.size for x in jax.tree.leaves(variable_shapes(model)))

    assert count(MODEL) == 13_378_280
    assert count(MODEL.clone(aux_logits=False)) == 6_998_552


@pytest.mark.slow
def test_it_starts_as_caffes_xavier_filler_with_biases_of_a_fifth() -> None:
    initial = flatten_dict(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 31, 31, 3), jnp.float32))["params"])
    classifiers = {("fc",), ("aux1", "fc2"), ("aux2", "fc2")}
    for (*path, name), value in initial.items():
        value = np.asarray(value, np.float64)
        if name == "bias":
            np.testing.assert_array_equal(value, np.float32(0.0 if (*path,) in classifiers else 0.2))
            continue
        bound = (3 / np.prod(value.shape[:-1])) ** 0.5
        assert 0.98 * bound < np.abs(value).max() < 1.001 * bound
        assert abs(np.std(value) * 3**0.5 / bound - 1) < 5 / value.size**0.5


def test_another_name_and_transform_input_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"'bvlc', 'inception5h' and 'bvlc_floor', got 'caffe'.*num_classes="):
        GoogLeNet(variant="caffe")
    with pytest.raises(ValueError, match=r"transform_input.*'bvlc' has an input of its own"):
        GoogLeNet(variant="bvlc", transform_input=True)


def test_it_has_no_batch_norm_and_folding_changes_nothing(variables: dict[str, Any]) -> None:
    assert GoogLeNet(variant="bvlc") == GoogLeNet(variant="bvlc", batch_norm=False)
    model, folded = flax_googlenet.fold_batch_norm(MODEL, variables)
    assert model == MODEL
    jax.tree.map(np.testing.assert_array_equal, folded, variables)


def test_its_smallest_image_has_31_pixels(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="H and W at least 31"):
        MODEL.apply(variables, np.zeros((1, 31, 30, 3), np.float32))
    with pytest.raises(flax_googlenet.ExportError, match="at least 31 by 31"):
        flax_googlenet.export("never written", MODEL, variables, size=(30, 30))


def test_a_file_stores_the_variant_only_where_it_is_not_torchvisions(variables: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bvlc.safetensors"
    flax_googlenet.save(path, MODEL, variables)
    model, loaded = flax_googlenet.load(path)
    assert model == MODEL
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert b'\\"variant\\": \\"bvlc\\"' in path.read_bytes()[:1000]  # by its name, earlier versions refuse the file

    classless = GoogLeNet(num_classes=1, aux_logits=False)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variable_shapes(classless))
    flax_googlenet.save(path, classless, zeros)
    assert b"variant" not in path.read_bytes()[:1000]
    assert flax_googlenet.load(path)[0].variant == "torchvision"


@pytest.mark.slow
def test_predictor_and_exported_file_compute_its_logits(
    variables64: dict[str, Any], torch64: bvlc.BVLCGoogLeNet, random_images: Images, tmp_path: Path
) -> None:
    images = random_images(2, 64, 75)
    expected = reference.stages(torch64, images)["fc"]
    assert relative_error(flax_googlenet.make_predictor(MODEL64, variables64)(images), expected) < 1e-12
    for platform, tuned in (("gpu", gpu), ("tpu", tpu)):  # their arithmetic is that of any device
        logits = jax.jit(_inference_graph(MODEL64, platform))(tuned.prepare(variables64["params"]), images)
        assert relative_error(logits, expected) < 1e-12, platform
    flax_googlenet.export(tmp_path / "bvlc.stablehlo", MODEL64, variables64, ["cpu"])  # for images of any size
    program = jax.export.deserialize(bytearray((tmp_path / "bvlc.stablehlo").read_bytes()))
    assert relative_error(program.call(images), expected) < 1e-12


@pytest.mark.slow
def test_with_pools_that_round_down_stages_predictor_and_exported_file_are_pytorchs(
    variables64: dict[str, Any], state_dict: dict[str, np.ndarray], random_images: Images, tmp_path: Path
) -> None:
    model = MODEL64.clone(variant="bvlc_floor")
    images = random_images(2, 61, 76)
    expected = reference.stages(bvlc.build(state_dict, torch.float64, bvlc.BVLCGoogLeNetFloor), images)
    assert expected["inception5b"].shape == (2, 1, 1, 1024)
    for name, stage in jax.jit(lambda v, x: endpoints(model, v, x))(variables64, images).items():
        assert relative_error(stage, expected[name]) < 1e-12, name
    logits = jax.jit(_inference_graph(model, "gpu"))(gpu.prepare(variables64["params"]), images)
    assert relative_error(logits, expected["fc"]) < 1e-12
    assert _tuned_graph(model, "tpu") is None
    flax_googlenet.export(tmp_path / "floor.stablehlo", model, variables64, ["cpu"])  # for images of any size
    program = jax.export.deserialize(bytearray((tmp_path / "floor.stablehlo").read_bytes()))
    assert relative_error(program.call(images), expected["fc"]) < 1e-12
    with pytest.raises(ValueError, match="H and W at least 61"):
        model.apply(variables64, np.zeros((1, 61, 60, 3)))


@pytest.mark.slow
def test_a_run_keeps_the_network_of_its_weights_and_the_frozen_blocks(
    variables: dict[str, Any], tmp_path: Path
) -> None:
    frozen = BLOCKS[: BLOCKS.index("inception5b")]
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng([i, ord(label)]).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    flax_googlenet.save(tmp_path / "start.safetensors", MODEL, variables)
    recipe = dataclasses.replace(
        PRESETS["finetune"], epochs=1, batch_size=4, image_size=32, learning_rate=1e-5, held_out=0.34, frozen=frozen
    )
    result = train(tmp_path / "data", tmp_path / "run", recipe, weights=tmp_path / "start.safetensors")
    model, trained = flax_googlenet.load(result.best_weights)
    assert (model.variant, model.num_classes, model.batch_norm) == ("bvlc", 2, False)
    assert trained.keys() == {"params"}
    for name, block in trained["params"].items():
        inner = {path: leaf for path, leaf in flatten_dict(block).items() if path[:1] != ("fc2",) and name != "fc"}
        before = flatten_dict(variables["params"][name])
        is_kept = [np.array_equal(leaf, before[path]) for path, leaf in inner.items()]
        assert all(is_kept) if name in frozen else not any(is_kept), name

    small = dataclasses.replace(recipe, image_size=30)
    with pytest.raises(RecipeError, match="image_size must be at least 31"):
        train(tmp_path / "data", tmp_path / "small", small, weights=tmp_path / "start.safetensors")
