"""Batches of images: in random order and augmented for training, each image once and in order for evaluation.

Grain shuffles the images, and decodes them ahead of time in threads or worker processes. Batch n depends only on the
data, the recipe and n, not on the number of threads, workers or processes, so a checkpoint stores n and nothing else.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.resource_tracker import ensure_running
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from PIL import Image

from flax_googlenet.images.files import Fail
from flax_googlenet.images.preprocessing import ImageError, centre_crop, normalise
from flax_googlenet.training.augment import augment
from flax_googlenet.training.datasets import DataError, Dataset
from flax_googlenet.training.memory import keep_memory
from flax_googlenet.training.reader import HostBatch, Reader, explained
from flax_googlenet.training.recipe import Recipe

_ATTEMPTS = 100  # more unreadable images in a row mean that the disk is damaged or the folder is the wrong one
# Python's resource tracker is a process that frees the shared memory of killed workers, and warns when it does.
_NO_WARNING = "ignore:resource_tracker:UserWarning"
_THREADS = min(4, os.cpu_count() or 1)  # at most 4, because each thread holds a batch of its own in memory


def train_batches(
    dataset: Dataset,
    recipe: Recipe,
    start: int = 0,
    *,
    stopped: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = print,
    process_index: int = 0,
    process_count: int = 1,
) -> Reader:
    """Return an endless iterator over batches of augmented images, shuffled anew for every epoch.

    An epoch has ``recipe.steps_per_epoch(len(dataset))`` batches; the images that do not fill another batch are left
    out of it. An image that cannot be read is replaced by the next one in ``dataset`` that can.

    Args:
        dataset: The images.
        recipe: The recipe; its ``batch_size`` counts the images of all processes.
        start: Number of the first batch, to go on after as many batches.
        stopped: Returns whether to stop waiting for a batch; the iterator then raises a ``WaitStoppedError``.
        report: Takes a message if a batch has not come for 10 seconds, at most once in 10 minutes.
        process_index: Index of this process, which gets an equal share of the rows of each batch.
        process_count: Number of processes.

    Returns:
        An iterator over batches with ``image`` float32 [b, size, size, 3], normalised; ``label`` int32 [b]; ``index``
        int64 [b], the indices in the dataset that the shuffled order asks for; and ``used`` int64 [b], the indices of
        the images that were read. Its ``close()`` ends its threads and worker processes. It raises a DataError if 100
        images in a row cannot be read, if a worker process died or was suspended, or if no batch comes for 10 minutes.

    Raises:
        DataError: If there are fewer images than a batch needs, or the processes cannot share a batch evenly.
    """
    steps = recipe.steps_per_epoch(len(dataset))
    if steps == 0:
        raise DataError(f"{len(dataset)} images are too few for a batch of {recipe.batch_size}: choose a smaller batch")
    rows = _rows(recipe.batch_size, process_index, process_count)
    # Grain adds the epoch to the seed: unmixed, the second epoch of seed 0 would be the first one of seed 1.
    (seed,) = np.random.SeedSequence(recipe.seed).generate_state(1).tolist()
    batches = (
        grain.MapDataset.range(len(dataset))
        .shuffle(seed=seed)
        .batch(recipe.batch_size, drop_remainder=True)
        .map_with_index(partial(_train_batch, dataset, recipe, rows, steps))
        .repeat()
    )
    return _iterate(batches.slice(slice(start, None)), recipe.workers, stopped, report)


def eval_batches(
    dataset: Dataset,
    recipe: Recipe,
    *,
    fail: Fail,
    stopped: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = print,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[HostBatch]:
    """Yield every image once and in order, preprocessed as for inference.

    Args:
        dataset: The images.
        recipe: The recipe, from which ``batch_size``, ``image_size`` and ``workers`` are used.
        fail: Takes the message about an image of this process that cannot be read.
        stopped: As for ``train_batches``.
        report: As for ``train_batches``.
        process_index: As for ``train_batches``.
        process_count: Number of processes. All of them get the same number of batches.

    Yields:
        Batches with ``image`` float32 [b, size, size, 3], normalised; ``label`` int32 [b]; and ``index`` int64 [b]. An
        image that cannot be read is all zeros and has label -1. The same holds for the rows that fill up the
        last batch; their index is -1, too.

    Raises:
        DataError: If the processes cannot share a batch evenly, if a worker process died or was suspended, or if no
            batch comes for 10 minutes.
    """
    rows = _rows(recipe.batch_size, process_index, process_count)
    indices = np.pad(np.arange(len(dataset)), (0, -len(dataset) % recipe.batch_size), constant_values=-1)
    batches = grain.MapDataset.source(indices.reshape(-1, recipe.batch_size)[:, rows]).map(
        partial(_eval_batch, dataset, recipe.image_size)
    )
    with closing(_iterate(batches, recipe.workers, stopped, report)) as iterator:
        for batch in iterator:
            for message in batch.pop("failures"):
                fail(message)
            yield batch


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size % process_count:
        raise DataError(f"{process_count} processes cannot share a batch of {batch_size} evenly")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _train_batch(
    dataset: Dataset, recipe: Recipe, rows: slice, steps: int, number: int, indices: np.ndarray
) -> HostBatch:
    epoch = number // steps
    index = indices[rows].astype(np.int64)
    used, images = np.empty_like(index), np.empty((len(index), recipe.image_size, recipe.image_size, 3), np.uint8)
    for row, i in enumerate(index):
        used[row], crop = _read(dataset, int(i), recipe, epoch)
        images[row] = np.asarray(crop)
    return {"image": images, "label": dataset.labels[used], "index": index, "used": used}


def _read(dataset: Dataset, index: int, recipe: Recipe, epoch: int) -> tuple[int, Image.Image]:
    """Return the index of the first image from ``index`` on that can be read, and a random crop of it."""
    for i in range(index, index + min(_ATTEMPTS, len(dataset))):
        rng = np.random.default_rng((recipe.seed, epoch, index))
        try:
            return i % len(dataset), augment(partial(dataset.read, i % len(dataset)), recipe, rng)
        except ImageError as error:
            last = error
    count = i + 1 - index
    raise DataError(f"{count} images in a row cannot be read, starting with {dataset.name(index)}; the last: {last}")


def _eval_batch(dataset: Dataset, image_size: int, index: np.ndarray) -> dict[str, Any]:
    images = np.zeros((len(index), image_size, image_size, 3), np.uint8)
    labels = np.full(len(index), -1, np.int32)
    failures = []
    for row, i in enumerate(index):
        if i >= 0:
            try:
                images[row] = np.asarray(centre_crop(dataset.read(i), image_size))
                labels[row] = dataset.labels[i]
            except ImageError as error:
                failures.append(str(error))
    return {"image": images, "label": labels, "index": index, "failures": failures}


def _to_input(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with normalised images, in memory of its own. Rows with the label -1 stay zero.

    Worker processes hand over bytes, which take a quarter of the memory of floats: copying 32 images of 224x224 through
    shared memory takes 20 ms less CPU time.
    """
    images = np.zeros(batch["image"].shape, np.float32)
    for row in np.flatnonzero(batch["label"] >= 0):
        images[row] = normalise(batch["image"][row])
    others = {name: np.array(value) if name != "failures" else value for name, value in batch.items()}
    return others | {"image": images}


