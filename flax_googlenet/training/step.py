"""The training step and the evaluation step: pure functions of a state and a batch."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, no_type_check

import jax
import numpy as np
import optax
from flax import struct
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jaxtyping import ArrayLike, Float, Integer

from flax_googlenet.architecture import HEADS, NETWORKS
from flax_googlenet.inference.compiling import jit
from flax_googlenet.model import (
    MISSING_HEAD,
    GoogLeNet,
    GoogLeNetOutput,
    Variables,
    at_least_float32,
    check_array,
    check_images,
    is_explicit,
    plain_dicts,
)
from flax_googlenet.training.finetune import freeze

Batch = Mapping[str, jax.Array | np.ndarray]
"""``{"image": [N, H, W, 3], "label": int [N]}``: images as for the model, labels from 0 to num_classes - 1.

Labels may also be soft: floating point [N, num_classes], the probability of each class, as mixup makes them.
"""

Metrics = dict[str, jax.Array]
"""Scalars by name."""


@no_type_check  # JAX puts shapes, dtypes and anything else in the places of the arrays
class TrainState(struct.PyTreeNode):
    """The training state, and the static configuration that the step needs.

    Attributes:
        params: The parameters.
        batch_stats: The running statistics of BatchNorm; empty without BatchNorm.
        opt_state: The optimizer's state.
        step: int32, the number of steps taken. A step whose loss or gradient was not finite does not count.
        average: The moving average of ``{"params": ..., "batch_stats": ...}``, or None.
        class_weights: [num_classes], the weight of each class in the loss, or None.
        model: The network.
        optimizer: The gradient transformation, which leaves frozen blocks alone.
        frozen: The names of the blocks that do not train.
        label_smoothing: The share of a label that is spread evenly over all classes.
        aux_weight: The weight of the loss of each auxiliary head.
        average_decay: The weight of the old average in the new one, in the long run.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: optax.OptState
    step: jax.Array
    average: dict[str, Any] | None
    class_weights: jax.Array | None
    model: GoogLeNet = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformationExtraArgs = struct.field(pytree_node=False)
    frozen: tuple[str, ...] = struct.field(pytree_node=False)
    label_smoothing: float = struct.field(pytree_node=False)
    aux_weight: float = struct.field(pytree_node=False)
    average_decay: float | None = struct.field(pytree_node=False)

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables to evaluate and to save: the average if there is one, otherwise the current variables."""
        variables = {"params": self.params, "batch_stats": self.batch_stats} if self.average is None else self.average
        return {name: tree for name, tree in variables.items() if tree}


def create_train_state(
    model: GoogLeNet,
    variables: Variables,
    optimizer: optax.GradientTransformation,
    *,
    frozen: Sequence[str] = (),
    label_smoothing: float = 0.0,
    class_weights: Float[ArrayLike, " num_classes"] | None = None,
    aux_weight: float = 0.3,
    average_decay: float | None = None,
) -> TrainState:
    """Return the state before the first step.

    Args:
        model: The network.
        variables: Its variables. They are copied, because ``train_step`` donates the arrays of its state.
        optimizer: An optax optimizer that needs only the gradient and, as ``value``, the loss. For example,
            ``optax.contrib.reduce_on_plateau`` in an ``optax.chain`` uses the loss. With
            ``optax.MultiSteps(...).gradient_transformation()``, each call of ``train_step`` accumulates one gradient.
        frozen: Names of blocks that do not train. A step changes neither their parameters, not even by weight decay,
            nor their BatchNorm statistics, by which they normalise.
        label_smoothing: The share of a label that is spread evenly over all classes, as in
            ``torch.nn.CrossEntropyLoss``.
        class_weights: The weight of each class in the loss of every head, as ``weight`` in
            ``torch.nn.CrossEntropyLoss``. As there, the loss is the weighted mean over the batch, but with soft labels
            the sum divided by N. None gives all classes the same weight.
        aux_weight: The weight of the loss of each auxiliary head; 0.3 in the paper.
        average_decay: The decay of an exponential moving average of parameters and BatchNorm statistics, which
            ``eval_step`` then uses. The decay starts at ``(1 + step) / (10 + step)`` if that is less, so that the
            average soon forgets the initial parameters. None keeps no average.

    Raises:
        TypeError: If ``frozen`` is a string.
        ValueError: If the heads in the variables do not fit the model; if ``frozen`` has a name that no block of the
            parameters has; if ``class_weights`` has another shape than [num_classes]; if the optimizer needs more than
            the gradient and the loss, as ``optax.lbfgs`` does.
    """
    variables = plain_dicts(variables)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    _check_heads(model, params)
    if class_weights is not None and jnp.shape(class_weights) != (model.num_classes,):
        shape = jnp.shape(class_weights)
        raise ValueError(
            f"class_weights: expected one weight for each of {model.num_classes} classes, got shape {shape}"
        )
    optimizer = optax.with_extra_args_support(freeze(optimizer, frozen))
    opt_state = jax.jit(optimizer.init)(params)  # without jit, JAX compiles for each shape of a parameter: 8 seconds
    _check_needs(optimizer, opt_state, params)
    state = TrainState(
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        step=jnp.asarray(0, jnp.int32),
        average=None if average_decay is None else {"params": params, "batch_stats": batch_stats},
        class_weights=None if class_weights is None else jnp.asarray(class_weights, float),
        model=model,
        optimizer=optimizer,
        frozen=tuple(frozen),
        label_smoothing=label_smoothing,
        aux_weight=aux_weight,
        average_decay=average_decay,
    )
    return jax.tree.map(jnp.array, state)  # copies, so that no buffer is the caller's or donated twice


def train_step(state: TrainState, batch: Batch, dropout_key: jax.Array) -> tuple[TrainState, Metrics]:
    """Take one training step: update the parameters, the statistics, the optimizer's state and the average.

    The function is compiled, on a CPU with the options that make its convolutions fast. It donates the arrays of
    ``state``, which cannot be used afterwards. Inside the caller's ``jax.jit`` it is part of the caller's program.

    Example::

        state = create_train_state(model, variables, optax.sgd(0.01, momentum=0.9))
        for batch in batches:
            state, metrics = train_step(state, batch, jax.random.key(0))

    Args:
        state: The state before the step.
        batch: The images and their labels. A label that is not a class makes the loss NaN.
        dropout_key: A random key. It may be the same in every step, because the number of the step is folded in.

    Returns:
        The state after the step, and scalars: ``loss``, which is minimised, with auxiliary heads and label smoothing;
        ``accuracy`` of the outputs in training, where the likeliest class of a soft label counts; ``grad_norm``, the
        Euclidean norm of the gradient; and ``finite``. If the loss or the gradient is not finite, ``finite`` is False
        and the returned state equals ``state`` in every bit.

    Raises:
        TypeError: If the batch is not a mapping, the images or labels are not arrays of JAX or NumPy, or
            ``dropout_key`` is not a random key.
        ValueError: If the batch has no images or no labels, or their shapes and dtypes are not those of ``Batch``; if
            the state has been given to ``train_step`` before.
    """
    _check_key(dropout_key)
    return _train_step(state, _checked(state, batch), dropout_key)


@functools.partial(jit, donate_argnums=0)
def _train_step(state: TrainState, batch: dict[str, jax.Array], dropout_key: jax.Array) -> tuple[TrainState, Metrics]:
    state = _on_mesh_of(batch["image"], state)

    def objective(params: dict[str, Any]) -> tuple[jax.Array, tuple[jax.Array, dict[str, Any]]]:
        # Saves the backward pass into frozen blocks, and below the lowest block that trains.
        params = {k: jax.lax.stop_gradient(v) if k in state.frozen else v for k, v in params.items()}
        output: Any
        output, updates = state.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            frozen=state.frozen,
            rngs={"dropout": jax.random.fold_in(dropout_key, state.step)},
            mutable=["batch_stats"],
        )
        return _loss(state, output, batch["label"]), (output.logits, updates.get("batch_stats", {}))

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    grad_norm = optax.tree.norm(jax.tree.map(_float32, grads))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    with jax.numpy_dtype_promotion("standard"):  # optax's schedules and MultiSteps mix integers with floats
        updates, opt_state = state.optimizer.update(grads, state.opt_state, state.params, value=loss)
    params, step = optax.apply_updates(state.params, updates), state.step + 1
    new_state = state.replace(
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        step=step,
        average=_average(state, {"params": params, "batch_stats": batch_stats}, step),
    )
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
    accuracy = _hits(logits, batch["label"], 1).mean(dtype=jnp.float32)
    return new_state, {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm, "finite": finite}


def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Return the loss and the accuracies of one batch at inference, with ``state.eval_variables``.

    Args:
        state: The state, which is not donated.
        batch: The images and their labels. Rows with the label -1 only fill up the batch and do not count.

    Returns:
        Scalars: ``count``, int32, the number of rows that count, and the means over these rows of ``loss``, the cross
        entropy of the main head without label smoothing and class weights, of ``accuracy`` and of ``top5``. All are 0
        if no row counts.

    Raises:
        TypeError, ValueError: For the same reasons as ``train_step``.
    """
    return _eval_step(state, _checked(state, batch))


