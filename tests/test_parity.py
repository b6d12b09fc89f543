"""The network on JAX's default device against torchvision's on the CPU: ``pytest -m parity -s`` prints the errors.

The truth is PyTorch in float64. Where a device has no float64, such as a TPU, the tests in float64 are left out.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import pytest
import reference
import torch
from jax import numpy as jnp
from proof import FLOAT64_LIMIT, float32_limit, relative_error
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet
from flax_googlenet import GoogLeNet, endpoints, make_predictor

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PLATFORM = jax.default_backend()
EXACT = {
    "float32": GoogLeNet(precision="highest", dropout=0.0, dropout_aux=0.0),
    "float64": GoogLeNet(dtype=jnp.float64, param_dtype=jnp.float64, dropout=0.0, dropout_aux=0.0),
}
"""Networks by the dtype in which they compute exactly: on GPUs and TPUs, float32 does so at "highest" alone."""
DTYPES = ["float32", *(["float64"] if PLATFORM != "tpu" else [])]

Images = Callable[..., np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    device = jax.devices()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "torch", "torchvision"))
    print(f"\n{device.device_kind} ({device.platform}); {packages}")


def cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def judge(name: str, dtype: str, ours: float, pytorch32: float | None = None, limit: float = FLOAT64_LIMIT) -> None:
    """Print an error, and assert that it is within the limit of its dtype."""
    if pytorch32 is not None:
        limit = float32_limit(pytorch32)
    print(f"{name:12} {dtype} {ours:.1e}" + ("" if pytorch32 is None else f"  PyTorch {pytorch32:.1e}"))
    assert ours <= limit, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stage_is_torchvisions(
    dtype: str,
    variables: dict[str, Any],
    torch32: TorchGoogLeNet,
    torch64: TorchGoogLeNet,
    photographs: np.ndarray,
) -> None:
    truth = reference.stages(torch64, photographs.astype(np.float64))
    stages = jax.jit(lambda v, x: endpoints(EXACT[dtype], v, x))(cast(variables, dtype), photographs.astype(dtype))
    pytorch = reference.stages(torch32, photographs)
    for name in (name for name in truth if name in stages):  # jax.jit sorts by name
        theirs = relative_error(pytorch[name], truth[name]) if dtype == "float32" else None
        judge(name, dtype, relative_error(stages[name], truth[name]), theirs)


# The error of the logits that was measured at JAX's default precision: a CPU computes in float32, a GPU in TF32 with 10
# bits of mantissa, a TPU in bfloat16 with 7. The bounds leave a factor of 4 on both sides, so that a flag shows that
# computes more precisely, and slower, or less.
DEFAULT_PRECISION = {"cpu": (0.0, 2e-5), "gpu": (1e-4, 1e-2), "tpu": (1e-3, 1e-1)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_precision_and_bfloat16_round_as_measured(
    dtype: str, variables: dict[str, Any], torch64: TorchGoogLeNet, photographs: np.ndarray
) -> None:
    truth = reference.stages(torch64, photographs.astype(np.float64))["fc"]
    logits = jax.jit(GoogLeNet(dtype=jnp.dtype(dtype)).apply)(variables, photographs).logits
    error = relative_error(logits.astype(jnp.float32), truth)
    print(f"logits at the default precision in {dtype}: {error:.1e}")
    least, most = DEFAULT_PRECISION[PLATFORM] if dtype == "float32" else (1e-3, 1e-1)
    assert least < error < most


def test_heads_in_training_in_float32_are_torchvisions(
    state_dict: dict[str, np.ndarray], variables: dict[str, Any], random_images: Images
) -> None:
    """In float64, ``test_model.py`` has them. ``test_step.py`` has the gradients, the statistics and SGD in both."""
    images = random_images(4, 113, 131)  # large enough for Winograd's algorithm on a CPU: inception3b has 15x17 pixels

    def pytorch(precision: str) -> Any:
        model = reference.build_for_training(state_dict, getattr(torch, precision))
        with torch.no_grad():
            return model(torch.from_numpy(images.astype(precision)).permute(0, 3, 1, 2))

    apply = jax.jit(lambda v, x: EXACT["float32"].apply(v, x, train=True, mutable=["batch_stats"])[0])
    ours, truth, theirs = apply(variables, images.astype(np.float32)), pytorch("float64"), pytorch("float32")
    errors, pytorch32 = (
        max(relative_error(getattr(heads, name), getattr(truth, name)) for name in truth._fields)
        for heads in (ours, theirs)
    )
    judge("heads", "float32", errors, pytorch32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_predictor_and_exported_file_compute_torchvisions_logits(
    dtype: str,
    variables: dict[str, Any],
    torch32: TorchGoogLeNet,
    torch64: TorchGoogLeNet,
    photographs: np.ndarray,
    tmp_path: Any,
) -> None:
    chw = torch.from_numpy(photographs).permute(0, 3, 1, 2)
    with torch.inference_mode():
        truth, theirs = torch64(chw.double()).numpy(), torch32(chw).numpy()
    pytorch32 = relative_error(theirs, truth) if dtype == "float32" else None
    model, given, images = EXACT[dtype], cast(variables, dtype), photographs.astype(dtype)
    judge("predictor", dtype, relative_error(make_predictor(model, given, jax.devices()[:1])(images), truth), pytorch32)
    platform = {"gpu": "cuda"}.get(PLATFORM, PLATFORM)
    flax_googlenet.export(tmp_path / "network.stablehlo", model, given, [platform])
    program = jax.export.deserialize(bytearray((tmp_path / "network.stablehlo").read_bytes()))
    judge("export", dtype, relative_error(program.call(images), truth), pytorch32)
