"""The predictor: a compiled function from images to logits."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Float64

from flax_googlenet.architecture import NETWORKS
from flax_googlenet.inference import compiling, cpu, gpu, tpu
from flax_googlenet.inference.folding import fold_in_float64
from flax_googlenet.model import GoogLeNet, Variables, check_images, transform_input
from flax_googlenet.ops import winograd
from flax_googlenet.weights.checkpoint import CheckpointError

T = TypeVar("T")
R = TypeVar("R")

_BATCH_SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Numbers of images for each device in one call on a GPU or TPU; for a CPU, they are ``cpu.BATCH_SIZES``."""


def make_predictor(model: GoogLeNet, variables: Variables, devices: Sequence[jax.Device] | None = None) -> "Predictor":
    """Return a fast function from images to logits: the network with BatchNorm folded, compiled for its devices.

    Example::

        predict = make_predictor(model, variables)
        logits = predict(images)

    Args:
        model: The network.
        variables: Its variables, concrete arrays. The auxiliary heads are not used.
        devices: The devices that share each batch, all of one platform; by default all devices of this process. After
            ``jax.config.update("jax_num_cpu_devices", 2)``, a CPU counts as two devices.
    """
    platform = (jax.local_devices() if devices is None else devices)[0].platform
    params = fold_in_float64(model, variables)
    tuned = _tuned_graph(model, platform)
    weights = {"params": params} if tuned is None else tuned.prepare(params)
    return Predictor(model, jax.tree.map(lambda x: x.astype(model.dtype), weights), platform, devices)


class Predictor:
    """A compiled function from images to logits, which ``make_predictor`` returns.

    It takes any number of images, splits them into batches of a few sizes, and compiles each size when it first occurs.
    A CPU computes one batch after the other. Any number of threads may call it at once.

    Each platform has a graph of its own, in ``flax_googlenet.inference.cpu``, ``gpu`` and ``tpu``. On a CPU,
    ``model.precision`` has no effect on it. Two kinds of models are computed by their own graph instead: those in
    bfloat16 or float16 on a CPU, and the variants "inception5h" and "bvlc_floor" on a TPU.

    On a single GPU or TPU, the call returns before the logits are computed, and images that lie there are not copied to
    the host. Each number of images that is not a power of two up to 256 compiles a small program once there.

    It can be copied and pickled. Unpickled in another process, it computes on the devices with the same ids, or on all
    devices of the platform if ``make_predictor`` was not given any.

    Attributes:
        model: The network that ``make_predictor`` was given.
        devices: The devices that compute.
    """

    def __init__(
        self, model: GoogLeNet, weights: Any, platform: str, devices: Sequence[jax.Device] | None = None
    ) -> None:
        self.model = model
        self.devices = tuple(jax.local_devices(backend=platform) if devices is None else devices)
        self._on_all = devices is None
        self._mesh = Mesh(np.asarray(self.devices), ("batch",))
        self._graph = _inference_graph(model, platform)
        compiler_options = {} if _tuned_graph(model, platform) is None else compiling.compiler_options(platform)
        if len(self.devices) == 1:
            self._weights = jax.device_put(weights, self.devices[0])
            self._compiled = jax.jit(self._graph, compiler_options=compiler_options)
        else:
            replicated, split = PartitionSpec(), PartitionSpec("batch")
            self._weights = jax.device_put(weights, NamedSharding(self._mesh, replicated))
            sharded = jax.shard_map(self._graph, mesh=self._mesh, in_specs=(replicated, split), out_specs=split)
            self._compiled = jax.jit(sharded, compiler_options=compiler_options)

    def __call__(self, images: Float[ArrayLike, "n h w 3"]) -> Float[Array, "n num_classes"]:
        """Compute the logits.

        Under ``jax.jit``, ``jax.vmap`` and ``jax.grad``, traced images make the same graph a part of the trace, for the
        platform of ``devices`` and with the caller's compiler options. Concrete images are computed at once even there.

        Args:
            images: Floating point [N, H, W, 3], RGB, ImageNet-normalised, as ``preprocess_batch`` returns them.

        Returns:
            [N, num_classes] of the model's dtype, on the first of the devices.

        Raises:
            TypeError: If ``images`` is not an array of JAX or NumPy.
            ValueError: If ``images`` has another shape or dtype.
        """
        check_images(images, NETWORKS[self.model.variant].min_size)
        if isinstance(images, jax.core.Tracer):
            return self._graph(self._weights, images)
        try:
            own_mesh = jax.set_mesh(self._mesh)  # in place of a mesh that the caller may have set
        except ValueError:  # JAX refuses to set a mesh during a trace; a new thread is not part of the caller's trace
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(self, images).result()
        with own_mesh:
            return self._compute(images)

    def _compute(self, images: Any) -> jax.Array:
        on_cpu, on_one = self.devices[0].platform == "cpu", len(self.devices) == 1
        stays = on_one and not on_cpu and isinstance(images, jax.Array) and images.devices() == {*self.devices}
        images = images if stays else np.asarray(images)
        sizes = [size * len(self.devices) for size in (cpu.BATCH_SIZES if on_cpu else _BATCH_SIZES)]
        logits = []
        for batch in _batches(images, sizes, rounds_up=not on_cpu):
            logits.append(self._compiled(self._weights, batch))
            if on_cpu:
                logits[-1].block_until_ready()  # batches that run at the same time would compete for the caches
        if on_one and len(logits) == 1 and len(logits[0]) == len(images):
            return logits[0]
        if on_one and not on_cpu:
            return jnp.concatenate(logits)[: len(images)]
        # On the host, because on a device each number of images would need a compilation of its own.
        return jax.device_put(np.concatenate(logits)[: len(images)], self.devices[0])

    def __repr__(self) -> str:
        dtype, devices = jnp.dtype(self.model.dtype), ", ".join(map(str, self.devices))
        return f"Predictor(GoogLeNet with {self.model.num_classes} classes in {dtype}, on {devices})"

    def __reduce__(self) -> tuple[Any, ...]:
        ids = None if self._on_all else [device.id for device in self.devices]
        return _restore, (self.model, jax.tree.map(np.asarray, self._weights), self.devices[0].platform, ids)


