"""Inference: BatchNorm folded into the convolutions, and a jitted predictor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Float64
from scipy.special import softmax

from flax_googlenet.inference import compiling, cpu
from flax_googlenet.model import BatchNorm, GoogLeNet, Variables, check_images, plain_dicts, transform_input
from flax_googlenet.ops import winograd
from flax_googlenet.weights.checkpoint import CheckpointError

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


def make_predictor(model: GoogLeNet, variables: Variables, devices: Sequence[jax.Device] | None = None) -> "Predictor":
    """Return the fast path: a compiled function from images to logits, of the folded network.

    Example::

        predict = make_predictor(model, variables)
        logits = predict(images)

    Args:
        model: the network.
        variables: its variables, concrete arrays; those of the auxiliary heads are not used.
        devices: the devices, of one platform, over which each batch is split; by default all of this process. With
            ``jax.config.update("jax_num_cpu_devices", 2)`` a CPU counts as two.
    """
    platform = (jax.local_devices() if devices is None else devices)[0].platform
    needed = {name: block for name, block in variables["params"].items() if not name.startswith("aux")}
    # In float64 until all is folded and transformed: parameters in bfloat16 would be rounded at every step.
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), {**variables, "params": needed})
    _, folded = fold_batch_norm(model, exact)
    weights = cpu.prepare(folded["params"]) if _is_tuned(model, platform) else folded
    return Predictor(model, jax.tree.map(lambda x: x.astype(model.dtype), weights), platform, devices)


class Predictor:
    """A compiled function from images to logits; ``make_predictor`` makes it.

    It takes any number of images, cuts them into batches of a few sizes, and compiles each size when it is first
    needed. On a CPU it computes the graph of ``flax_googlenet.cpu``, one batch after the other, and ``model.precision``
    has no effect. Any number of threads may call it at once. It can be copied and pickled. A copy in another process
    computes on the devices that have the same ids there, or on all of the platform if it was made for all.

    Attributes:
        model: the network, as ``make_predictor`` was given it.
        devices: the devices that compute.
    """

    def __init__(
        self, model: GoogLeNet, weights: Any, platform: str, devices: Sequence[jax.Device] | None = None
    ) -> None:
        self.model = model
        self.devices = tuple(jax.local_devices(backend=platform) if devices is None else devices)
        self._on_all = devices is None
        self._mesh = Mesh(np.asarray(self.devices), ("batch",))
        self._graph = _inference_graph(model, platform)
        compiler_options = compiling.compiler_options() if _is_tuned(model, platform) else {}
        if len(self.devices) == 1:
            self._weights = jax.device_put(weights, self.devices[0])
            self._compiled = jax.jit(self._graph, compiler_options=compiler_options)
        else:
            whole, split = PartitionSpec(), PartitionSpec("batch")
            self._weights = jax.device_put(weights, NamedSharding(self._mesh, whole))
            on_all = jax.shard_map(self._graph, mesh=self._mesh, in_specs=(whole, split), out_specs=split)
            self._compiled = jax.jit(on_all, compiler_options=compiler_options)

    def __call__(self, images: Float[ArrayLike, "n h w 3"]) -> Float[Array, "n num_classes"]:
        """Compute the logits, on the first of the devices.

        Under ``jax.jit``, ``jax.vmap`` and ``jax.grad``, traced images make the same graph a part of the trace, for the
        platform of ``devices`` and with the caller's compiler options. Concrete images are computed at once there, too.

        Args:
            images: floating point [N, H, W, 3], RGB, ImageNet-normalised, as ``preprocess_batch`` returns them.

        Returns:
            [N, num_classes] of the model's dtype.

        Raises:
            TypeError: if ``images`` is no array of JAX or NumPy; the message says what to do with it.
            ValueError: if ``images`` has another shape or dtype.
        """
        check_images(images)
        if isinstance(images, jax.core.Tracer):
            return self._graph(self._weights, images)
        try:
            our_mesh = jax.set_mesh(self._mesh)  # in place of the caller's, if there is one
        except ValueError:  # JAX refuses it while this thread is in somebody's trace; a new thread is in none
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(self, images).result()
        with our_mesh:
            return self._computed(images)

    def _computed(self, images: Any) -> jax.Array:
        on_cpu, on_one = self.devices[0].platform == "cpu", len(self.devices) == 1
        if on_cpu or not (on_one and isinstance(images, jax.Array) and images.devices() == {*self.devices}):
            images = np.asarray(images)
        sizes = [size * len(self.devices) for size in (cpu.BATCH_SIZES if on_cpu else _BATCH_SIZES)]
        logits = []
        for batch in _batches(images, sizes):
            logits.append(self._compiled(self._weights, batch))
            if on_cpu:
                logits[-1].block_until_ready()  # several batches at once would compete for the caches
        if on_one and len(logits) == 1 and len(logits[0]) == len(images):
            return logits[0]
        # Joined and cut on the host: on the devices each number of images would be compiled for.
        return jax.device_put(np.concatenate(logits)[: len(images)], self.devices[0])

    def __repr__(self) -> str:
        dtype, devices = jnp.dtype(self.model.dtype), ", ".join(map(str, self.devices))
        return f"Predictor(GoogLeNet with {self.model.num_classes} classes in {dtype}, on {devices})"

    def __reduce__(self) -> tuple[Any, ...]:
        ids = None if self._on_all else [device.id for device in self.devices]
        return _restore, (self.model, jax.tree.map(np.asarray, self._weights), self.devices[0].platform, ids)


def probabilities(
    predict: Callable[[Any], ArrayLike], images: Float[ArrayLike, "n h w 3"], name: str
) -> Float64[np.ndarray, "n num_classes"]:
    """Return the probabilities of the classes: the softmax, in float64, of the logits.

    Args:
        predict: A ``Predictor``, or another function from images to logits.
        images: The images, as ``predict`` takes them.
        name: The name of the weights in the message.

    Raises:
        CheckpointError: If the logits are not finite.
    """
    logits = np.asarray(predict(images), np.float64)
    if not np.isfinite(logits).all():
        raise CheckpointError(f"{name} is damaged: its answers are not finite")
    return softmax(logits, axis=1)


def _restore(model: GoogLeNet, weights: Any, platform: str, ids: Sequence[int] | None) -> Predictor:
    """Make a predictor anew from what ``pickle`` or ``copy`` took of another."""
    if ids is None:
        return Predictor(model, weights, platform)
    there = {device.id: device for device in jax.local_devices(backend=platform)}
    if missing := [number for number in ids if number not in there]:
        raise ValueError(
            f"the predictor computes on the {platform} devices {ids}, and this process has no {missing}: make it with "
            "make_predictor here, or without devices there"
        )
    return Predictor(model, weights, platform, [there[number] for number in ids])


def _is_tuned(model: GoogLeNet, platform: str) -> bool:
    """Return whether the graph of ``flax_googlenet.cpu`` is the fastest."""
    return platform == "cpu" and winograd.is_precise(model.dtype)


def _inference_graph(model: GoogLeNet, platform: str) -> Callable[[Any, jax.Array], jax.Array]:
    """Return the function (weights, images) -> logits that is fastest."""
    folded = model.clone(aux_logits=False, batch_norm=False)

    def plain_graph(weights: Variables, images: jax.Array) -> jax.Array:
        output: Any = folded.apply(weights, images)
        return output.logits

    def cpu_graph(weights: cpu.Weights, images: jax.Array) -> jax.Array:
        images = transform_input(images) if model.transform_input else images
        return cpu.logits(weights, images.astype(model.dtype))

    return cpu_graph if _is_tuned(model, platform) else plain_graph


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
