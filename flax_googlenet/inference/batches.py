"""Answers for batches of images, which engines such as Ray Data pass as columns and take as tables."""

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import jax
import numpy as np
from jax import numpy as jnp
from PIL import Image

from flax_googlenet.architecture import stage_name
from flax_googlenet.errors import listing, printable, url_without_secrets
from flax_googlenet.images.preprocessing import CROP, ImageError, crop, normalise
from flax_googlenet.inference import compiling
from flax_googlenet.inference.predictor import make_predictor, predictions_type, probabilities, rank, sent_ahead
from flax_googlenet.inference.stages import feature_function
from flax_googlenet.weights.checkpoint import load_weights, require_finite
from flax_googlenet.weights.pretrained import PRETRAINED, pretrained_file

if TYPE_CHECKING:
    import pyarrow

Batch = Mapping[str, np.ndarray]
"""The columns of a batch of rows, by name."""


def decode_batch(batch: Batch, size: int = CROP, *, threads: int = 16) -> dict[str, np.ndarray]:
    """Read the images of a batch and crop them as ``preprocess`` does, for a ``BatchPredictor`` on another machine.

    Args:
        batch: Columns of N rows: ``bytes`` with the contents of image files or ``path`` with their paths, and ``image``
            with their names. Without ``image``, the paths are the names. A path with ``://`` is a URL of an object
            store that PyArrow can open, such as ``s3://bucket/photo.jpg``.
        size: Height and width of the pixels, as for ``preprocess``.
        threads: Number of images that are read at once.

    Returns:
        The columns ``image``, the names; ``pixels``, uint8 [N, size, size, 3], RGB; and ``error``, which says why an
        image cannot be read, or is empty.

    Raises:
        ValueError: If columns are missing.
    """
    if "path" not in batch and not {"image", "bytes"} <= batch.keys():
        raise ValueError(f"a batch needs the column path, or image and bytes, and this one has {listing(batch)}")

    def read(source: Any) -> tuple[np.ndarray | int, str]:
        try:
            return np.asarray(crop(source if "bytes" in batch else _file(source), size)), ""
        except ImageError as error:
            return 0, printable(str(error))

    names = batch["image" if "image" in batch else "path"]
    pixels, errors = np.empty((len(names), size, size, 3), np.uint8), np.empty(len(names), object)
    with ThreadPoolExecutor(threads) as pool:
        for row, result in enumerate(pool.map(read, batch["bytes" if "bytes" in batch else "path"])):
            pixels[row], errors[row] = result
    return {"image": names, "pixels": pixels, "error": errors}


