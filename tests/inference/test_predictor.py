"""The predictor against torchvision's network in PyTorch."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference
import torch
from jax import numpy as jnp
from PIL import Image
from proof import relative_error
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet
from flax_googlenet import fold_batch_norm, make_predictor
from flax_googlenet.inference import cpu
from flax_googlenet.inference.predictor import rank, sent_ahead

Images = Callable[..., np.ndarray]
MODEL = flax_googlenet.GoogLeNet()
MODEL64 = flax_googlenet.GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64)


@pytest.fixture(scope="module")
def predict(variables: dict[str, Any]) -> flax_googlenet.Predictor:
    return make_predictor(MODEL, variables)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "transform_input"), [(5, False), (1, True)])
def test_predictor_computes_torchvisions_logits_in_float64(
    n: int,
    transform_input: bool,
    state_dict: dict[str, np.ndarray],
    variables64: dict[str, Any],
    random_images: Images,
) -> None:
    images = random_images(n, 40, 47)
    network = reference.build(state_dict, transform_input=transform_input, dtype=torch.float64)
    logits = make_predictor(MODEL64.clone(transform_input=transform_input), variables64)(images)
    assert relative_error(logits, reference.stages(network, images)["fc"]) < 1e-13  # measured: 1.2e-14


@pytest.mark.slow
@pytest.mark.parametrize(("n", "size"), [(2, 15), (8, 224), (1, 224), (4, 64)])
def test_float32_error_is_at_most_three_times_pytorchs(
    n: int,
    size: int,
    predict: flax_googlenet.Predictor,
    torch32: TorchGoogLeNet,
    torch64: TorchGoogLeNet,
    random_images: Images,
) -> None:
    images = random_images(n, size, size)
    chw = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        truth = torch64(chw).numpy()
        pytorch = torch32(chw.float()).numpy()
    ours = np.asarray(predict(images.astype(np.float32)), np.float64)
    assert relative_error(ours, truth) < 3 * relative_error(pytorch, truth)  # measured: 1.0 to 2.1 times


@pytest.mark.slow
def test_every_number_of_images_gives_the_same_logits(predict: flax_googlenet.Predictor, random_images: Images) -> None:
    images = random_images(17, 32, 32).astype(np.float32)
    expected = predict(images)
    for n in range(18):
        logits = predict(images[:n])
        assert logits.shape == (n, 1000)
        if n:  # matrix products of other sizes round differently
            assert relative_error(logits, expected[:n]) < 1e-5  # measured: 1.5e-6


@pytest.mark.slow
def test_number_of_images_costs_no_compilation_of_its_own(
    predict: flax_googlenet.Predictor, random_images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    images = random_images(31, 32, 32).astype(np.float32)
    predict(images[: sum(cpu.BATCH_SIZES)])
    with jax.log_compiles():
        for n in (1, 2, 7, 9, 24, 31):
            predict(images[:n])
        assert "Compiling" not in caplog.text
        predict(images[:1, :31])  # but another size of images does
        assert "Compiling" in caplog.text


@pytest.mark.slow
def test_predictor_can_be_traced(variables64: dict[str, Any], random_images: Images) -> None:
    images, step = random_images(2, 16, 16), 1e-6 * random_images(1, 16, 16)
    predict = make_predictor(MODEL64, variables64)

    def logit(image: jax.Array) -> jax.Array:
        return predict(image[None])[0, 7]

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(logit)))(images)
    assert relative_error(values, predict(images)[:, 7]) < 1e-13  # measured: 2.5e-15
    teacher = predict(images).sum()  # concrete images are computed at once, even during a trace
    assert jax.grad(lambda x: x * predict(images).sum())(2.0) == teacher
    assert jax.jit(lambda x: x * predict(images).sum())(2.0) == 2 * teacher
    difference = predict(images + step)[:, 7] - predict(images - step)[:, 7]
    assert relative_error((gradients * step).sum((1, 2, 3)), difference / 2) < 1e-7  # measured: 1.2e-9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_in_half_precision_are_not_rounded_again(
    state_dict: dict[str, np.ndarray], random_images: Images, dtype: Any
) -> None:
    images = random_images(2, 32, 32)
    half = {key: x.astype(dtype) for key, x in state_dict.items()}
    logits = make_predictor(MODEL, flax_googlenet.from_torchvision(half))(images.astype(np.float32))
    network = reference.build(half, transform_input=False, dtype=torch.float64)
    assert relative_error(logits, reference.stages(network, images)["fc"]) < 3e-5  # measured: 4e-6


@pytest.mark.slow
def test_predictor_in_bfloat16_is_the_folded_model(variables: dict[str, Any], random_images: Images) -> None:
    images = random_images(2, 32, 32).astype(np.float32)
    model = MODEL.clone(dtype=jnp.bfloat16)
    folded, folded_variables = fold_batch_norm(model, variables)
    logits = make_predictor(model, variables)(images)
    assert logits.dtype == jnp.bfloat16
    expected = jax.jit(folded.apply)(folded_variables, images).logits.astype(jnp.float32)
    assert relative_error(logits.astype(jnp.float32), expected) < 0.01  # measured: 0; bfloat16 rounds to 0.004


def test_wrong_images_are_refused_as_by_the_model(predict: flax_googlenet.Predictor) -> None:
    with pytest.raises(ValueError, match=r"images\.transpose\(0, 2, 3, 1\)"):
        predict(np.zeros((1, 3, 224, 224), np.float32))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("dog.jpg", r"got str: pass flax_googlenet.preprocess_batch\("),
        (Path("dog.jpg"), r"got pathlib.PosixPath: pass flax_googlenet.preprocess_batch\("),
        (Image.new("RGB", (5, 5)), r"got PIL.Image.Image: pass flax_googlenet.preprocess_batch\("),
        ([np.zeros((15, 15, 3))], r"got list: pass flax_googlenet.preprocess_batch.*, or numpy.stack\(images\) if"),
        (torch.zeros(1, 15, 15, 3), r"got torch.Tensor: pass numpy.asarray\(images\)"),
        (np.zeros((1, 15, 15, 3), np.uint8), "normalise first, as flax_googlenet.preprocess_batch does"),
    ],
)
def test_anything_but_a_batch_of_images_is_refused_with_the_way_out(
    images: Any, message: str, predict: flax_googlenet.Predictor
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        predict(images)


def test_a_predictor_has_a_readable_repr_and_its_copies_give_the_same_bits(
    predict: flax_googlenet.Predictor, random_images: Images
) -> None:
    images = random_images(1, 15, 15).astype(np.float32)
    copied = copy.deepcopy(pickle.loads(pickle.dumps(predict)))
    assert isinstance(copied, flax_googlenet.Predictor)
    assert repr(copied) == repr(predict) == f"Predictor(GoogLeNet with 1000 classes in float32, on {jax.devices()[0]})"
    np.testing.assert_array_equal(copied(images), predict(images))


@pytest.mark.slow
def test_concurrent_calls_never_mix_their_images(predict: flax_googlenet.Predictor, random_images: Images) -> None:
    images = random_images(64, 32, 32).astype(np.float32)
    batches = [images[i : i + n] for i in range(0, 50, 5) for n in (1, 4, 8)]
    alone = [np.asarray(predict(batch)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: np.asarray(predict(batches[i % len(batches)])), range(1000)))
    for i, logits in enumerate(together):
        np.testing.assert_array_equal(logits, alone[i % len(batches)])


_ON_DEVICES = """
import json, pickle, sys
from concurrent.futures import ThreadPoolExecutor
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 3)
import flax_googlenet
model, variables = flax_googlenet.load(sys.argv[1])
images, expected = np.load(sys.argv[2]), np.load(sys.argv[3])
on_three = flax_googlenet.make_predictor(model, variables)
on_one = flax_googlenet.make_predictor(model, variables, devices=jax.devices()[1:2])
errors = [float(abs(np.asarray(on_three(images[:n])) - expected[:n]).max()) for n in (1, 3, 13)]
errors.append(float(abs(np.asarray(on_one(images[:2])) - expected[:2]).max()))
with ThreadPoolExecutor(4) as pool:
    together = list(pool.map(lambda i: np.asarray(on_three(images[: 1 + i % 4])), range(100)))
