"""Export: the folded network with its weights as one file, StableHLO for JAX alone or ONNX for other runtimes."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from jax import numpy as jnp

from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD, NETWORKS
from flax_googlenet.errors import GoogLeNetError, install_advice
from flax_googlenet.files import write_atomically
from flax_googlenet.inference.folding import fold_batch_norm
from flax_googlenet.model import GoogLeNet, Variables

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""The platforms that JAX can export for, by its names. This machine need not have them."""

MISSING_ONNX = f"a file that ends in .onnx needs the package onnx: {install_advice('onnx')}"

_LOCATIONS_LOCK = threading.Lock()


class ExportError(GoogLeNetError, ValueError):
    """An export with these options is not possible; the message says which option to change."""


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
    layout: str = "NHWC",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a network with its weights to one file, which runs without this library and without Flax.

    The file holds what ``jax.export`` serializes or, if its name ends in ``.onnx``, an ONNX model. It computes the
    model's inference, with BatchNorm folded into the convolutions and with ``transform_input`` if the model has it, in
    the model's dtype and precision, for one image or more. The same input makes the same bytes.

    JAX promises to run the file with any jaxlib built up to 6 months after the one that wrote it, or up to 3 weeks
    before. Keep the weights, so that you can export them again. https://docs.jax.dev/en/latest/export/export.html

    An ONNX model runs in ONNX Runtime, OpenVINO and others. To write it, install the extra ``onnx``. Its input is named
    ``images``, and its outputs are ``logits``, or ``probabilities`` and ``indices``. Weights and computation are in the
    model's dtype, which is float32, float16 or bfloat16; images are float32 or uint8, and logits float32. ONNX Runtime
    computes float16 in float32 on a CPU, and has no convolutions in bfloat16 there.

    Example::

        flax_googlenet.export("googlenet.stablehlo", model, variables)

        # elsewhere; needs the packages jax and flatbuffers
        from jax import export
        predict = export.deserialize(bytearray(open("googlenet.stablehlo", "rb").read())).call
        logits = predict(images)

        flax_googlenet.export("googlenet.onnx", model, variables)

        # elsewhere; needs the package onnxruntime
        import onnxruntime
        session = onnxruntime.InferenceSession("googlenet.onnx")
        [logits] = session.run(None, {"images": images})

    Args:
        path: The file to write. A kill at any moment leaves the old file or the new one.
        model: The network.
        variables: Its variables, as concrete arrays. Those of the auxiliary heads are left out.
        platforms: Some of "cpu", "cuda", "rocm" and "tpu". It has no effect on an ONNX model.
        size: Height and width of the images, in pixels. By default the file takes images of any size from 15 up,
            or from 31 up for the variant "bvlc" and from 61 up for "bvlc_floor".
        uint8: Take uint8 RGB images [N, H, W, 3], which the file scales and normalises. By default it takes
            ImageNet-normalised RGB images, float32 [N, H, W, 3] (float64 for a float64 model), as ``preprocess``
            returns them. Without ``size``, an ONNX model first resizes and crops uint8 images to the size of the
            training images, as ``preprocess`` does. Pixels differ from its own by at most one of 255 levels.
        top: Return ``(probabilities, indices)`` of the ``top`` likeliest classes, float32 and int32 [N, top], the
            likeliest first, instead of the logits [N, num_classes].
        gradient: Keep the derivative with respect to the images, so that ``jax.grad`` works on the call. This doubles
            the size of the file. ONNX models have no gradient.
        layout: Order of the axes of the images: "NHWC" or, for an ONNX model only, "NCHW".
        metadata: The metadata of the weights, as ``load_metadata`` returns it. An ONNX model keeps ``class_names`` and
            ``source``, and takes the size of the training images from it.

    Raises:
        ExportError: If a platform is unknown, ``size`` is too small, ``top`` is not from 1 to num_classes, or
            ``gradient`` is asked for with uint8 images or without a ``size``; if ``layout`` is not one that the format
            has; if an ONNX model is asked for with a ``gradient`` or in float64, or the package ``onnx`` is missing.
        OSError: If the file cannot be written. Nothing is left behind.
    """
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ExportError(f"platforms must be some of {', '.join(PLATFORMS)}, got {platforms!r}")
    if top is not None and not 1 <= top <= model.num_classes:
        raise ExportError(f"top must be from 1 to {model.num_classes}, the number of classes, got {top}")
    min_size = NETWORKS[model.variant].min_size
    if size is not None and min(size) < min_size:
        raise ExportError(f"size must be at least {min_size} by {min_size}, got {size[0]} by {size[1]}")
    if gradient and uint8:
        raise ExportError("whole numbers have no gradient: leave out uint8")
    if gradient and size is None:  # JAX cannot transpose a strided convolution of unknown size
        raise ExportError("a gradient needs images of one size: add size, for example 224 by 224")

    if Path(path).suffix.lower() == ".onnx":
        if gradient:
            raise ExportError("an ONNX model has no gradient: leave it out, or name a file that does not end in .onnx")
        if layout not in ("NHWC", "NCHW"):
            raise ExportError(f"layout must be NHWC or NCHW, got {layout}")
        if model.dtype == jnp.float64:
            raise ExportError("ONNX Runtime has no convolutions in float64: use a model with dtype=jax.numpy.float32")
        onnx = _import_onnx().onnx_model(
            model, variables, size=size, uint8=uint8, top=top, layout=layout, metadata=metadata or {}
        )
        write_atomically(path, onnx.SerializeToString(deterministic=True))
        return
    if layout != "NHWC":
        raise ExportError(f"layout {layout} needs an ONNX model: name a file that ends in .onnx, or leave out layout")

    float_dtype = images_dtype(model)
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
        shape = jax_export.symbolic_shape("n, h, w, 3", constraints=[f"h >= {min_size}", f"w >= {min_size}"])
    else:
        shape = (*jax_export.symbolic_shape("n"), *size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if uint8 else float_dtype)
    with _without_source_locations():
        exported = jax_export.export(jax.jit(googlenet), platforms=platforms)(images)
        data = exported.serialize(vjp_order=1 if gradient else 0)
    write_atomically(path, bytes(data))


def images_dtype(model: GoogLeNet) -> np.dtype:
    """Return the dtype of float images and probabilities: float32, or float64 for a float64 model."""
    return np.promote_types(jnp.dtype(model.dtype), np.float32)


def _import_onnx() -> ModuleType:
    """Import the module that makes ONNX models, which needs an optional package."""
    try:
        from flax_googlenet.inference import onnx
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise ExportError(MISSING_ONNX) from error
    return onnx


@contextmanager
def _without_source_locations() -> Iterator[None]:
    """Keep this machine's paths of source files out of the programs that JAX makes meanwhile, in all threads."""
    option = "jax_traceback_in_locations_limit"
    with _LOCATIONS_LOCK:
        before = jax.config.values[option]
        jax.config.update(option, 0)
        try:
            yield
        finally:
            jax.config.update(option, before)
