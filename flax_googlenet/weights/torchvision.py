"""Maps torchvision's state dict to Flax variables and back, without torch.

The names of modules are torchvision's, with three differences: ``branch2.0`` is ``branch2_0``, the tensors of a layer
have Flax's names (``NAMES``), and the axes of kernels have Flax's order (``TORCH_AXES``).
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
from flax_googlenet.weights.checks import tensor_problems, with_problems

NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
"""Flax's name of a tensor -> PyTorch's name."""

TORCH_AXES = {
    4: (3, 2, 0, 1),  # convolution: HWIO -> OIHW
    2: (1, 0),  # linear: [in, out] -> [out, in]
    1: (0,),
}
"""Number of axes -> permutation from Flax's order to PyTorch's."""

_COUNTER = "num_batches_tracked"  # counts training steps; no result depends on it, because momentum is a number
_FIRST = "conv1.conv.weight"  # a state dict is recognised by a name with this ending, whatever its prefix

VariablePath = tuple[str, ...]


class PortingError(GoogLeNetError, ValueError):
    """Weights that do not belong to a GoogLeNet.

    ``problems`` lists all tensors that are wrong by the kind of problem. It is empty if the weights are only wrapped
    in something; the message then says how to unwrap them. ``advice`` says what to do about a known cause; it is empty
    if the cause is not known.
    """

    def __init__(
        self, message: str, problems: Mapping[str, list[str]] = MappingProxyType({}), advice: str = ""
    ) -> None:
        super().__init__("\n".join(filter(None, [with_problems(message, problems), advice])))
        self.problems = {kind: names for kind, names in problems.items() if names}
        self.advice = advice


def from_torchvision(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state dict of ``torchvision.models.googlenet`` to the variables of ``GoogLeNet``.

    Args:
        state_dict: torchvision's names -> arrays of any floating dtype, including ``ml_dtypes.bfloat16``, or CPU
            tensors of a dtype that NumPy has (call ``.float()`` on a bfloat16 tensor first). The number of classes is
            free; the auxiliary heads (``aux1``, ``aux2``) and ``num_batches_tracked`` are optional.

    Returns:
        ``{"params": ..., "batch_stats": ...}``, nested dicts of NumPy arrays in the same dtypes, which share no memory
        with the state dict. They fit ``GoogLeNet(num_classes, aux_logits)``, where ``aux_logits`` is whether the state
        dict has auxiliary heads.

    Raises:
        PortingError: If a tensor is missing, unexpected, of the wrong shape, not floating point or not finite, or if a
            variance is negative. The message lists all such tensors. Also for a model, a training checkpoint that
            contains a state dict, and names with a prefix; the message then says what to pass instead.

    Example::

        variables = from_torchvision(torchvision.models.googlenet(weights="IMAGENET1K_V1").state_dict())
    """
    _check_unwrapped(state_dict)
    arrays, unreadable = {}, {}
    for key, value in state_dict.items():
        try:
            arrays[key] = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, with a gradient or in bfloat16
            unreadable[key] = str(error)
    bias = arrays.get("fc.bias", np.empty(1000))
    has_aux = any(key.startswith(("aux1.", "aux2.")) for key in state_dict)
    shapes = shapes_by_path(GoogLeNet(num_classes=bias.size or 1000, aux_logits=has_aux))
    counters = {torch_key(path).replace("running_mean", _COUNTER) for path in shapes if path[-1] == "mean"}
    tensors = {key: array for key, array in arrays.items() if key not in counters}
    return to_variables("the state dict", tensors, shapes, unreadable)


