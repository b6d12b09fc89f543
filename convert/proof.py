"""The proof of a port: torchvision's network and ours on the same images, stage by stage, in float64 and float32."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
import reference
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp

from flax_googlenet import GoogLeNet, endpoints
from flax_googlenet.model import InceptionAux, Variables

FLOAT64_LIMIT = 1e-12  # relative; float64 rounds at 1e-16, and 2e-14 is the most that was measured
# Measured on 14,400 random, trained, one-signed and cancelling heads of 1, 2, 3 and 5 classes, on the features of a
# random network and of two that were trained for 1 and 8 epochs on 3 classes: Flax had at most 1.6 times the error
# that is granted to PyTorch, and TF32 (10 bits of mantissa) in the last layer alone at least 32 times. Without the
# wider heads and with a floor of one rounding, up to 39 % of a kind were above 4. In whole networks of 1, 2 and 3
# classes Flax's worst stage had 1.5 times; with TF32 in all layers the best stage had 110 times, and with bfloat16
# 740 times.
FLOAT32_LIMIT = 4.0
"""The largest error that Flax may have in float32, as a multiple of PyTorch's own."""
FLOAT32_FLOOR = 8 * float(np.finfo(np.float32).eps)
"""The error that PyTorch is taken to have at least, relative to the largest value: it can be exact by luck."""
HEAD_CLASSES = 256
"""The number of classes that the proof gives to heads of fewer; see ``widen_heads``."""
HEADS = {"fc": ("fc",), "aux1": ("aux1", "fc2"), "aux2": ("aux2", "fc2")}
"""Stage -> path of its last layer."""


@dataclass(frozen=True)
class Stage:
    """The largest errors of one stage over all images, relative to the largest value of the stage."""

    name: str
    shape: tuple[int, ...]
    """NHWC, for the images of 224x224."""
    float64: float
    """Flax against PyTorch, both in float64."""
    pytorch32: float
    """PyTorch in float32 against PyTorch in float64, the truth."""
    flax32: float
    """Flax in float32 against the truth."""

    @property
    def ok(self) -> bool:
        return self.float64 <= FLOAT64_LIMIT and self.flax32 <= float32_limit(self.pytorch32)  # False for NaN


def float32_limit(pytorch32: float) -> float:
    """Return the largest error that Flax in float32 may have where PyTorch in float32 has the error ``pytorch32``."""
    return FLOAT32_LIMIT * max(pytorch32, FLOAT32_FLOOR)


@dataclass(frozen=True)
class Proof:
    stages: tuple[Stage, ...]
    """In the order of computation, the auxiliary heads last."""
    pytorch_logits: np.ndarray
    """float32 [2, num_classes], of the two photographs."""
    flax_logits: np.ndarray
    """float32 [2, num_classes], of the two photographs."""

    @property
    def ok(self) -> bool:
        return all(stage.ok for stage in self.stages)


def proof_images() -> list[np.ndarray]:
    """What a port is proven on, float32 NHWC: the photographs with two random images, then one of an odd size."""
    rng = np.random.default_rng(0)
    photographs = [reference.preset(photograph) for photograph in reference.photographs()]
    square = np.concatenate([photographs, rng.standard_normal((2, 224, 224, 3))])
    return [square.astype(np.float32), rng.standard_normal((1, 97, 131, 3)).astype(np.float32)]


def prove(
    state_dict: Mapping[str, np.ndarray],
    model: GoogLeNet,
    variables: Variables,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Holds ``model`` and ``variables`` against torchvision's network with ``state_dict``; JAX needs 64 bits enabled.

    Args:
        state_dict: the reference's, checked.
        model: the port; its ``transform_input`` goes for the reference, too, and its dtypes do not matter.
        variables: the port's.
        on_progress: called with the number of finished and of all network runs.
    """
    num_classes = model.num_classes
    state_dict, model, variables = widen_heads(state_dict, model, variables)
    batches = proof_images()
    results: list[dict[str, np.ndarray]] = []
    for dtype in (np.float64, np.float32):
        pytorch = reference.build(
            state_dict, transform_input=model.transform_input, dtype=torch.from_numpy(np.empty(0, dtype)).dtype
        )
        for engine in (lambda x, m=pytorch: reference.stages(m, x), lambda x: flax_stages(model, variables, x)):
            for images in batches:
                on_progress(len(results), 4 * len(batches))
                results.append(engine(images.astype(dtype)))
    on_progress(len(results), len(results))

    truth, flax64, pytorch32, flax32 = (results[i : i + len(batches)] for i in range(0, len(results), len(batches)))

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
            )
            for name, x in truth[0].items()
        ),
        pytorch32[0]["fc"][:2, :num_classes],
        flax32[0]["fc"][:2, :num_classes],
    )


def widen_heads(
    state_dict: Mapping[str, np.ndarray], model: GoogLeNet, variables: Variables
) -> tuple[dict[str, np.ndarray], GoogLeNet, Variables]:
    """Give heads of few classes ``HEAD_CLASSES``, in the reference and in the port alike.

    The proof compares the largest error of PyTorch with the largest error of Flax. For a head of one class, each is the
    largest of five numbers, and their quotient is a matter of luck; the largest of many numbers hardly is. So classes
    are added: copies of the head's own, each weight with its sign flipped at random, whose errors have the same spread.
    The head's own classes come first, unchanged.

    Args:
        state_dict: the reference's, checked.
        model: the port.
        variables: the port's.

    Returns:
        The same three, with at least ``HEAD_CLASSES`` classes.
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


def flax_stages(model: GoogLeNet, variables: Variables, images: np.ndarray) -> dict[str, np.ndarray]:
    """``endpoints`` and the auxiliary heads at inference, as ``reference.stages``, computed in the images' dtype."""
    dtype = images.dtype.type
    model = model.clone(dtype=dtype, param_dtype=dtype, precision="highest")
    variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
    return {name: np.asarray(x) for name, x in _stages(model, variables, images).items()}


@functools.partial(jax.jit, static_argnums=0)  # here, and not anew in each call: a model is traced once for a shape
def _stages(model: GoogLeNet, variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
    outputs = endpoints(model, variables, images)
    head = InceptionAux(model.num_classes, batch_norm=model.batch_norm, dtype=model.dtype, precision=model.precision)
    for aux, stage in reference.AUX_INPUTS.items() if model.aux_logits else ():
        head_variables = {collection: tree[aux] for collection, tree in variables.items()}
        outputs[aux] = jnp.asarray(head.apply(head_variables, outputs[stage], False))
    return outputs


def relative_error(actual: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference over the largest value; infinite if the shapes differ, NaN if a value is not finite."""
    if actual.shape != truth.shape:
        return math.inf
    if not (np.isfinite(actual).all() and np.isfinite(truth).all()):
        return math.nan
    return float(np.abs(actual - truth).max() / (np.abs(truth).max() or 1.0))


def top5(logits: np.ndarray) -> list[tuple[int, float]]:
    """(class, probability) of the five likeliest classes, the likeliest first; ``logits`` is [num_classes]."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponentials / exponentials.sum()
    return [(int(i), float(probabilities[i])) for i in np.argsort(-logits, kind="stable")[:5]]


def summary(proof: Proof) -> dict[str, dict[str, float | None]]:
    """Stage -> its errors by name, for JSON, which has no infinity (another shape) and no NaN: None stands for both."""
    return {
        stage.name: {
            name: error if math.isfinite(error) else None
            for name, error in (
                ("float64", stage.float64),
                ("pytorch32", stage.pytorch32),
                ("flax32", stage.flax32),
            )
        }
        for stage in proof.stages
    }