@jit
def _eval_step(state: TrainState, batch: dict[str, jax.Array]) -> Metrics:
    state = _on_mesh_of(batch["image"], state)
    output: Any = state.model.apply(state.eval_variables, batch["image"])
    logits = _float32(output.logits)
    labels = batch["label"]
    counts = jnp.ones(len(labels), bool) if _are_soft(labels) else labels >= 0
    count = counts.sum(dtype=jnp.int32)

    def mean(values: jax.Array) -> jax.Array:
        total = jnp.where(counts, values.astype(logits.dtype), 0).sum()
        return total / jnp.maximum(count, 1).astype(logits.dtype)

    return {
        "loss": mean(cross_entropy(logits, labels)),
        "accuracy": mean(_hits(logits, labels, 1)),
        "top5": mean(_hits(logits, labels, 5)),
        "count": count,
    }


def cross_entropy(
    logits: Float[ArrayLike, "n classes"],
    labels: Integer[ArrayLike, " n"] | Float[ArrayLike, "n classes"],
    label_smoothing: float = 0.0,
    class_weights: Float[ArrayLike, " classes"] | None = None,
) -> Float[jax.Array, " n"]:
    """Return the cross entropy of each row, in float32 at least.

    The values are those of ``torch.nn.CrossEntropyLoss(weight=class_weights, label_smoothing=..., reduction="none")``.
    A label that is not a class gives NaN; -1 is not taken for the last class.

    Args:
        logits: The logits.
        labels: The class of each row, or the probability of each class in each row.
        label_smoothing: The share of a label that is spread evenly over all classes.
        class_weights: The weight of each class.

    Raises:
        TypeError: If ``labels`` is not an array of JAX or NumPy.
        ValueError: If ``labels`` has another shape or dtype.
    """
    logits = jnp.asarray(logits)
    _check_labels(labels, logits.shape)
    costs = -jax.nn.log_softmax(_float32(logits))  # [n, classes]
    if class_weights is not None:
        costs *= jnp.asarray(class_weights, costs.dtype)[None]
    targets = _probabilities(jnp.asarray(labels), costs)  # [n, classes]
    return (((1 - label_smoothing) * targets + label_smoothing / costs.shape[-1]) * costs).sum(-1)