def _iterate(
    batches: grain.MapDataset, workers: int, stopped: Callable[[], bool], report: Callable[[str], None]
) -> Reader:
    if workers == 0:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
        return Reader(iter(batches.to_iter_dataset(options).map(_to_input)), workers, stopped, report)
    dataset = (
        batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1), _start_worker)
        .map(_to_input)
    )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which our command lines do not have
    if _NO_WARNING not in sys.warnoptions:
        sys.warnoptions.append(_NO_WARNING)
    ensure_running()  # the resource tracker: starting it later would unblock the signals
    # Processes that are started with blocked signals ignore Ctrl-C and SIGTERM from their first moment on.
    signals_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        iterator = iter(dataset)
        iterator.get_state()  # creates the iterators of the workers, which the next line starts
        iterator.start_prefetch()
        return Reader(iterator, workers, stopped, report)
    except OSError as error:  # the semaphores of the workers are files in /dev/shm, which may be full
        raise explained(error) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals_before)


def _start_worker(worker: int, count: int) -> None:
    """Make a worker process end with its parent, which alone reacts to signals to the process group."""
    keep_memory()  # else decoding a photograph of 12 megapixels takes a third longer, because its pages are taken anew
    jax.config.update("jax_platforms", "cpu")  # so that no use of JAX in a worker takes memory of the GPU
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  every worker has a parent

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
