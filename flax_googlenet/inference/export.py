"""Export: the folded network, its weights inside, as one StableHLO file that runs with JAX alone."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from jax import numpy as jnp

from flax_googlenet.commands.status import CommandError, Status
from flax_googlenet.errors import printable
from flax_googlenet.files import write_atomically
from flax_googlenet.inference.predictor import fold_batch_norm
from flax_googlenet.model import IMAGENET_MEAN, IMAGENET_STD, MIN_SIZE, GoogLeNet, Variables
from flax_googlenet.weights.files import load_weights, require_folder_of

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""JAX's names of what it can export for; none of them has to be there."""

_LOCATIONS_LOCK = threading.Lock()


def export(
    path: str | os.PathLike[str],
    model: GoogLeNet,
    variables: Variables,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    *,
    size: tuple[int, int] | None = None,
    uint8: bool = False,
    top: int | None = None,
    gradient: bool = False,
) -> None:
    """Writes the network and its weights to one file, which runs with neither this library nor Flax.

    The file is what ``jax.export`` serializes. It computes the function of the model at inference, BatchNorm folded
    into the convolutions and ``transform_input`` inside, in the model's dtype and with its precision, for any number
    of images from 1 up. The same input makes the same bytes.

    JAX promises to run it with any jaxlib built up to 6 months after the one that wrote it, or up to 3 weeks before:
    keep the weights, and export anew for a newer one. https://docs.jax.dev/en/latest/export/export.html

    Example::

        flax_googlenet.export("googlenet.stablehlo", model, variables)

        # elsewhere; needs the packages jax and flatbuffers
        from jax import export
        predict = export.deserialize(bytearray(open("googlenet.stablehlo", "rb").read())).call
        logits = predict(images)

    Args:
        path: the file to write. It is written beside its place, synced and renamed.
        model: the network.
        variables: its variables, concrete arrays; those of the auxiliary heads are left out.
        platforms: some of "cpu", "cuda", "rocm" and "tpu".
        size: height and width of the images in pixels. By default any from 15 up: they are part of the call.
        uint8: take images uint8 [N, H, W, 3], RGB, and scale and normalise them inside. Otherwise they are float32
            [N, H, W, 3] (float64 for a float64 model), ImageNet-normalised RGB, as ``preprocess`` makes them.
        top: return ``(probabilities, indices)``, float32 and int32 [N, top], the likeliest class first, instead of the
            logits [N, num_classes].
        gradient: keep the derivative by the images, so that ``jax.grad`` works on the call. Twice the size.

    Raises:
        ValueError: if a platform is unknown, ``size`` below 15, ``top`` not from 1 to num_classes, or ``gradient``
            asked for uint8 images or without a ``size``.
        OSError: if the file cannot be written; nothing is left behind then.
    """
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"platforms must be some of {', '.join(PLATFORMS)}, got {platforms!r}")
    if top is not None and not 1 <= top <= model.num_classes:
        raise ValueError(f"top must be from 1 to {model.num_classes}, the number of classes, got {top}")
    if gradient and uint8:
        raise ValueError("whole numbers have no gradient: leave out uint8")
    if gradient and size is None:  # JAX cannot transpose a strided convolution of unknown size
        raise ValueError("a gradient needs images of one size: add size, for example 224 by 224")

    float_dtype = _float_dtype(model)
    folded, folded_variables = fold_batch_norm(model, variables)

    def googlenet(images: jax.Array) -> Any:
        if uint8:
            images = images.astype(float_dtype) / 255
            images = (images - jnp.asarray(IMAGENET_MEAN, float_dtype)) / jnp.asarray(IMAGENET_STD, float_dtype)
        output: Any = folded.apply(folded_variables, images)
        if top is None:
            return output.logits
        return tuple(jax.lax.top_k(jax.nn.softmax(output.logits.astype(float_dtype)), top))

    if size is None:
        shape = jax_export.symbolic_shape("n, h, w, 3", constraints=[f"h >= {MIN_SIZE}", f"w >= {MIN_SIZE}"])
    else:
        shape = (*jax_export.symbolic_shape("n"), *size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if uint8 else float_dtype)
    with _without_source_locations():
        exported = jax_export.export(jax.jit(googlenet), platforms=platforms)(images)
        data = exported.serialize(vjp_order=1 if gradient else 0)
    write_atomically(path, bytes(data))


def _float_dtype(model: GoogLeNet) -> np.dtype:
    """Of images and probabilities: float32, or float64 for a float64 model."""
    return np.promote_types(jnp.dtype(model.dtype), np.float32)


@contextmanager
def _without_source_locations() -> Iterator[None]:
    """In the block JAX, in all threads, keeps the paths of source files, which are this machine's, out of programs."""
    option = "jax_traceback_in_locations_limit"
    with _LOCATIONS_LOCK:
        before = jax.config.values[option]
        jax.config.update(option, 0)
        try:
            yield
        finally:
            jax.config.update(option, before)


def export_file(
    weights: Path,
    output: Path,
    platforms: Sequence[str],
    *,
    size: tuple[int, int] | None,
    uint8: bool,
    top: int | None,
    gradient: bool,
) -> str:
    """What ``flax-googlenet export`` does; returns what it tells: what was written, and three lines that run it.

    Raises:
        CommandError: if the options are wrong, the weights unreadable, or the output cannot be written.
    """
    require_folder_of(output)
    loaded = load_weights(weights)
    try:
        export(output, loaded.model, loaded.variables, platforms, size=size, uint8=uint8, top=top, gradient=gradient)
    except ValueError as error:
        raise CommandError(Status.USAGE, str(error)) from error
    except OSError as error:
        raise CommandError(Status.NOT_DONE, f"cannot write {output}: {error.strerror}") from error

    height, width = size or (f"H >= {MIN_SIZE}", f"W >= {MIN_SIZE}")
    kind = "uint8" if uint8 else f"{_float_dtype(loaded.model)} ImageNet-normalised"
    results = "logits" if top is None else "probabilities, indices"
    return (
        f"wrote {printable(str(output))}: {output.stat().st_size / 1e6:.1f} MB, for {', '.join(platforms)}. "
        "It runs with jax and flatbuffers alone:\n\n"
        "from jax import export\n"
        f'predict = export.deserialize(bytearray(open({str(output)!r}, "rb").read())).call\n'
        f"{results} = predict(images)  # {kind} RGB [N, {height}, {width}, 3]\n"
    )