class BatchPredictor:
    """A callable class from batches of images to rows of answers, for ``map_batches`` of Ray Data and similar engines.

    A worker makes one object, which reads the weights and compiles the network once, and calls it with one batch after
    another. The answers are those of the commands ``classify`` and ``features``. It needs PyArrow.

    Example::

        rows = ray.data.read_binary_files("photos", include_paths=True).map_batches(
            BatchPredictor, fn_constructor_args=["imagenet"], batch_size=256
        )
        rows.write_parquet("answers")

    Args:
        weights: File of weights, which every worker can read, or a name of ``pretrained`` weights, which every machine
            downloads once.
        top: Number of classes in a row, the likeliest first.
        stage: Name of a stage or branch, as ``endpoints`` takes it. Rows then have its features in place of classes.
        batch_size: Number of images that are computed at once. The last images of a batch are padded to it, so that an
            image has the same answer in every batch.

    Raises:
        CheckpointError: If the file of weights cannot be read.
        DownloadError: If the pretrained weights cannot be downloaded.
        ValueError: If ``top`` or ``batch_size`` is less than 1, or there is no such stage.
    """

    def __init__(
        self, weights: str | os.PathLike[str], *, top: int = 5, stage: str | None = None, batch_size: int = 32
    ) -> None:
        import pyarrow

        if top < 1 or batch_size < 1:
            raise ValueError(f"top and batch_size must be at least 1, got {top} and {batch_size}")
        compiling.use_compilation_cache()
        path = os.fspath(pretrained_file(str(weights)) if str(weights) in PRETRAINED else weights)
        loaded = load_weights(path, dtype=np.float32)
        self._path, self._weights, self._image_size = path, loaded.digest, loaded.image_size
        self._class_names, self._top = loaded.class_names, min(top, loaded.model.num_classes)
        self._batch_size, self._is_classifier = batch_size, stage is None
        every_level = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2))
        self._levels = jax.device_put(normalise(every_level)[:, 0])  # [256, 3]
        if stage is None:
            self._compute: Callable[[jax.Array], jax.Array] = make_predictor(loaded.model, loaded.variables)
            answer = pyarrow.field("predictions", predictions_type())
        else:
            require_finite(path, loaded)
            compute = feature_function(loaded.model, stage_name(stage, loaded.model.variant))
            self._compute = functools.partial(compute, jax.device_put(loaded.variables))
            pixels = jax.ShapeDtypeStruct((1, self._image_size, self._image_size, 3), jnp.float32)
            channels = compute.eval_shape(loaded.variables, pixels).shape[1]
            answer = pyarrow.field("features", pyarrow.list_(pyarrow.float32(), channels))
        text = pyarrow.string()
        self._schema = pyarrow.schema([("image", text), answer, ("weights", text), ("error", text)])

    def __call__(self, batch: Batch) -> "pyarrow.Table":
        """Return a row for each image of a batch.

        Args:
            batch: Columns of any number of rows, as ``decode_batch`` takes or returns them.

        Returns:
            A table with the columns ``image``, the name; ``predictions``, a list of ``{"index", "label",
            "probability"}``, or ``features``, a list of float32; ``weights``, the first 16 digits of the sha256 of the
            file of weights; and ``error``. If an image cannot be read, its ``error`` has the reason, and it has no
            answer. Otherwise ``error`` is null.

        Raises:
            CheckpointError: If the logits are not finite.
            ValueError: If columns are missing.
        """
        import pyarrow

        decoded = batch if "pixels" in batch else decode_batch(batch, self._image_size)
        pixels, errors = decoded["pixels"], decoded["error"]
        readable = np.flatnonzero(errors == "")
        answers: list[Any] = [None] * len(errors)
        rows = (readable[start : start + self._batch_size] for start in range(0, len(readable), self._batch_size))
        for indices, results in sent_ahead(lambda indices: self._send(pixels[indices]), rows):
            for row, answer in zip(indices, self._answers(np.asarray(results)[: len(indices)]), strict=True):
                answers[row] = answer
        columns = list(decoded["image"]), answers, [self._weights] * len(answers), [error or None for error in errors]
        return pyarrow.table(list(map(pyarrow.array, columns, self._schema.types)), self._schema)

    def _send(self, pixels: np.ndarray) -> jax.Array:
        if missing := self._batch_size - len(pixels):
            pixels = np.pad(pixels, [(0, missing), (0, 0), (0, 0), (0, 0)])
        return self._compute(_look_up(self._levels, pixels))

    def _answers(self, results: np.ndarray) -> list[Any]:
        if not self._is_classifier:
            return list(results)
        return [rank(row, self._top, self._class_names) for row in probabilities(results, self._path)]


@jax.jit
def _look_up(levels: jax.Array, pixels: jax.Array) -> jax.Array:
    """Normalise uint8 pixels on the device, so that only a quarter of the bytes is sent to it.

    XLA multiplies by the reciprocal of a divisor, which rounds differently. Looked up, the values have the bits of
    ``normalise``.
    """
    return levels[pixels, jnp.arange(3)]  # [N, H, W, 3]


def _file(path: Any) -> Any:
    """Return a local path as a str, and the contents of the file that a URL names."""
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str) or "://" not in path:
        return path
    from pyarrow import ArrowException

    url = urlsplit(path)
    try:
        filesystem, root = _filesystem(url._replace(path="/", fragment="").geturl())
        with filesystem.open_input_stream(f"{root.rstrip('/')}/{unquote(url.path).lstrip('/')}") as file:
            return file.read()
    except (OSError, ArrowException) as error:
        raise ImageError(f"{url_without_secrets(path)}: {str(error).splitlines()[0]}") from error


@functools.cache
def _filesystem(url: str) -> tuple[Any, str]:
    """Return PyArrow's file system of an object store, and the path of the store's root in it."""
    from pyarrow import fs

    return fs.FileSystem.from_uri(url)
