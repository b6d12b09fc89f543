"""Inference: BatchNorm folded into the convolutions, and a jitted predictor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_googlenet import compiling, cpu, winograd
from flax_googlenet.model import BatchNorm, GoogLeNet, Variables, check_images, plain_dicts, transform_input

Predictor = Callable[[Any], jax.Array]
"""images [N, H, W, 3] -> logits [N, num_classes]"""

_BATCH_SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # of a device other than a CPU


def fold_batch_norm(model: GoogLeNet, variables: Variables) -> tuple[GoogLeNet, dict[str, Any]]:
    """The same function without BatchNorm: each convolution takes over the scale and shift that follow it.

    Args:
        model: the network.
        variables: its variables, concrete arrays.

    Returns:
        The network with ``batch_norm=False``, and its variables: those of the convolutions as NumPy arrays, computed in
        float64 and rounded once to the dtype of the kernels, the others as they are. A network without BatchNorm comes
        back as it is. The fold is for inference: what BatchNorm does in training is gone.
    """
    variables = plain_dicts(variables)
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

    It takes any number of images, cuts them into batches of a few sizes, and compiles each size when it is first
    needed. On a CPU it computes the graph of ``flax_googlenet.cpu``, one batch after the other, and ``model.precision``
    has no effect. Any number of threads may call it at once. Under ``jax.jit``, ``jax.vmap`` and ``jax.grad`` it is
    part of what they trace: the same graph, made for the platform of ``devices``, with the caller's compiler options.

    Example::

        predict = make_predictor(model, variables)
        logits = predict(images)

    Args:
        model: the network.
        variables: its variables, concrete arrays; those of the auxiliary heads are not used.
        devices: the devices, of one platform, over which each batch is split; by default all of this process. With
            ``jax.config.update("jax_num_cpu_devices", 2)`` a CPU counts as two.

    Returns:
        Images, floating point [N, H, W, 3] as for the model, to logits [N, num_classes] of the model's dtype, on the
        first of the devices.

    Raises:
        TypeError, ValueError: by the function returned, where the model would raise them.
    """
    devices = jax.local_devices() if devices is None else devices
    on_cpu = devices[0].platform == "cpu"
    graph, weights, compiler_options = _inference_graph(model, variables, on_cpu)
    mesh = Mesh(np.asarray(devices), ("batch",))
    if len(devices) == 1:
        weights = jax.device_put(weights, devices[0])
        compiled = jax.jit(graph, compiler_options=compiler_options)
    else:
        whole, split = PartitionSpec(), PartitionSpec("batch")
        weights = jax.device_put(weights, NamedSharding(mesh, whole))
        on_all = jax.shard_map(graph, mesh=mesh, in_specs=(whole, split), out_specs=split)
        compiled = jax.jit(on_all, compiler_options=compiler_options)
    sizes = [size * len(devices) for size in (cpu.BATCH_SIZES if on_cpu else _BATCH_SIZES)]

    def predict(images: Any) -> jax.Array:
        check_images(images)
        if isinstance(images, jax.core.Tracer):
            return graph(weights, images)
        if on_cpu or len(devices) > 1:
            images = np.asarray(images)
        logits = []
        for batch in _batches(images, sizes):
            with jax.set_mesh(mesh):  # in place of the caller's, if there is one
                logits.append(compiled(weights, batch))
            if on_cpu:
                logits[-1].block_until_ready()  # several batches at once would compete for the caches
        if len(logits) == len(devices) == 1 and len(logits[0]) == len(images):
            return logits[0]
        # Joined and cut on the host: on the devices each number of images would be compiled for.
        return jax.device_put(np.concatenate(logits)[: len(images)], devices[0])

    return predict


def _inference_graph(
    model: GoogLeNet, variables: Variables, on_cpu: bool
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any, dict[str, str]]:
    """The function (weights, images) -> logits that is fastest, its weights, and its options for ``jax.jit``."""
    needed = {name: block for name, block in variables["params"].items() if not name.startswith("aux")}
    # In float64 until all is folded and transformed: parameters in bfloat16 would be rounded at every step.
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), {**variables, "params": needed})
    folded, folded_variables = fold_batch_norm(model.clone(aux_logits=False), exact)

    def plain_graph(weights: Variables, images: jax.Array) -> jax.Array:
        output: Any = folded.apply(weights, images)
        return output.logits

    def cpu_graph(weights: cpu.Weights, images: jax.Array) -> jax.Array:
        images = transform_input(images) if model.transform_input else images
        return cpu.logits(weights, images.astype(model.dtype))

    tuned = on_cpu and winograd.is_precise(model.dtype)
    weights = cpu.prepare(folded_variables["params"]) if tuned else folded_variables
    rounded = jax.tree.map(lambda x: x.astype(model.dtype), weights)
    return (cpu_graph, rounded, compiling.compiler_options()) if tuned else (plain_graph, rounded, {})


def _batches(images: Any, sizes: Sequence[int]) -> Iterator[Any]:
    """Consecutive batches: always the largest of ``sizes`` that is full, or the smallest one, padded with zeros."""
    rest = images
    while True:
        size = max((size for size in sizes if size <= len(rest)), default=min(sizes))
        batch, rest = rest[:size], rest[size:]
        missing = size - len(batch)
        yield np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch
        if not len(rest):
            return
