"""The map between torchvision's state dict and Flax variables, in both directions, without torch.

Module names are torchvision's, so only this differs: ``branch2.0`` is ``branch2_0``, the tensors of a layer have Flax's
names (``NAMES``), and kernels have Flax's order of axes (``TORCH_AXES``).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.model import GoogLeNet, Variables, variable_shapes

NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
"""Flax's name of a tensor -> PyTorch's."""

TORCH_AXES = {
    4: (3, 2, 0, 1),  # convolution: HWIO -> OIHW
    2: (1, 0),  # linear: [in, out] -> [out, in]
    1: (0,),
}
"""Number of axes -> the transposition from Flax to PyTorch."""

_COUNTER = "num_batches_tracked"  # PyTorch counts steps with it; no result depends on it while momentum is a number
_FIRST = "conv1.conv.weight"  # by its end a state dict is known whatever is put before its names

VariablePath = tuple[str, ...]


class PortingError(GoogLeNetError, ValueError):
    """Weights that are not those of a GoogLeNet.

    ``problems`` lists every offender by kind. It is empty where the weights are only wrapped in something, and the
    message says how to unwrap them.
    """

    def __init__(self, message: str, problems: Mapping[str, list[str]] = MappingProxyType({})) -> None:
        self.problems = {kind: names for kind, names in problems.items() if names}
        super().__init__("\n".join([message, *(f"{kind}: {names}" for kind, names in self.problems.items())]))


def from_torchvision(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a state dict of ``torchvision.models.googlenet`` into the variables of ``GoogLeNet``.

    Args:
        state_dict: torchvision's names -> arrays of any floating dtype, ``ml_dtypes.bfloat16`` included, or CPU tensors
            of a dtype that NumPy has (for a bfloat16 tensor, call ``.float()`` first). Any number of classes, with or
            without the auxiliary heads (``aux1``, ``aux2``) and ``num_batches_tracked``.

    Returns:
        ``{"params": ..., "batch_stats": ...}``, nested dicts of NumPy arrays that share no memory with the state dict.
        The dtypes are kept. They fit ``GoogLeNet(num_classes, aux_logits)``, aux_logits being whether the heads are
        there.

    Raises:
        PortingError: if anything is missing, unexpected, of the wrong shape, not floating point, not finite, or a
            variance is negative: the message lists all of it. Also for a model, for a training checkpoint around the
            state dict, and for names with a prefix: the message says what to pass instead.

    Example::

        variables = from_torchvision(torchvision.models.googlenet(weights="IMAGENET1K_V1").state_dict())
    """
    _check_unwrapped(state_dict)
    arrays, unreadable = {}, {}
    for key, value in state_dict.items():
        try:
            arrays[key] = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, with a gradient, of bfloat16
            unreadable[key] = str(error)
    bias = arrays.get("fc.bias", np.empty(1000))
    has_aux = any(key.startswith(("aux1.", "aux2.")) for key in state_dict)
    shapes = _shapes(GoogLeNet(num_classes=bias.size or 1000, aux_logits=has_aux))
    torch_shapes = {torch_key(path): _torch_shape(shape) for path, shape in shapes.items()}
    counters = {key.rsplit(".", 1)[0] + f".{_COUNTER}" for key in torch_shapes if key.endswith(".running_mean")}
    tensors = {key: array for key, array in arrays.items() if key not in counters}
    _check("the state dict", tensors, torch_shapes, unreadable)

    # A copy, also where nothing is transposed: training the original must not change the port.
    return unflatten_dict(
        {
            path: np.array(tensors[torch_key(path)].transpose(np.argsort(TORCH_AXES[len(shape)])), order="C")
            for path, shape in shapes.items()
        }
    )


