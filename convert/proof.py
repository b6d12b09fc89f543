"""Proves a port: compares PyTorch's network with Flax's on the same images, stage by stage, in two precisions."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import bvlc
import inception5h
import jax
import numpy as np
import reference
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp

from flax_googlenet import GoogLeNet, endpoints
from flax_googlenet.model import InceptionAux, Variables

FLOAT64_LIMIT = 1e-12
"""Largest relative error in float64, which rounds at 1e-16; the largest error measured is 2e-14."""
# The limit lies between what was measured for right and for wrong ports, as multiples of the error granted to PyTorch.
# Heads: 14,400 of 1, 2, 3 and 5 classes (random, trained, with weights of a single sign, and with weights that cancel),
# on the features of a random network and of two networks trained on 3 classes for 1 and 8 epochs. Flax had at most 1.6
# times that error, and at least 32 times with TF32 (10 bits of mantissa) in the last layer alone. Without widened heads
# and with a floor of one rounding, up to 39 % of one kind of heads would have exceeded 4.
# Complete networks of 1, 2 and 3 classes: the worst stage of Flax had 1.5 times that error. The best stage had 110
# times that error with TF32 in all layers, and 740 times with bfloat16.
FLOAT32_LIMIT = 4.0
"""Largest error of Flax in float32, as a multiple of PyTorch's own error."""
FLOAT32_FLOOR = 8 * float(np.finfo(np.float32).eps)
"""Smallest relative error granted to PyTorch in float32, which can be exact by chance."""
HEAD_CLASSES = 256
"""Number of classes to which the proof widens smaller heads; see ``widen_heads``."""
NETWORKS = {
    "bvlc": bvlc.BVLCGoogLeNet,
    "bvlc_floor": bvlc.BVLCGoogLeNetFloor,
    "inception5h": inception5h.Inception5h,
}
"""Variant of the paper's network -> the network in PyTorch."""
HEADS = {"fc": ("fc",), "aux1": ("aux1", "fc2"), "aux2": ("aux2", "fc2")}
"""Stage -> path of its last layer."""


@dataclass(frozen=True)
class Stage:
    """Largest errors of a stage over all images, relative to the largest value of the stage."""

    name: str
    shape: tuple[int, ...]
    """Shape in NHWC order for images of 224x224."""
    float64: float
    """Error of Flax in float64; the truth is always PyTorch in float64."""
    pytorch32: float
    """Error of PyTorch in float32."""
    flax32: float
    """Error of Flax in float32."""
    device32: float | None = None
    """Error of Flax in float32 on the device that was asked for, if any."""

    @property
    def ok(self) -> bool:
        in_float32 = [self.flax32] if self.device32 is None else [self.flax32, self.device32]
        limit = float32_limit(self.pytorch32)
        return self.float64 <= FLOAT64_LIMIT and all(error <= limit for error in in_float32)  # False for NaN


def float32_limit(pytorch32: float) -> float:
    """Return the largest error that Flax may have in float32 where PyTorch's error is ``pytorch32``."""
    return FLOAT32_LIMIT * max(pytorch32, FLOAT32_FLOOR)


@dataclass(frozen=True)
class Proof:
    """Comparison of a port with the same network in PyTorch."""

    stages: tuple[Stage, ...]
    """Stages in the order of computation, the auxiliary heads last."""
    pytorch_logits: np.ndarray
    """float32 [2, num_classes], for the two photographs."""
    flax_logits: np.ndarray
    """float32 [2, num_classes], for the two photographs."""
    device: str | None = None
    """Name of the device of ``Stage.device32``."""

    @property
    def ok(self) -> bool:
        return all(stage.ok for stage in self.stages)


def proof_images() -> list[np.ndarray]:
    """Return two batches, float32 NHWC: both photographs and two random images; one image of an odd size."""
    rng = np.random.default_rng(0)
    photographs = [reference.preset(photograph) for photograph in reference.photographs()]
    square = np.concatenate([photographs, rng.standard_normal((2, 224, 224, 3))])
    return [square.astype(np.float32), rng.standard_normal((1, 97, 131, 3)).astype(np.float32)]


def prove(
    state_dict: Mapping[str, np.ndarray],
    model: GoogLeNet,
    variables: Variables,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    device: jax.Device | None = None,
) -> Proof:
    """Compare a port with the same network in PyTorch: torchvision's, or one of ``NETWORKS``.

    Both compute on the CPU. JAX must have 64 bits enabled.

    Args:
        state_dict: State dict of the reference, already checked.
        model: Port. The reference gets its ``variant`` and ``transform_input``; its dtypes do not matter.
        variables: Variables of the port.
        on_progress: Called with the number of finished runs of a network and the total.
        device: Device on which Flax also computes in float32.
    """
    num_classes = model.num_classes
    state_dict, model, variables = widen_heads(state_dict, model, variables)
    batches = proof_images()
    results: list[dict[str, np.ndarray]] = []
    for dtype in (np.float64, np.float32):
        torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        pytorch: torch.nn.Module
        if model.variant == "torchvision":
            pytorch = reference.build(state_dict, transform_input=model.transform_input, dtype=torch_dtype)
        else:
            pytorch = bvlc.build(state_dict, torch_dtype, NETWORKS[model.variant])
        engines = [functools.partial(reference.stages, pytorch), functools.partial(flax_stages, model, variables)]
        if device is not None and dtype is np.float32:
            engines.append(functools.partial(flax_stages, model, variables, device=device))
        for engine in engines:
            for images in batches:
                on_progress(len(results), (4 if device is None else 5) * len(batches))
                results.append(engine(images.astype(dtype)))
    on_progress(len(results), len(results))

    truth, flax64, pytorch32, flax32, *on_device = (
        results[i : i + len(batches)] for i in range(0, len(results), len(batches))
    )

    def worst(actual: list[dict[str, np.ndarray]], name: str) -> float:
        errors = [relative_error(a[name], t[name]) for a, t in zip(actual, truth, strict=True)]
        return float(np.max(errors))  # NaN wins, which max() would lose

    return Proof(
        tuple(
            Stage(
                name,
                (len(x), num_classes) if name in HEADS else x.shape,
                worst(flax64, name),
                worst(pytorch32, name),
                worst(flax32, name),
                *(worst(stages, name) for stages in on_device),
            )
            for name, x in truth[0].items()
        ),
        pytorch32[0]["fc"][:2, :num_classes],
        flax32[0]["fc"][:2, :num_classes],
        None if device is None else describe(device),
    )


