"""The network against torchvision's, stage by stage: in float64, where rounding hides nothing, and in float32."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import reference
import scipy.stats
import torch
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp
from proof import relative_error
from torchvision.models import GoogLeNet as TorchGoogLeNet
from torchvision.models.googlenet import BasicConv2d

import flax_googlenet
from flax_googlenet import GoogLeNet, endpoints
from flax_googlenet.architecture import NETWORKS, stage_name
from flax_googlenet.model import BatchNorm

MODEL64 = GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64)
NO_DROPOUT64 = MODEL64.clone(dropout=0.0, dropout_aux=0.0)
SIZES = [
    (15, 15),
    *(pytest.param(*size, marks=pytest.mark.slow) for size in [(97, 131), (225, 223), (64, 300)]),
]

Images = Callable[..., np.ndarray]


def state_dict_of(named: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in named}


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_every_stage_is_torchvisions_in_float64(
    h: int, w: int, variables64: dict[str, Any], torch64: TorchGoogLeNet, random_images: Images
) -> None:
    images = random_images(2, h, w)
    branches: dict[str, np.ndarray] = {}  # by the paths of torchvision's modules

    def remember(path: str) -> Callable[..., None]:
        return lambda module, inputs, output: branches.update({path: output.permute(0, 2, 3, 1).numpy().copy()})

    hooks = [
        module.register_forward_hook(remember(path.removesuffix(".bn") + "_pre_relu" * path.endswith(".bn")))
        for path, module in torch64.named_modules()
        if isinstance(module, BasicConv2d | torch.nn.BatchNorm2d) and not path.startswith("aux")
    ]
    stages = reference.stages(torch64, images)
    for hook in hooks:
        hook.remove()
    expected = {name: stages[name] for name in stages if name not in ("aux1", "aux2")}
    expected |= {stage_name(path): branch for path, branch in branches.items()}

    # One program: XLA compiles once what both compute.
    actual, output = jax.jit(lambda v, x: (endpoints(MODEL64, v, x, branches=True), MODEL64.apply(v, x)))(
        variables64, images
    )
    assert actual.keys() == expected.keys()
    for name, stage in actual.items():
        assert relative_error(stage, expected[name]) < 1e-12, name  # 2e-14 measured, at inception5b
    np.testing.assert_array_equal(output.logits, actual["fc"])


@pytest.mark.slow
def test_a_stage_can_be_replaced_and_its_gradient_is_torchvisions(
    variables64: dict[str, Any], torch64: TorchGoogLeNet, random_images: Images
) -> None:
    images = random_images(2, 32, 32)
    value = np.abs(np.random.default_rng(0).standard_normal((2, 2, 2, 832)))

    def logit(value: jax.Array) -> jax.Array:
        return endpoints(MODEL64, variables64, images, replace={"mixed4e": value})["fc"][1, 3]

    actual, gradient = jax.jit(jax.value_and_grad(logit))(value)

    inner = torch.from_numpy(value).permute(0, 3, 1, 2).requires_grad_()
    hook = torch64.inception4e.register_forward_hook(lambda *_: inner)
    expected = torch64(torch.from_numpy(images).permute(0, 3, 1, 2))[1, 3]
    hook.remove()
    expected.backward()
    assert relative_error(actual, expected.detach().numpy()) < 1e-12
    assert relative_error(gradient, inner.grad.permute(0, 2, 3, 1).numpy()) < 1e-12


@pytest.mark.parametrize(
    ("replace", "named"),
    [
        ({"mixed4f": np.zeros((1, 1, 1, 512))}, "mixed4e"),
        ({"mixed4e": np.zeros(3)}, r"inception4e .*1, 1, 1, 832"),
        ({"mixed4c_3x3_pre_relu": np.zeros(3)}, "inception4c/branch2_1/pre_relu "),
        ({"norm1": np.zeros((1, 4, 4, 64))}, "norm1: .*conv1"),  # norm1 and norm2 are stages of "bvlc" alone
        ({"mixed4c": np.zeros((1, 1, 1, 512)), "inception4c": np.zeros((1, 1, 1, 512))}, "mixed4c, inception4c"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(
    replace: dict[str, np.ndarray], named: str, variables64: dict[str, Any], random_images: Images
) -> None:
    with pytest.raises(ValueError, match=named):
        jax.eval_shape(lambda: endpoints(MODEL64, variables64, random_images(1, 15, 15), replace=replace))


@pytest.mark.parametrize(
    "names",
    [
        ("inception4c/branch2_0", "inception4c.branch2.0", "inception_4c/3x3_reduce", "mixed4c_3x3_bottleneck"),
        ("inception5b/branch4_1/pre_relu", "mixed5b_pool_reduce_pre_relu", "inception_5b/pool_proj_pre_relu"),
        ("conv3/pre_relu", "conv2/3x3_pre_relu", "conv2d2_pre_relu"),
        ("maxpool3", "pool3/3x3_s2"),
        ("maxpool4", "pool4/3x3_s2", "maxpool10"),
        ("avgpool", "pool5/7x7_s1", "avgpool0"),
        ("fc", "loss3/classifier", "softmax2_pre_activation"),
    ],
)
def test_a_stage_has_the_names_of_torchvision_caffe_and_lucid(names: tuple[str, ...]) -> None:
    assert {stage_name(name) for name in names} == {names[0]}


@pytest.mark.slow
def test_transform_input_is_torchvisions(
    state_dict: dict[str, np.ndarray], variables64: dict[str, Any], photographs: np.ndarray
) -> None:
    images = photographs.astype(np.float64)
    expected = reference.stages(reference.build(state_dict, transform_input=True, dtype=torch.float64), images)
    logits = jax.jit(MODEL64.clone(transform_input=True).apply)(variables64, images).logits
    assert relative_error(logits, expected["fc"]) < 1e-12


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_float32_is_as_near_to_the_truth_as_pytorch(
    h: int,
    w: int,
    variables: dict[str, Any],
    torch32: TorchGoogLeNet,
    torch64: TorchGoogLeNet,
    random_images: Images,
) -> None:
    images = random_images(2, h, w)
    truth = reference.stages(torch64, images)
    pytorch = reference.stages(torch32, images.astype(np.float32))
    flax = jax.jit(lambda v, x: endpoints(GoogLeNet(), v, x))(variables, images.astype(np.float32))
    for name in flax:
        ours, theirs = (relative_error(np.asarray(x[name]), truth[name]) for x in (flax, pytorch))
        print(f"{h}x{w} {name:12} PyTorch {theirs:.1e}  Flax {ours:.1e}  ratio {ours / theirs:.2f}")
        assert ours <= 2 * theirs, name


def test_flaxs_own_batch_norm_would_miss_the_unbiased_variance() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 4))
    torch_norm = torch.nn.BatchNorm2d(4, eps=1e-3, dtype=torch.float64)
    torch_norm(torch.from_numpy(x).permute(0, 3, 1, 2))
    expected = torch_norm.running_var.numpy()

    def running_var(norm: nn.Module, *args: Any) -> np.ndarray:
        variables = norm.init(jax.random.key(0), jnp.asarray(x), *args)
        return norm.apply(variables, jnp.asarray(x), *args, mutable=["batch_stats"])[1]["batch_stats"]["var"]

    options = {"dtype": jnp.float64, "param_dtype": jnp.float64, "momentum": 0.9, "epsilon": 1e-3}
    np.testing.assert_allclose(running_var(BatchNorm(**options), True), expected, rtol=1e-15)
    with jax.numpy_dtype_promotion("standard"):  # Flax's own code promotes
        biased = running_var(nn.BatchNorm(use_running_average=False, use_fast_variance=False, **options))
    assert relative_error(biased, expected) > 1e-3


def test_the_variance_of_a_large_mean_does_not_cancel() -> None:
    x = (1e4 + np.random.default_rng(0).standard_normal((4, 8, 8, 3))).astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), jnp.asarray(x), True)
    _, updates = norm.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
    truth = 0.9 + 0.1 * x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(updates["batch_stats"]["var"], truth, rtol=1e-5)
    fast = np.square(x).mean((0, 1, 2)) - np.square(x.mean((0, 1, 2)))  # E[x^2] - E[x]^2 in float32
    assert np.abs(fast / x.astype(np.float64).var((0, 1, 2)) - 1).max() > 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_variance_of_a_constant_channel_is_not_negative(dtype: Any) -> None:
    constants = np.random.default_rng(0).normal(0, 30, 256).astype(dtype)
    x = jnp.broadcast_to(jnp.asarray(constants)[None, None, None], (7, 13, 11, 256))
    norm = BatchNorm(dtype=dtype, param_dtype=dtype)
    variables = norm.init(jax.random.key(0), x, True)
    zero = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    output, updates = norm.apply({**variables, "batch_stats": zero}, x, True, mutable=["batch_stats"])
    assert jnp.all(updates["batch_stats"]["var"] >= 0)
    assert jnp.all(jnp.isfinite(output))


def test_training_on_one_value_a_channel_raises_as_torch_does(
    variables64: dict[str, Any], torch64: TorchGoogLeNet, random_images: Images
) -> None:
    images = random_images(1, 15, 15)
    norm = torch.nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"more than 1 value a channel in training, got an input of shape \(1, 1, 1, "):
        jax.eval_shape(
            lambda variables: NO_DROPOUT64.apply(variables, images, train=True, mutable=["batch_stats"]), variables64
        )


@pytest.fixture(scope="module")
def heads_in_training(random_images: Images) -> Callable[[Any], tuple[Any, Any]]:
    """(variables) -> all heads in training for 8 images of 32x32 pixels, without dropout and with it."""
    images = random_images(8, 32, 32)

    def heads(model: GoogLeNet, variables: Any, **kwargs: Any) -> Any:
        return model.apply(variables, images, train=True, mutable=["batch_stats"], **kwargs)[0]

    return jax.jit(  # one program, so that the layers below the dropout are compiled once
        lambda variables: (
            heads(NO_DROPOUT64, variables),
            heads(MODEL64, variables, rngs={"dropout": jax.random.key(0)}),
        )
    )


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a TPU has no float64")
def test_all_heads_in_training_are_torchvisions_in_float64(
    heads_in_training: Callable[[Any], tuple[Any, Any]],
    state_dict: dict[str, np.ndarray],
    variables64: dict[str, Any],
    random_images: Images,
) -> None:
    ours, _ = heads_in_training(variables64)
    with torch.no_grad():
        images = torch.from_numpy(random_images(8, 32, 32)).permute(0, 3, 1, 2)
        theirs = reference.build_for_training(state_dict)(images)
    for name in ("logits", "aux_logits1", "aux_logits2"):
        error = relative_error(getattr(ours, name), getattr(theirs, name))
        print(f"{name:12} float64 {error:.1e}")
        assert error < 1e-12, name


@pytest.mark.slow
def test_dropout_has_the_stated_rates(
    heads_in_training: Callable[[Any], tuple[Any, Any]], variables64: dict[str, Any]
) -> None:
    """The last layers are identities, so the logits show the share of zeros in their inputs."""
    params = flatten_dict(variables64["params"])
    for path in (("fc",), ("aux1", "fc2"), ("aux2", "fc2")):
        params[(*path, "kernel")] = np.eye(1024, 1000)
        params[(*path, "bias")] = np.full(1000, 0.0)
    kept, dropped = heads_in_training({**variables64, "params": unflatten_dict(params)})
    for name, rate in (("logits", 0.2), ("aux_logits1", 0.7), ("aux_logits2", 0.7)):
        alive = np.asarray(getattr(kept, name)) != 0
        share = (np.asarray(getattr(dropped, name))[alive] == 0).mean()
        deviation = (rate * (1 - rate) / alive.sum()) ** 0.5
        assert abs(share - rate) < 4 * deviation, name
        survivors = np.asarray(getattr(dropped, name)) != 0
        np.testing.assert_allclose(
            np.asarray(getattr(dropped, name))[survivors],
            np.asarray(getattr(kept, name))[survivors] / (1 - rate),
            rtol=1e-12,
        )


def test_aux_heads_are_initialised_always_and_computed_in_training_alone(random_images: Images) -> None:
    images = jnp.asarray(random_images(2, 32, 32), jnp.float32)
    shapes = flax_googlenet.model.variable_shapes(GoogLeNet())
    assert {"aux1", "aux2"} <= shapes["params"].keys()
    output = jax.eval_shape(GoogLeNet().apply, shapes, images)
    assert (output.aux_logits1, output.aux_logits2) == (None, None)

    headless = GoogLeNet(aux_logits=False)
    shapes = flax_googlenet.model.variable_shapes(headless)
    assert not {"aux1", "aux2"} & shapes["params"].keys()
    train = jax.eval_shape(
        lambda v, x: headless.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])[0],
        shapes,
        images,
    )
    assert (train.aux_logits1, train.aux_logits2) == (None, None)


def test_parameters_are_as_many_as_torchvision_says() -> None:
    def count(model: GoogLeNet) -> int:
        return sum(x.size for x in jax.tree.leaves(flax_googlenet.model.variable_shapes(model)["params"]))

    assert count(GoogLeNet()) == 13_004_888
    assert count(GoogLeNet(aux_logits=False)) == reference.IMAGENET.meta["num_params"] == 6_624_904


@pytest.mark.parametrize(
    "model",
    [
        *(GoogLeNet(variant) for variant in NETWORKS),
        *(GoogLeNet(variant, 7, aux_logits=False, param_dtype=jnp.bfloat16) for variant in NETWORKS),
        GoogLeNet(batch_norm=False),
    ],
)
def test_the_shapes_of_variables_are_those_that_init_makes(model: GoogLeNet) -> None:
    images = jnp.zeros((1, 64, 64, 3), jnp.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    assert repr(flax_googlenet.model.variable_shapes(model)) == repr(expected)  # names in the same order, dtypes, too


@pytest.fixture(scope="module")
def initial() -> dict[str, Any]:
    images = jnp.zeros((1, 15, 15, 3), jnp.float32)
    variables = jax.jit(GoogLeNet().init)(jax.random.key(0), images)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), variables)


@pytest.mark.slow
def test_kernels_start_as_scipys_truncnorm(initial: dict[str, Any]) -> None:
    truncnorm = scipy.stats.truncnorm(-2, 2, scale=0.01)
    kernels = {path: x for path, x in flatten_dict(initial["params"]).items() if path[-1] == "kernel"}
    assert len(kernels) == 59 + 5
    rng = np.random.default_rng(0)
    sample = np.concatenate([rng.choice(np.ravel(x), 1000, replace=False) for x in kernels.values()])
    assert scipy.stats.kstest(sample, truncnorm.cdf).pvalue > 0.01
    # The same sample rejects a normal that is hardly truncated, which is what torchvision's code draws today.
    assert scipy.stats.kstest(sample, scipy.stats.norm(scale=0.01).cdf).pvalue < 1e-10
    for path, x in kernels.items():
        assert abs(np.std(x) / truncnorm.std() - 1) < 5 / np.sqrt(2 * x.size), path


def test_init_draws_its_kernels_in_blocks_of_one_shape_which_compile_fast() -> None:
    """One draw for each of 64 kernels takes XLA 29 seconds of CPU time to compile; blocks take 5 seconds."""
    program = str(jax.make_jaxpr(GoogLeNet().init)(jax.random.key(0), jnp.zeros((1, 15, 15, 3), jnp.float32)))
    draws = re.findall(r"random_bits\[.*?shape=\((.*?)\)", program, re.DOTALL)
    assert set(draws) == {f"{2**20},", "1000,", "1024,"}
    assert program.count("name=_truncated_normal") == 13


@pytest.mark.slow
def test_linear_biases_start_as_torchs_and_batch_norm_at_1_and_0(initial: dict[str, Any]) -> None:
    params = initial["params"]
    for layer, fan_in in ((params["fc"], 1024), (params["aux1"]["fc1"], 2048), (params["aux2"]["fc2"], 1024)):
        bound = fan_in**-0.5
        assert scipy.stats.kstest(np.ravel(layer["bias"]), scipy.stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.01
    for path, x in flatten_dict(initial).items():
        if "bn" in path:
            np.testing.assert_array_equal(x, 1 if path[-1] in ("scale", "var") else 0, err_msg=str(path))


def test_the_batch_may_be_empty_or_of_symbolic_size(variables: dict[str, Any]) -> None:
    nothing = np.zeros((0, 32, 32, 3), np.float32)
    assert jax.jit(GoogLeNet().apply)(variables, nothing).logits.shape == (0, 1000)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: GoogLeNet().apply(variables, x).logits))(images)
    assert exported.out_avals[0].shape == (batch, 1000)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 14, 20, 3), r"H and W at least 15, got shape \(1, 14, 20, 3\)"),
        ((1, 20, 14, 3), "H and W at least 15"),
        ((224, 224, 3), r"\[N, H, W, 3\].*add the batch axis with images\[None\]"),
        ((1, 3, 224, 224), r"NCHW\? use images.transpose\(0, 2, 3, 1\)"),
        ((1, 224, 224, 4), r"\[N, H, W, 3\].* got shape \(1, 224, 224, 4\)"),
        ((1, 224, 224, 1), r"\[N, H, W, 3\]"),
        ((3,), r"\[N, H, W, 3\]"),
    ],
)
def test_images_of_another_shape_are_refused(shape: tuple[int, ...], message: str, variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        GoogLeNet().apply(variables, np.zeros(shape, np.float32))


@pytest.mark.usefixtures("unchecked_annotations")
def test_raw_pixels_are_refused(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="uint8: scale to"):
        GoogLeNet().apply(variables, np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.usefixtures("unchecked_annotations")
def test_a_tensor_of_pytorchs_is_refused_with_the_way_out(variables: dict[str, Any]) -> None:
    message = "expected an array of JAX or NumPy, got torch.Tensor: pass numpy.asarray(images)"
    with pytest.raises(TypeError, match=re.escape(message)):
        GoogLeNet().apply(variables, torch.zeros(1, 32, 32, 3))


def test_training_without_the_variables_of_an_aux_head_is_refused_with_the_way_out(variables: dict[str, Any]) -> None:
    for name in ("aux1", "aux2"):
        headless = {collection: {**tree} for collection, tree in variables.items()}
        del headless["params"][name], headless["batch_stats"][name]
        with pytest.raises(ValueError, match=rf"no {name}: train model\.clone\(aux_logits=False\), or add"):
            jax.eval_shape(
                lambda v: GoogLeNet(dropout=0.0, dropout_aux=0.0).apply(
                    v, np.zeros((2, 32, 32, 3), np.float32), train=True, mutable=["batch_stats"]
                ),
                headless,
            )
    without = {
        kind: {name: block for name, block in blocks.items() if not name.startswith("aux")}
        for kind, blocks in variables.items()
    }
    jax.eval_shape(GoogLeNet().apply, without, np.zeros((1, 32, 32, 3), np.float32))  # inference does not need them


def test_the_smallest_size_is_torchvisions() -> None:
    assert reference.IMAGENET.meta["min_size"] == (NETWORKS["torchvision"].min_size,) * 2


@pytest.mark.slow
def test_bfloat16_computes_with_float32_parameters_and_statistics(
    variables: dict[str, Any], torch32: TorchGoogLeNet, torch64: TorchGoogLeNet, random_images: Images
) -> None:
    images = random_images(4, 64, 64).astype(np.float32)
    model = GoogLeNet(dtype=jnp.bfloat16)
    shapes = flax_googlenet.model.variable_shapes(model)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    output, updates = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]),
        variables,
        images,
    )
    assert {x.dtype for x in output} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}

    # Eight bits through 21 layers cost several per cent of the largest logit. PyTorch's autocast shows how many.
    truth = reference.stages(torch64, images.astype(np.float64))["fc"]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = torch32(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().float().numpy()
    logits = np.asarray(jax.jit(model.apply)(variables, images).logits.astype(jnp.float32))
    ours, theirs = relative_error(logits, truth), relative_error(theirs, truth)
    print(f"bfloat16: PyTorch {theirs:.1e}  Flax {ours:.1e}  ratio {ours / theirs:.2f}")
    assert ours <= 2 * theirs

    params = flax_googlenet.model.variable_shapes(GoogLeNet(param_dtype=jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(params["params"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(params["batch_stats"])} == {jnp.dtype("float32")}


def test_precision_reaches_every_convolution_and_matrix_product() -> None:
    model = GoogLeNet(precision="highest")
    shapes = flax_googlenet.model.variable_shapes(GoogLeNet())
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def train(variables: Any, images: Any) -> Any:
        return model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])

    traced = jax.jit(train).trace(shapes, images)
    # For a CPU, Winograd's algorithm makes two products of conv3, and the five layers that are matrix products call one
    # function for each of their two shapes.
    for platform, count in {"tpu": 59 + 5, "cuda": 59 + 5, "cpu": 59 + 1 + 2}.items():
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in program.splitlines() if "stablehlo.convolution" in line or "dot_general" in line]
        assert len(products) == count
        assert all(line.count("HIGHEST") == 2 for line in products)


@pytest.mark.slow
def test_without_batch_norm_the_convolutions_have_a_bias(variables64: dict[str, Any], random_images: Images) -> None:
    model = MODEL64.clone(batch_norm=False)
    shapes = flax_googlenet.model.variable_shapes(model)
    assert shapes.keys() == {"params"}
    assert shapes["params"]["inception4c"]["branch3_1"].keys() == {"conv"}
    assert shapes["params"]["inception4c"]["branch3_1"]["conv"]["bias"].shape == (64,)

    # BatchNorm at inference is y = x * m + (bias - mean * m) with m = scale / sqrt(var + eps), written out here.
    params, stats = flatten_dict(variables64["params"]), flatten_dict(variables64["batch_stats"])
    folded = {path: x for path, x in params.items() if "bn" not in path}
    for path in {path[:-2] for path in params if "bn" in path}:
        multiplier = params[(*path, "bn", "scale")] / np.sqrt(stats[(*path, "bn", "var")] + 1e-3)
        folded[(*path, "conv", "kernel")] = folded[(*path, "conv", "kernel")] * multiplier
        folded[(*path, "conv", "bias")] = params[(*path, "bn", "bias")] - stats[(*path, "bn", "mean")] * multiplier
    folded_variables = {"params": unflatten_dict(folded)}
    assert jax.tree.map(jnp.shape, folded_variables) == jax.tree.map(lambda x: x.shape, shapes)

    images = random_images(2, 64, 64)
    expected = np.asarray(jax.jit(MODEL64.apply)(variables64, images).logits)
    assert relative_error(jax.jit(model.apply)(folded_variables, images).logits, expected) < 1e-12


@pytest.mark.slow
def test_nnx_bridge_gives_the_same_logits(variables: dict[str, Any], random_images: Images) -> None:
    images = random_images(2, 32, 32).astype(np.float32)
    expected = jax.jit(GoogLeNet().apply)(variables, images).logits

    module = nnx.bridge.ToNNX(GoogLeNet(), rngs=nnx.Rngs(0))
    for name, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(variables).items():
        setattr(module, name, value)
    np.testing.assert_array_equal(nnx.jit(lambda module, x: module(x).logits)(module, images), expected)
