"""Batches of images: in random order and augmented for training, each image once for evaluation.

Grain shuffles, and decodes ahead in threads or worker processes. Batch n depends on the data, the recipe and n alone,
not on the number of threads, workers or processes: n is all that a checkpoint needs to hold.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.resource_tracker import ensure_running

import grain
import jax
import numpy as np
from absl import flags
from PIL import Image

from flax_googlenet.images.files import Fail
from flax_googlenet.images.preprocessing import ImageError, preprocess
from flax_googlenet.training.augment import augment
from flax_googlenet.training.datasets import DataError, Dataset
from flax_googlenet.training.reader import HostBatch, Reader, explained
from flax_googlenet.training.recipe import Recipe

_ATTEMPTS = 100  # unreadable images in a row after which it is the disk, or the wrong folder
# Python's resource tracker, a process, frees the memory that a killed worker shared, and would warn about it.
_NO_WARNING = "ignore:resource_tracker:UserWarning"
_THREADS = min(4, os.cpu_count() or 1)  # each decodes a batch of its own: memory


def _never() -> bool:
    return False


def train_batches(
    dataset: Dataset,
    recipe: Recipe,
    start: int = 0,
    *,
    stopped: Callable[[], bool] = _never,
    process_index: int = 0,
    process_count: int = 1,
) -> Reader:
    """Augmented images without end, in an order that is new in each epoch.

    An epoch is ``recipe.steps_per_epoch(len(dataset))`` batches: the images that are left over wait for another epoch's
    order. In place of an image that cannot be read comes the next one in ``dataset`` that can.

    Args:
        dataset: what ``open_data`` found.
        recipe: its ``batch_size`` is that of all processes together.
        start: how many batches were taken before, with whatever number of workers.
        stopped: tells whether to stop waiting for a batch, which then raises a ``WaitStoppedError``.
        process_index, process_count: this process gets the rows of each batch that are its own.

    Returns:
        An iterator of ``image`` float32 [b, size, size, 3], normalised; ``label`` int32 [b]; ``index`` int64 [b], the
        places in the dataset that the order asked for; ``used`` int64 [b], those that were read. Its ``close()`` ends
        threads and worker processes.
        It raises a DataError where 100 images in a row cannot be read, where a worker process died, and where no
        batch comes for 10 minutes.

    Raises:
        DataError: if there are fewer images than a batch needs, or the processes cannot share a batch evenly.
    """
    steps = recipe.steps_per_epoch(len(dataset))
    if steps == 0:
        raise DataError(f"{len(dataset)} images are too few for a batch of {recipe.batch_size}: choose a smaller one")
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
    return _iterate(batches.slice(slice(start, None)), recipe.workers, stopped)


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int,
    fail: Fail,
    workers: int = 0,
    stopped: Callable[[], bool] = _never,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[HostBatch]:
    """Every image once, in order, its middle part.

    Args:
        dataset: what ``open_data`` found.
        batch_size: images in a batch, over all processes.
        image_size: height and width, as for ``flax_googlenet.preprocess``.
        fail: takes the message about an image of this process that cannot be read.
        workers: processes that read images, or 0 for threads.
        stopped: tells whether to stop waiting for a batch, which then raises a ``WaitStoppedError``.
        process_index, process_count: this process gets the rows of each batch that are its own. All processes get the
            same number of batches.

    Yields:
        ``image`` float32 [b, size, size, 3], normalised; ``label`` int32 [b]; ``index`` int64 [b]. Where an image
        cannot be read, and after the last one, label and image are -1 and 0; after the last one the index is -1 too.

    Raises:
        DataError: if the processes cannot share a batch evenly, a worker process died, or no batch comes for 10
            minutes.
    """
    rows = _rows(batch_size, process_index, process_count)
    indices = np.full(-(-len(dataset) // batch_size) * batch_size, -1)
    indices[: len(dataset)] = np.arange(len(dataset))
    batches = grain.MapDataset.source(indices.reshape(-1, batch_size)[:, rows]).map(
        partial(_eval_batch, dataset, image_size)
    )
    with closing(_iterate(batches, workers, stopped)) as iterator:
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
    used, images = np.empty_like(index), []
    for row, i in enumerate(index):
        used[row], image = _read(dataset, int(i))
        images.append(augment(image, recipe, np.random.default_rng((recipe.seed, epoch, i))))
    return {"image": np.stack(images), "label": dataset.labels[used], "index": index, "used": used}


def _read(dataset: Dataset, index: int) -> tuple[int, Image.Image]:
    """The first image from ``index`` on that can be read, and its index."""
    for i in range(index, index + min(_ATTEMPTS, len(dataset))):
        try:
            return i % len(dataset), dataset.read(i % len(dataset))
        except ImageError as error:
            last = error
    count = i + 1 - index
    raise DataError(f"{count} images in a row cannot be read, the first is {dataset.name(index)}; the last: {last}")


def _eval_batch(dataset: Dataset, image_size: int, index: np.ndarray) -> dict[str, np.ndarray | list[str]]:
    images = np.zeros((len(index), image_size, image_size, 3), np.float32)
    labels = np.full(len(index), -1, np.int32)
    failures = []
    for row, i in enumerate(index):
        if i >= 0:
            try:
                images[row] = preprocess(dataset.read(i), image_size)
                labels[row] = dataset.labels[i]
            except ImageError as error:
                failures.append(str(error))
    return {"image": images, "label": labels, "index": index, "failures": failures}


def _iterate(batches: grain.MapDataset, workers: int, stopped: Callable[[], bool]) -> Reader:
    if workers == 0:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
        return Reader(iter(batches.to_iter_dataset(options)), workers, stopped)
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1), _start_worker
    )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which are no part of our command lines
    if _NO_WARNING not in sys.warnoptions:
        sys.warnoptions.append(_NO_WARNING)
    ensure_running()  # Python's resource tracker, whose start would unblock the signals
    try:
        with _signals_blocked():
            iterator = iter(dataset)
            iterator.get_state()  # makes the iterators of the workers, which the next line starts
            iterator.start_prefetch()
            return Reader(iterator, workers, stopped)
    except OSError as error:  # their semaphores are files in /dev/shm
        raise explained(error) from error


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started in it are deaf to Ctrl-C and SIGTERM, from the first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int, count: int) -> None:
    """A worker ends when its parent says so or dies: signals to the whole group are for the parent to act upon."""
    jax.config.update("jax_platforms", "cpu")  # should anything use JAX here: no GPU memory for it
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  a worker has one

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