def describe(device: jax.Device) -> str:
    """Return the kind of a device, its platform and the platform's version, each different word once, on one line."""
    version = " ".join(device.client.platform_version.split())
    return ", ".join(dict.fromkeys((device.device_kind, device.platform, version)))


def widen_heads(
    state_dict: Mapping[str, np.ndarray], model: GoogLeNet, variables: Variables
) -> tuple[dict[str, np.ndarray], GoogLeNet, Variables]:
    """Widen heads of few classes to ``HEAD_CLASSES``, in the reference and in the port alike.

    The proof compares the largest error of PyTorch with the largest error of Flax. For a head of one class, each is the
    largest of five numbers, so their ratio is a matter of chance; the largest of many numbers varies little. The added
    classes are copies of the head's own with random signs of the weights, whose errors have the same spread. The
    head's own classes come first, unchanged.

    Args:
        state_dict: State dict of the reference, already checked.
        model: Port.
        variables: Variables of the port.

    Returns:
        The same three with at least ``HEAD_CLASSES`` classes.
    """
    num_classes = model.num_classes
    if num_classes >= HEAD_CLASSES:
        return dict(state_dict), model, variables
    rows = np.arange(HEAD_CLASSES) % num_classes
    widened_state, widened_variables = dict(state_dict), flatten_dict(dict(variables))
    rng = np.random.default_rng(0)
    for stage, path in HEADS.items():
        layer, kernel, bias = ".".join(path), ("params", *path, "kernel"), ("params", *path, "bias")
        if stage != "fc" and not model.aux_logits:
            continue
        weight = state_dict[f"{layer}.weight"]  # [num_classes, in]
        signs = np.where(rng.random((HEAD_CLASSES, weight.shape[1])) < 0.5, -1, 1).astype(weight.dtype)
        signs[:num_classes] = 1
        widened_state[f"{layer}.weight"] = weight[rows] * signs
        widened_state[f"{layer}.bias"] = state_dict[f"{layer}.bias"][rows]
        own = np.asarray(widened_variables[kernel])  # [in, num_classes]
        widened_variables[kernel] = own[:, rows] * signs.T.astype(own.dtype)
        widened_variables[bias] = np.asarray(widened_variables[bias])[rows]
    return widened_state, model.clone(num_classes=HEAD_CLASSES), unflatten_dict(widened_variables)


def flax_stages(
    model: GoogLeNet, variables: Variables, images: np.ndarray, device: jax.Device | None = None
) -> dict[str, np.ndarray]:
    """Return the same stages as ``reference.stages``, computed by Flax in the dtype of the images.

    They are computed on the CPU, unless ``device`` is another device or ``JAX_PLATFORMS`` leaves out the CPU.
    """
    dtype = images.dtype.type
    if device is None:
        with contextlib.suppress(RuntimeError):  # the CPU is left out
            device = jax.local_devices(backend="cpu")[0]
    model = model.clone(dtype=dtype, param_dtype=dtype, precision="highest")
    variables = jax.tree.map(lambda x: jax.device_put(np.asarray(x, dtype), device), variables)
    return {name: np.asarray(x) for name, x in _stages(model, variables, images).items()}


@functools.partial(jax.jit, static_argnums=0)  # at the top level, so that a model is traced once for each shape
def _stages(model: GoogLeNet, variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
    outputs = endpoints(model, variables, images)
    fields = {name: getattr(model, name) for name in ("variant", "batch_norm", "dtype", "precision")}
    head = InceptionAux(model.num_classes, **fields)
    for aux, stage in reference.AUX_INPUTS.items() if model.aux_logits else ():
        head_variables = {collection: tree[aux] for collection, tree in variables.items()}
        outputs[aux] = jnp.asarray(head.apply(head_variables, outputs[stage], False))
    return outputs


def relative_error(actual: np.ndarray | jax.Array, truth: np.ndarray | jax.Array) -> float:
    """Return the largest difference divided by the largest true value.

    The error is infinite if the shapes differ, and NaN if a value is not finite.
    """
    actual, truth = np.asarray(actual, np.float64), np.asarray(truth, np.float64)
    if actual.shape != truth.shape:
        return math.inf
    if not (np.isfinite(actual).all() and np.isfinite(truth).all()):
        return math.nan
    return float(np.abs(actual - truth).max() / (np.abs(truth).max() or 1.0))


def summary(proof: Proof) -> dict[str, dict[str, float | None]]:
    """Return the errors of each stage for JSON, which has neither infinity nor NaN; both become None."""
    return {
        stage.name: {
            name: error if math.isfinite(error := getattr(stage, name)) else None
            for name in ("float64", "pytorch32", "flax32", *(["device32"] if proof.device else []))
        }
        for stage in proof.stages
    }