def to_variables(
    subject: str,
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[VariablePath, tuple[int, ...]],
    unreadable: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Convert arrays under PyTorch's names, and with its axes, to the variables of a network.

    Args:
        subject: What has the arrays, in messages.
        arrays: PyTorch's names -> arrays.
        shapes: The shapes of the network's variables, from ``shapes_by_path``.
        unreadable: PyTorch's names of tensors that are no arrays -> the reason.

    Raises:
        PortingError: If the arrays are not those of the network, for the same reasons as ``from_torchvision``.
    """
    _check(subject, arrays, {torch_key(path): _torch_shape(shape) for path, shape in shapes.items()}, unreadable)
    # Copies even where nothing is transposed, because training the original must not change the port.
    return unflatten_dict(
        {
            path: np.array(arrays[torch_key(path)].transpose(np.argsort(TORCH_AXES[len(shape)])), order="C")
            for path, shape in shapes.items()
        }
    )


def to_torchvision(variables: Variables) -> dict[str, np.ndarray]:
    """Convert the variables of ``GoogLeNet`` to a complete state dict of ``torchvision.models.googlenet``.

    Args:
        variables: ``{"params": ..., "batch_stats": ...}``, with or without the auxiliary heads.

    Returns:
        torchvision's names -> arrays in the same dtypes, with a ``num_batches_tracked`` of 0 for every BatchNorm; all
        other arrays are bit for bit those that ``from_torchvision`` was given. ``load_state_dict(strict=True)`` accepts
        ``{key: torch.from_numpy(array) for key, array in state_dict.items()}`` (``torch.from_numpy`` does not accept
        bfloat16).

    Raises:
        PortingError: If a tensor is wrong, as for ``from_torchvision``. A folded network is also refused, because
            torchvision's has no biases to hold it.
    """
    leaves = flatten_dict(dict(variables))
    bias = np.asarray(leaves.get(("params", "fc", "bias"), np.empty(1000)))
    has_aux = any(path[1:2] in (("aux1",), ("aux2",)) for path in leaves)
    shapes = shapes_by_path(GoogLeNet(num_classes=bias.size or 1000, aux_logits=has_aux))
    state_dict = {}
    for key, array in to_arrays(variables, shapes).items():
        state_dict[key] = array
        if key.endswith(".running_var"):
            state_dict[key.replace("running_var", _COUNTER)] = np.array(0, np.int64)
    return state_dict


def to_arrays(variables: Variables, shapes: Mapping[VariablePath, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Convert the variables of a network to arrays under PyTorch's names, and with its axes, as ``to_variables`` takes.

    Raises:
        PortingError: If the variables do not have ``shapes``, or have wrong values.
    """
    arrays = {path: np.asarray(value) for path, value in flatten_dict(dict(variables)).items()}
    _check(
        "the tree of variables",
        {"/".join(path): array for path, array in arrays.items()},
        {"/".join(path): shape for path, shape in shapes.items()},
    )
    return {
        torch_key(path): np.array(arrays[path].transpose(TORCH_AXES[len(shapes[path])]), order="C") for path in shapes
    }


def torch_key(path: VariablePath) -> str:
    """Return the name of a variable in torchvision's state dict.

    ``("params", "inception3a", "branch2_0", "conv", "kernel")`` is ``inception3a.branch2.0.conv.weight``.
    """
    _, *modules, name = path
    return ".".join([*(re.sub(r"^(branch\d)_(\d)$", r"\1.\2", module) for module in modules), NAMES[name]])


def _check_unwrapped(state_dict: Mapping[str, Any]) -> None:
    """Raise PortingError for a model, a training checkpoint that contains a state dict, and names with a prefix."""
    if not isinstance(state_dict, Mapping):
        raise PortingError(f"expected a state dict, got {type(state_dict).__name__}: pass model.state_dict()")
    for name, value in state_dict.items():
        if isinstance(value, Mapping) and any(str(key).endswith(_FIRST) for key in value):
            raise PortingError(f"this is a checkpoint that contains a state dict: pass checkpoint[{name!r}]")
    prefixes = {key.removesuffix(_FIRST) for key in state_dict if key.endswith(_FIRST)}
    if len(prefixes) == 1 and (prefix := prefixes.pop()):
        raise PortingError(
            f"the names begin with {prefix!r}: pass "
            f"{{name.removeprefix({prefix!r}): x for name, x in state_dict.items() if name.startswith({prefix!r})}}"
        )


def shapes_by_path(model: GoogLeNet) -> dict[VariablePath, tuple[int, ...]]:
    """Return the shapes of the model's variables."""
    return {path: leaf.shape for path, leaf in flatten_dict(variable_shapes(model)).items()}


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in TORCH_AXES[len(shape)])


def _check(
    subject: str,
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    unreadable: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise PortingError unless ``arrays`` have exactly ``shapes`` and valid values; list all that are wrong."""
    shapes = {name: shape for name, shape in shapes.items() if name not in unreadable}
    floating = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    # Values are read only if the shape is right: an array that repeats its memory can claim any size.
    readable = {name: array for name, array in floating.items() if array.shape == shapes.get(name)}
    problems = tensor_problems(arrays, shapes) | {
        "unreadable": [f"{name} ({reason})" for name, reason in unreadable.items()],
        "not floating point": [
            f"{name} {array.dtype}" for name, array in arrays.items() if name in shapes and name not in floating
        ],
        "not finite": [name for name, array in readable.items() if not np.isfinite(array).all()],
        "negative variance": [name for name, array in readable.items() if name.endswith("var") and (array < 0).any()],
    }
    if any(problems.values()):
        raise PortingError(f"{subject} is not a GoogLeNet's:", problems, _advice(problems))


def _advice(problems: Mapping[str, list[str]]) -> str:
    """Return what to do about problems that usual changes of a network cause, or an empty string."""
    unexpected = problems["unexpected"]
    if all(re.match(r"aux\d\.", name) for names in problems.values() for name in names):
        return "only the auxiliary heads are wrong: leave out the names that begin with aux1. or aux2."
    if any(re.search(r"conv[./]bias\Z", name) for name in unexpected):
        return (
            "torchvision's network has BatchNorm where this one has biases of convolutions: "
            "a folded network and the variants of the paper's network cannot be converted"
        )
    if any(name.endswith(("_orig", "_mask")) for name in unexpected):
        return "it was pruned: call torch.nn.utils.prune.remove(module, 'weight') for each module and save it again"
    if head := next(filter(None, (re.match(r"(fc|aux\d\.fc2)\.\d+\.", name) for name in unexpected)), None):
        return (
            f"its head {head[1]} is a Sequential of several layers, and only a single linear layer can be converted: "
            f"if the others are dropout, rename {head[0]}weight to {head[1]}.weight, and the bias likewise"
        )
    return ""
