"""Inference: BatchNorm folded into the convolutions, and a jitted predictor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_googlenet import cpu
from flax_googlenet.model import BatchNorm, GoogLeNet, Variables, check_images, transform_input

Predictor = Callable[[Any], jax.Array]
"""images [N, H, W, 3] -> logits [N, num_classes]"""


def fold_batch_norm(model: GoogLeNet, variables: Variables) -> tuple[GoogLeNet, dict[str, Any]]:
    """The same function without BatchNorm: each convolution takes over the scale and shift that follow it.

    Args:
        model: the network.
        variables: its variables, concrete arrays.

    Returns:
        The network with ``batch_norm=False``, and its variables: NumPy arrays, computed in float64 and rounded once to
        the dtype of the kernels. A network without BatchNorm comes back as it is. The fold is for inference: what
        BatchNorm does in training is gone.
    """
    params = {"params": variables["params"]}
    if model.batch_norm:
        params = {"params": _fold(variables["params"], variables["batch_stats"])}
    return model.clone(batch_norm=False), params


def _fold(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    if "bn" in params:
        kernel = params["conv"]["kernel"]
        scale, bias, mean, var = (
            np.asarray(x, np.float64)
            for x in (params["bn"]["scale"], params["bn"]["bias"], batch_stats["bn"]["mean"], batch_stats["bn"]["var"])
        )
        multiplier = scale / np.sqrt(var + BatchNorm.epsilon)
        folded = {"kernel": np.asarray(kernel, np.float64) * multiplier, "bias": bias - mean * multiplier}
        return {"conv": {name: x.astype(kernel.dtype) for name, x in folded.items()}}
    return {name: _fold(value, batch_stats[name]) if name in batch_stats else value for name, value in params.items()}


def make_predictor(model: GoogLeNet, variables: Variables, devices: Sequence[jax.Device] | None = None) -> Predictor:
    """The fast path: a compiled function from images to logits, of the folded network.

    It takes any number of images and compiles a few sizes of batches alone, each when it is first needed: on a CPU a
    batch is cut into them, elsewhere it is padded to a power of two. On a CPU a graph tuned for it computes, in
    ``flax_googlenet.cpu``, and the result is ready when the call returns. Any number of threads may call it at once.
    Under ``jax.jit``, ``jax.vmap`` and ``jax.grad`` it is part of what they trace.

    Example::

        predict = make_predictor(model, variables)
        logits = predict(images)

    Args:
        model: the network.
        variables: its variables, concrete arrays; those of the auxiliary heads are not used.
        devices: the devices, of one platform, over which each batch is split; by default all that JAX shows. With
            ``jax.config.update("jax_num_cpu_devices", 2)`` a CPU counts as two.

    Returns:
        Images, floating point [N, H, W, 3] as for the model, to logits [N, num_classes] of the model's dtype.

    Raises:
        ValueError: by the function returned, where the model would raise it.
    """
    devices = jax.local_devices() if devices is None else devices
    graph, weights = _inference_graph(model, variables, devices[0].platform)
    mesh = Mesh(np.asarray(devices), ("batch",))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    on_cpu = devices[0].platform == "cpu"
    compiled = jax.jit(
        jax.shard_map(graph, mesh=mesh, in_specs=(PartitionSpec(), split.spec), out_specs=split.spec),
        compiler_options=cpu.compiler_options() if on_cpu else None,
    )

    def predict(images: Any) -> jax.Array:
        check_images(images)
        if isinstance(images, jax.core.Tracer):
            return graph(weights, images)
        images = np.asarray(images) if on_cpu else jnp.asarray(images)
        sizes = cpu.BATCH_SIZES if on_cpu else (_power_of_two(len(images), len(devices)),)
        logits = []
        for batch in _batches(images, [size * len(devices) for size in sizes]):
            logits.append(compiled(weights, batch if on_cpu else jax.device_put(batch, split)))
            if on_cpu:
                logits[-1].block_until_ready()  # several batches at once would compete for the caches
        joined = logits[0] if len(logits) == 1 else jax.device_put(np.concatenate(logits), devices[0])
        return joined if len(joined) == len(images) else joined[: len(images)]

    return predict


def _inference_graph(
    model: GoogLeNet, variables: Variables, platform: str
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """The function (weights, images) -> logits that is fastest on the platform, and its weights."""
    params = {name: block for name, block in variables["params"].items() if not name.startswith("aux")}
    folded, folded_variables = fold_batch_norm(model.clone(aux_logits=False), {**variables, "params": params})
    if platform != "cpu" or jnp.finfo(model.dtype).bits < 32:  # Winograd would lose the few digits of bfloat16

        def plain_graph(weights: Variables, images: jax.Array) -> jax.Array:
            output: Any = folded.apply(weights, images)
            return output.logits

        return plain_graph, folded_variables

    def graph(weights: cpu.Weights, images: jax.Array) -> jax.Array:
        images = transform_input(images) if model.transform_input else images
        return cpu.logits(weights, images.astype(model.dtype))

    return graph, jax.tree.map(lambda x: x.astype(model.dtype), cpu.prepare(folded_variables["params"]))


def _power_of_two(images: int, devices: int) -> int:
    """The least power of two that is enough images for each device."""
    return 1 << max(-(-images // devices) - 1, 0).bit_length()


def _batches(images: Any, sizes: Sequence[int]) -> Iterator[Any]:
    """Consecutive batches: always the largest of ``sizes`` that is full, or the smallest one, padded with zeros."""
    rest = images
    while True:
        size = max((size for size in sizes if size <= len(rest)), default=min(sizes))
        batch, rest = rest[:size], rest[size:]
        missing = size - len(batch)
        yield jnp.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch
        if not len(rest):
            return