alone = [np.asarray(on_three(images[: 1 + i])) for i in range(4)]
errors += [float(abs(logits - alone[i % 4]).max()) for i, logits in enumerate(together)]
for size, axis_type in ((3, jax.sharding.AxisType.Auto), (2, jax.sharding.AxisType.Explicit)):
    mesh = jax.make_mesh((size,), ("theirs",), (axis_type,), devices=jax.devices()[:size])
    with jax.set_mesh(mesh):
        of_one, of_three = on_one(images[:3]), on_three(images[:3])
    errors += [float(abs(np.asarray(logits) - alone[2]).max()) for logits in (of_one, of_three)]
    whole = images[:size]  # so few that on_one compiles one size alone
    split = jax.device_put(whole, jax.NamedSharding(mesh, jax.P("theirs")))
    errors += [float(abs(np.asarray(f(split)) - np.asarray(f(whole))).max()) for f in (on_one, on_three)]
pickled = pickle.loads(open(sys.argv[4], "rb").read())  # made where there is one device
assert pickled.devices == tuple(jax.devices()) and pickle.loads(pickle.dumps(on_one)).devices == on_one.devices
errors.append(float(abs(np.asarray(pickled(images[:3])) - alone[2]).max()))
print(json.dumps([len(errors), *errors]))
"""


@pytest.mark.slow
def test_several_devices_give_the_logits_of_one_even_in_another_process(
    variables: dict[str, Any], predict: flax_googlenet.Predictor, random_images: Images, tmp_path: Path
) -> None:
    flax_googlenet.save(tmp_path / "weights.safetensors", MODEL, variables)
    images = random_images(13, 32, 32).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "logits.npy", predict(images))
    (tmp_path / "predict.pickle").write_bytes(pickle.dumps(predict))
    arguments = [tmp_path / name for name in ("weights.safetensors", "images.npy", "logits.npy", "predict.pickle")]
    done = subprocess.run([sys.executable, "-c", _ON_DEVICES, *arguments], capture_output=True, text=True, check=True)
    count, *errors = json.loads(done.stdout)
    assert count == len(errors) == 113
    assert max(errors) < 2e-5  # of logits up to 2: matrix products of other sizes round in another order


class Coming:
    """Logits that a device still computes. On a CPU no array of JAX is sure to be late."""

    def is_ready(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([Coming()], ["read 0", "send 0", "read 1", "send 1", "got 0", "got 1"]),
        ([jnp.ones(2).block_until_ready(), np.ones(2)], ["read 0", "send 0", "got 0", "read 1", "send 1", "got 1"]),
    ],
    ids=["still computed", "ready"],
)
def test_the_next_batch_is_sent_before_logits_are_awaited(logits: list[Any], expected: list[str]) -> None:
    events = []

    def batches() -> Iterator[int]:
        for number in range(2):
            events.append(f"read {number}")
            yield number

    def send(number: int) -> list[Any]:
        events.append(f"send {number}")
        return logits

    for number, got in sent_ahead(send, batches()):
        assert got is logits
        events.append(f"got {number}")
    assert events == expected


def test_a_cpu_computes_a_batch_within_the_call(variables: dict[str, Any]) -> None:
    predict = make_predictor(MODEL, variables, devices=jax.local_devices(backend="cpu")[:1])
    assert predict(np.zeros((1, 15, 15, 3), np.float32)).is_ready()


@pytest.mark.parametrize("top", [1, 5, 30])
def test_the_first_of_equally_likely_classes_comes_first(top: int) -> None:
    for probabilities in np.random.default_rng(0).integers(0, 8, (100, 30)) / 8:
        expected = sorted(range(30), key=lambda index: -probabilities[index])[:top]
        assert [prediction["index"] for prediction in rank(probabilities, top, None)] == expected