def to_torchvision(variables: Variables) -> dict[str, np.ndarray]:
    """Turns the variables of ``GoogLeNet`` into a complete state dict of ``torchvision.models.googlenet``.

    Args:
        variables: ``{"params": ..., "batch_stats": ...}``, with or without the auxiliary heads.

    Returns:
        torchvision's names -> arrays of the same dtypes, bit for bit what ``from_torchvision`` had, with a
        ``num_batches_tracked`` of 0 for every BatchNorm. ``load_state_dict(strict=True)`` takes it once the arrays are
        tensors: ``{key: torch.from_numpy(array) for key, array in state_dict.items()}`` (not for bfloat16, which
        ``torch.from_numpy`` does not know).

    Raises:
        PortingError: as ``from_torchvision``; also for a folded network, for which torchvision has no place.
    """
    arrays = {path: np.asarray(value) for path, value in flatten_dict(dict(variables)).items()}
    bias = arrays.get(("params", "fc", "bias"), np.empty(1000))
    has_aux = any(path[1:2] in (("aux1",), ("aux2",)) for path in arrays)
    shapes = _shapes(GoogLeNet(num_classes=bias.size or 1000, aux_logits=has_aux))
    _check(
        "the tree of variables",
        {"/".join(path): array for path, array in arrays.items()},
        {"/".join(path): shape for path, shape in shapes.items()},
    )

    state_dict = {}
    for path in shapes:
        key = torch_key(path)
        state_dict[key] = np.array(arrays[path].transpose(TORCH_AXES[arrays[path].ndim]), order="C")
        if key.endswith(".running_var"):
            state_dict[key.replace("running_var", _COUNTER)] = np.array(0, np.int64)
    return state_dict


def torch_key(path: VariablePath) -> str:
    """The name in a state dict of the variable at a path.

    ``("params", "inception3a", "branch2_0", "conv", "kernel")`` is ``inception3a.branch2.0.conv.weight``.
    """
    _, *modules, name = path
    return ".".join([*(re.sub(r"^(branch\d)_(\d)$", r"\1.\2", module) for module in modules), NAMES[name]])


def _check_unwrapped(state_dict: Mapping[str, Any]) -> None:
    """Raises PortingError for what usually stands around a state dict: a model, a training checkpoint, DataParallel."""
    if not isinstance(state_dict, Mapping):
        raise PortingError(f"expected a state dict, got {type(state_dict).__name__}: pass model.state_dict()")
    for name, value in state_dict.items():
        if isinstance(value, Mapping) and any(str(key).endswith(_FIRST) for key in value):
            raise PortingError(f"this is a checkpoint around a state dict: pass checkpoint[{name!r}]")
    prefixes = {key.removesuffix(_FIRST) for key in state_dict if key.endswith(_FIRST)}
    if len(prefixes) == 1 and (prefix := prefixes.pop()):
        raise PortingError(
            f"the names begin with {prefix!r}: pass "
            f"{{name.removeprefix({prefix!r}): x for name, x in state_dict.items() if name.startswith({prefix!r})}}"
        )


def _shapes(model: GoogLeNet) -> dict[VariablePath, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(variable_shapes(model)).items()}


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in TORCH_AXES[len(shape)])


def _check(
    subject: str,
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    unreadable: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raises one PortingError with all that keeps ``arrays`` from having exactly ``shapes``, and sound values."""
    known = {name: array for name, array in arrays.items() if name in shapes}
    # Values are read only where the shape is right: an array that repeats its memory can claim any size.
    sound = {
        name: array
        for name, array in known.items()
        if array.shape == shapes[name] and jnp.issubdtype(array.dtype, jnp.floating)
    }
    problems = {
        "unreadable": [f"{name} ({reason})" for name, reason in unreadable.items()],
        "missing": [name for name in shapes if name not in arrays and name not in unreadable],
        "unexpected": [name for name in arrays if name not in shapes],
        "wrong shape": [
            f"{name} {array.shape}, expected {shapes[name]}"
            for name, array in known.items()
            if array.shape != shapes[name]
        ],
        "not floating point": [
            f"{name} {array.dtype}" for name, array in known.items() if not jnp.issubdtype(array.dtype, jnp.floating)
        ],
        "not finite": [name for name, array in sound.items() if not np.isfinite(array).all()],
        "negative variance": [name for name, array in sound.items() if name.endswith("var") and (array < 0).any()],
    }
    if any(problems.values()):
        raise PortingError(f"{subject} is not a GoogLeNet's:", problems)