def _loss(state: TrainState, output: GoogLeNetOutput, labels: jax.Array) -> jax.Array:
    def mean(logits: jax.Array) -> jax.Array:
        rows = cross_entropy(logits, labels, state.label_smoothing, state.class_weights)  # [n]
        if state.class_weights is None or _are_soft(labels):
            return rows.mean()
        weights = _probabilities(labels, _float32(logits)) * state.class_weights.astype(rows.dtype)[None]
        return rows.sum() / weights.sum()

    heads = [mean(logits) for logits in output if logits is not None]
    return heads[0] + state.aux_weight * sum(heads[1:])


def _are_soft(labels: jax.Array) -> bool:
    return labels.ndim == 2


def _probabilities(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Return the labels as [n, classes] of the logits' dtype. A label that is not a class gives a row of NaN."""
    if _are_soft(labels):
        return labels.astype(logits.dtype)
    num_classes = logits.shape[-1]
    labels = labels.astype(jnp.int32)  # 8 bits would be too few for all classes
    labels = jnp.where(labels < 0, num_classes, labels)  # an index of -1 would be the last class
    # A lookup beyond the classes gives NaN, any other 0. With jnp.nan in a jnp.where instead, jax_debug_nans would stop
    # every batch that is computed without jax.jit.
    zero = jnp.take_along_axis(jnp.zeros_like(logits), labels[:, None], axis=-1, mode="fill")  # [n, 1]
    return jax.nn.one_hot(labels, num_classes, dtype=logits.dtype) + zero  # [n, classes]


def _hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Return whether each label is among the ``k`` likeliest classes of its row: bool [N]."""
    _, likeliest = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    labels = labels.argmax(-1) if _are_soft(labels) else labels
    return (likeliest == labels.astype(jnp.int32)[:, None]).any(-1)


def _on_mesh_of(images: jax.Array, state: TrainState) -> TrainState:
    """Return the state on all devices of the images' mesh if its axes are explicit. JAX does not move it by itself."""
    if not is_explicit(images):
        return state
    everywhere = NamedSharding(jax.typeof(images).sharding.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if is_explicit(x) else reshard(x, everywhere), state)


def _average(state: TrainState, variables: dict[str, Any], step: jax.Array) -> dict[str, Any] | None:
    if state.average_decay is None:
        return None
    steps = step.astype(float)  # float64 if JAX has 64 bits enabled
    # The rule of tf.train.ExponentialMovingAverage with num_updates, with which Inception was trained.
    weight = 1 - jnp.minimum(state.average_decay, (1 + steps) / (10 + steps))
    return jax.tree.map(lambda old, new: old + weight.astype(old.dtype) * (new - old), state.average, variables)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(at_least_float32(x.dtype))


def _check_heads(model: GoogLeNet, params: Mapping[str, Any]) -> None:
    for name in HEADS:
        if name in params:
            layer = params[name] if name == "fc" else params[name]["fc2"]
            classes = layer["kernel"].shape[-1]
            if classes != model.num_classes:
                raise ValueError(
                    f"the variables' {name} is for {classes} classes and the model for {model.num_classes}: use "
                    f"new_head(model, variables, {model.num_classes}, jax.random.key(0))"
                )
        elif name == "fc" or model.aux_logits:
            raise ValueError(MISSING_HEAD.format(name))


def _check_needs(optimizer: optax.GradientTransformationExtraArgs, opt_state: optax.OptState, params: Any) -> None:
    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(optimizer.update, params, opt_state, params, value=jnp.float32(0))
    except TypeError as error:  # a keyword argument is missing
        raise ValueError(
            f"optimizer: train_step passes the gradient and the loss, and this optimizer needs more ({error}): choose "
            "one without a line search, such as optax.sgd"
        ) from error


def _checked(state: TrainState, batch: Any) -> dict[str, Any]:
    """Check that a step can take the batch and the state, in microseconds; return the images and the labels."""
    wanted = 'expected a batch {"image": [N, H, W, 3], "label": int [N]}'
    if not isinstance(batch, Mapping):
        raise TypeError(f'{wanted}, got a {type(batch).__name__}: pass {{"image": images, "label": labels}}')
    if missing := [name for name in ("image", "label") if name not in batch]:
        raise ValueError(
            f"{wanted}, got one without {' and '.join(missing)}; its keys are {', '.join(map(str, batch))}"
        )
    check_images(batch["image"], NETWORKS[state.model.variant].min_size)
    _check_labels(batch["label"], (batch["image"].shape[0], state.model.num_classes))
    step = state.step  # in a state from a file, it may be an array of NumPy
    if isinstance(step, jax.Array) and not isinstance(step, jax.core.Tracer) and step.is_deleted():
        raise ValueError(
            "the arrays of this state were donated to an earlier train_step: continue with the state that it returned, "
            "as in state, metrics = train_step(state, batch, key)"
        )
    return {name: batch[name] for name in ("image", "label")}


def _check_labels(labels: Any, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError, with the way out, unless ``labels`` fit logits of ``shape``, [N, num_classes]."""
    check_array(labels, "labels")
    is_integer, is_floating = (jnp.issubdtype(labels.dtype, kind) for kind in (jnp.integer, jnp.floating))
    if (is_integer and labels.shape == shape[:1]) or (is_floating and labels.shape == shape):
        return
    way_out = "there must be one for each image"
    if labels.shape == shape:
        way_out = "use labels.argmax(-1)"
    elif labels.shape == (shape[0], 1):
        way_out = "use labels[:, 0]"
    elif is_floating and labels.shape == shape[:1]:
        way_out = "use labels.astype(numpy.int32)"
    raise ValueError(
        f"expected labels int [{shape[0]}], or soft labels floating point [{shape[0]}, {shape[1]}], got {labels.dtype} "
        f"of shape {labels.shape}: {way_out}"
    )


def _check_key(key: Any) -> None:
    if isinstance(key, jax.Array | np.ndarray):
        is_typed, is_raw = jnp.issubdtype(key.dtype, jax.dtypes.prng_key), key.dtype == jnp.uint32
        if (is_typed and key.ndim == 0) or (is_raw and key.ndim == 1):
            return
        kind = f"{key.dtype} of shape {key.shape}"
    else:
        kind = type(key).__name__
    raise TypeError(f"dropout_key: expected one random key such as jax.random.key(0), got {kind}")
