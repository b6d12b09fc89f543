"""Fine-tuning: new heads with their own learning rate, frozen blocks, class weights, new BatchNorm statistics."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp
from jaxtyping import Float, Int

from flax_googlenet.architecture import HEADS, NETWORKS
from flax_googlenet.model import BatchNorm, GoogLeNet, Variables, check_frozen, plain_dicts

_LAST_LAYERS = (("fc",), ("aux1", "fc2"), ("aux2", "fc2"))


def new_head(
    model: GoogLeNet, variables: Variables, num_classes: int, key: jax.Array
) -> tuple[GoogLeNet, dict[str, Any]]:
    """Return the network for another number of classes, with new last layers and everything else kept.

    Args:
        model: The network.
        variables: Its variables, with or without auxiliary heads.
        num_classes: Number of logits.
        key: A random key.

    Returns:
        The network and its variables. ``fc``, and ``fc2`` of the auxiliary heads in ``variables``, are initialised as
        by ``model.init``. The other arrays are the given ones.
    """
    model, variables = model.clone(num_classes=num_classes), plain_dicts(variables)
    params = flatten_dict(variables["params"])
    min_size = NETWORKS[model.variant].min_size
    replaced = [path for path in params if path[:-1] in _LAST_LAYERS]

    @jax.jit  # leaves out what is not returned: the kept layers are not computed
    def init(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        images = jnp.zeros((1, min_size, min_size, 3), jnp.float32)
        initial = flatten_dict(model.clone(aux_logits=True).init(key, images)["params"])
        return {path: initial[path] for path in replaced}

    return model, {**variables, "params": unflatten_dict(params | init(key))}


def reorder_head(variables: Variables, order: Int[np.ndarray, "num_classes"]) -> dict[str, Any]:
    """Return the variables of the same network with its classes in another order.

    Args:
        variables: The variables, with or without auxiliary heads.
        order: For each class of the result, its number in ``variables``.
    """
    params = flatten_dict(dict(variables["params"]))
    params = {path: x[..., order] if path[:-1] in _LAST_LAYERS else x for path, x in params.items()}
    return {**variables, "params": unflatten_dict(params)}


def freeze(optimizer: optax.GradientTransformation, frozen: Sequence[str]) -> optax.GradientTransformation:
    """Return the optimizer for all blocks but the frozen ones, which it does not change and keeps no state for.

    ``create_train_state`` calls it. A zero gradient would not be enough, because weight decay would go on.

    Args:
        optimizer: The optimizer of the other blocks.
        frozen: Names of blocks, in the first level of the parameters.

    Raises:
        TypeError: In the returned optimizer's ``init``, if ``frozen`` is a string.
        ValueError: In the returned optimizer's ``init``, if ``frozen`` has a name that no block of the parameters has.
    """
    if not frozen:
        return optimizer

    def labels(params: Mapping[str, Any]) -> dict[str, str]:
        check_frozen(frozen, params)
        return {name: "frozen" if name in frozen else "trained" for name in params}

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def scale_heads(optimizer: optax.GradientTransformation, multiple: float) -> optax.GradientTransformation:
    """Return the optimizer with a multiple of its learning rate for the heads, ``fc``, ``aux1`` and ``aux2``.

    It multiplies their updates, as the learning rate of a parameter group does in PyTorch.
    """
    return optax.chain(optimizer, optax.masked(optax.scale(multiple), lambda params: {k: k in HEADS for k in params}))


def balanced_class_weights(labels: Int[np.ndarray, " n"], num_classes: int) -> Float[np.ndarray, " num_classes"]:
    """Return ``class_weights`` for ``create_train_state`` with which all classes weigh the same in the loss.

    A class with ``n_c`` of the ``n`` images gets the weight ``n / (num_classes * n_c)``, as in scikit-learn's
    ``compute_class_weight("balanced")``. A class without images gets the weight of a class with one image.

    Args:
        labels: The label of each training image.
        num_classes: Number of classes.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return len(labels) / (num_classes * np.maximum(counts, 1))


def reestimate_batch_norm(
    model: GoogLeNet, variables: Variables, batches: Iterable[Mapping[str, Any]], frozen: Sequence[str] = ()
) -> dict[str, Any]:
    """Estimate the running statistics anew, as the mean over batches, like ``torch.optim.swa_utils.update_bn``.

    Use it for weights that are an average of several, or that will see other images than in training.

    Args:
        model: The network.
        variables: Its variables.
        batches: Batches with an ``image`` [N, H, W, 3] as for the model, all of one size.
        frozen: Names of blocks that keep their statistics.

    Returns:
        The variables with the new statistics.

    Raises:
        ValueError: If there is no batch, or the network has no BatchNorm.
    """
    if not model.batch_norm:
        raise ValueError("the network has no BatchNorm, and so no statistics to estimate")
    model, variables = model.clone(dropout=0.0, dropout_aux=0.0), plain_dicts(variables)
    kept = {name: stats for name, stats in variables["batch_stats"].items() if name in frozen}
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"]) | kept
    start = {**variables, "batch_stats": zeros}

    @jax.jit
    def statistics(images: jax.Array) -> dict[str, Any]:
        _, updates = model.apply(start, images, train=True, frozen=frozen, mutable=["batch_stats"])
        # An update that starts from zeros gives 1 - momentum times the statistics of the batch.
        stats = jax.tree.map(lambda x: x / (1 - BatchNorm.momentum), updates["batch_stats"])
        return stats | kept

    mean, count = zeros, 0
    for count, batch in enumerate(batches, start=1):
        mean = jax.tree.map(lambda old, new, n=count: old + (new - old) / n, mean, statistics(batch["image"]))
    if not count:
        raise ValueError("batches: expected one batch or more to estimate BatchNorm statistics from, got none")
    return {**variables, "batch_stats": mean}
