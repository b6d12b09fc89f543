"""Fine-tuning: new heads with their own learning rate, frozen blocks, class weights, new BatchNorm statistics."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp
from jaxtyping import Float, Int

from flax_googlenet.model import HEADS, MIN_SIZE, BatchNorm, GoogLeNet, Variables, check_frozen, plain_dicts

_LAST_LAYERS = (("fc",), ("aux1", "fc2"), ("aux2", "fc2"))


def new_head(
    model: GoogLeNet, variables: Variables, num_classes: int, key: jax.Array
) -> tuple[GoogLeNet, dict[str, Any]]:
    """The network for another number of classes: its last layers start anew, all else is kept.

    Args:
        model: the network.
        variables: its variables; without auxiliary heads, none are added.
        num_classes: number of logits.
        key: a random key.

    Returns:
        The network, and its variables: ``fc`` and the ``fc2`` of the auxiliary heads start anew, as ``model.init`` has
        them, and the other arrays are those that were given.
    """
    model, variables = model.clone(num_classes=num_classes), plain_dicts(variables)
    params = flatten_dict(variables["params"])
    replaced = [path for path in params if path[:-1] in _LAST_LAYERS]

    @jax.jit  # the layers that are kept are not computed
    def init(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        images = jnp.zeros((1, MIN_SIZE, MIN_SIZE, 3), jnp.float32)
        initial = flatten_dict(model.clone(aux_logits=True).init(key, images)["params"])
        return {path: initial[path] for path in replaced}

    return model, {**variables, "params": unflatten_dict(params | init(key))}


def reorder_head(variables: Variables, order: Int[np.ndarray, "num_classes"]) -> dict[str, Any]:
    """Return the variables of the same network with its classes in another order.

    Args:
        variables: the variables, with or without auxiliary heads.
        order: for each class of the result, its place in ``variables``.
    """
    params = flatten_dict(dict(variables["params"]))
    params = {path: x[..., order] if path[:-1] in _LAST_LAYERS else x for path, x in params.items()}
    return {**variables, "params": unflatten_dict(params)}


def freeze(optimizer: optax.GradientTransformation, frozen: Sequence[str]) -> optax.GradientTransformation:
    """The optimizer for all blocks but those named, which it leaves as they are, and of which it keeps no state.

    ``create_train_state`` applies it to its ``frozen``. A zero gradient would not do: weight decay goes on then.

    Args:
        optimizer: the one of the other blocks.
        frozen: names in the first level of the parameters.

    Raises:
        TypeError: by the optimizer's ``init``, if ``frozen`` is a string.
        ValueError: by the optimizer's ``init``, if the parameters have no block of such a name.
    """
    if not frozen:
        return optimizer

    def labels(params: Mapping[str, Any]) -> dict[str, str]:
        check_frozen(frozen, params)
        return {name: "frozen" if name in frozen else "trained" for name in params}

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def scale_heads(optimizer: optax.GradientTransformation, multiple: float) -> optax.GradientTransformation:
    """The optimizer with another learning rate for the heads, ``fc``, ``aux1`` and ``aux2``: a multiple of its own.

    It multiplies their updates, as the learning rate of a parameter group does in PyTorch.
    """
    return optax.chain(optimizer, optax.masked(optax.scale(multiple), lambda params: {k: k in HEADS for k in params}))


def balanced_class_weights(labels: Int[np.ndarray, " n"], num_classes: int) -> Float[np.ndarray, " num_classes"]:
    """Return weights for ``create_train_state`` that make all classes count alike, however few images they have.

    A class with ``n_c`` of the ``n`` images gets ``n / (num_classes * n_c)``, as in scikit-learn's
    ``compute_class_weight("balanced")``; a class without images is taken to have one.

    Args:
        labels: the label of each training image.
        num_classes: number of classes.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return len(labels) / (num_classes * np.maximum(counts, 1))


def reestimate_batch_norm(
    model: GoogLeNet, variables: Variables, batches: Iterable[Mapping[str, Any]], frozen: Sequence[str] = ()
) -> dict[str, Any]:
    """New running statistics: the mean of those of the batches, as ``torch.optim.swa_utils.update_bn`` does it.

    For weights that meet other images than they were trained on, or that are an average of several.

    Args:
        model: the network.
        variables: its variables.
        batches: batches with an ``image`` [N, H, W, 3] as for the model, all of one size.
        frozen: names of blocks that keep their statistics.

    Returns:
        The variables with the new statistics.

    Raises:
        ValueError: if there is no batch.
    """
    model, variables = model.clone(dropout=0.0, dropout_aux=0.0), plain_dicts(variables)
    kept = {name: stats for name, stats in variables["batch_stats"].items() if name in frozen}
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"]) | kept

    @jax.jit
    def statistics(images: jax.Array) -> dict[str, Any]:
        _, updates = model.apply(
            {**variables, "batch_stats": zeros}, images, train=True, frozen=frozen, mutable=["batch_stats"]
        )
        # From zeros a step takes 1 - momentum of the batch's statistics: the whole of them again.
        stats = jax.tree.map(lambda x: x / (1 - BatchNorm.momentum), updates["batch_stats"])
        return stats | kept

    mean, count = zeros, 0
    for count, batch in enumerate(batches, start=1):
        mean = jax.tree.map(lambda old, new, n=count: old + (new - old) / n, mean, statistics(batch["image"]))
    if not count:
        raise ValueError("BatchNorm statistics can be estimated from one batch at least, got none")
    return {**variables, "batch_stats": mean}