def sent_ahead(send: Callable[[T], R], batches: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Yield each batch with what ``send`` returns for it, at the latest when the next batch has been sent.

    While the caller waits for the logits of one batch, a GPU or TPU already has the next. A CPU computes a batch within
    the call of a ``Predictor``, so that nothing is delayed there.

    Args:
        send: Starts to compute a batch, as a ``Predictor`` does, and returns its logits, or several of them.
        batches: The batches. Each is taken when it can be sent.
    """
    sent: deque[tuple[T, R]] = deque()
    for batch in batches:
        sent.append((batch, send(batch)))
        while sent and (len(sent) > 1 or _are_ready(sent[0][1])):
            yield sent.popleft()
    yield from sent


def _are_ready(logits: Any) -> bool:
    return all(x.is_ready() for x in jax.tree.leaves(logits) if hasattr(x, "is_ready"))  # NumPy's arrays always are


def probabilities(logits: Float[ArrayLike, "n num_classes"], name: str) -> Float64[np.ndarray, "n num_classes"]:
    """Return the probabilities of the classes: the softmax, in float64, of the logits of a predictor.

    Args:
        logits: The logits, which the function waits for.
        name: The name of the weights in the message.

    Raises:
        CheckpointError: If the logits are not finite.
    """
    logits = np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        raise CheckpointError(f"{name} is damaged: its answers are not finite")
    # Not scipy.special.softmax, which does the same: its import takes 0.1 s.
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))  # [n, num_classes], at most 1
    return odds / odds.sum(axis=1, keepdims=True)


def rank(
    probabilities: Float64[np.ndarray, "num_classes"], top: int, class_names: Sequence[str] | None
) -> list[dict[str, int | str | float | None]]:
    """Return the predictions for an image: the ``top`` likeliest classes, the likeliest first.

    A prediction is ``{"index", "label", "probability"}``; its label is None if there are no class names. ``top`` is at
    most the number of classes.
    """
    # Sorting only the classes that can be among them takes a third of the time, during which a GPU would wait.
    likeliest = np.flatnonzero(probabilities >= np.partition(probabilities, -top)[-top])
    likeliest = likeliest[(-probabilities[likeliest]).argsort(kind="stable")][:top]
    return [
        {
            "index": index,
            "label": class_names[index] if class_names else None,
            "probability": float(f"{probabilities[index]:.6g}"),  # the logits are float32
        }
        for index in likeliest.tolist()
    ]


def predictions_type() -> Any:
    """Return PyArrow's type of a column with what ``rank`` returns."""
    import pyarrow

    numbers = {"index": pyarrow.int64(), "label": pyarrow.string(), "probability": pyarrow.float64()}
    return pyarrow.list_(pyarrow.struct(numbers))


def _restore(model: GoogLeNet, weights: Any, platform: str, ids: Sequence[int] | None) -> Predictor:
    """Return a predictor from what ``pickle`` or ``copy`` took of another. ``ids`` is None for all devices."""
    if ids is None:
        return Predictor(model, weights, platform)
    by_id = {device.id: device for device in jax.local_devices(backend=platform)}
    if missing := [number for number in ids if number not in by_id]:
        raise ValueError(
            f"the predictor was made for the {platform} devices {ids}, and this process has no {missing}: call "
            "make_predictor in this process, or pickle a predictor that was made without devices"
        )
    return Predictor(model, weights, platform, [by_id[number] for number in ids])


def _tuned_graph(model: GoogLeNet, platform: str) -> ModuleType | None:
    """Return the module with the fastest graph for a platform, or None where that is the model's own."""
    if platform == "cpu" and winograd.is_precise(model.dtype):
        return cpu
    if platform == "tpu" and isinstance(NETWORKS[model.variant].pool_padding, str):
        return None  # tpu.logits has the windows of Caffe's pools
    return {"gpu": gpu, "tpu": tpu}.get(platform)


def _inference_graph(model: GoogLeNet, platform: str) -> Callable[[Any, jax.Array], jax.Array]:
    """Return the function (weights, images) -> logits that is fastest on the platform."""
    tuned = _tuned_graph(model, platform)
    folded = model.clone(aux_logits=False, batch_norm=False)

    def plain_graph(weights: Variables, images: jax.Array) -> jax.Array:
        output: Any = folded.apply(weights, images)
        return output.logits

    if tuned is None:
        return plain_graph
    options = {} if tuned is cpu else {"precision": model.precision}

    def tuned_graph(weights: Mapping[str, Any], images: jax.Array) -> jax.Array:
        return tuned.logits(weights, transform_input(model, images).astype(model.dtype), model.variant, **options)

    return tuned_graph


def _batches(images: Any, sizes: Sequence[int], rounds_up: bool) -> Iterator[Any]:
    """Yield batches, at least one, of the given sizes, in falling order. The last is padded with zeros.

    Args:
        images: An array of NumPy or JAX, on whose device the batches are cut.
        sizes: The sizes that a batch may have, in falling order.
        rounds_up: Whether the rest that does not fill the largest size is one batch, padded to the next size, as suits
            devices on which a small batch takes little less time than a larger one. Otherwise each batch has the
            largest size that the rest fills.
    """
    xp = jnp if isinstance(images, jax.Array) else np
    rest = images
    while True:
        if rounds_up:
            size = min((size for size in sizes if size >= len(rest)), default=sizes[0])
        else:
            size = max((size for size in sizes if size <= len(rest)), default=sizes[-1])
        if size >= len(rest):
            padding = [(0, size - len(rest)), (0, 0), (0, 0), (0, 0)]
            yield xp.pad(rest, padding) if size > len(rest) else rest
            return
        yield rest[:size]
        rest = rest[size:]
