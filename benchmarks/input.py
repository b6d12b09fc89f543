"""Compare the input alone, without a network, side by side: torchvision's data loading and this library's.

Each engine reads a folder of JPEG files and makes batches of 224x224 pixels, once for training (a random crop, mirrored
half of the time) and once for evaluation (the preset's resize and centre crop). The files are made of two photographs,
at quality 92. torchvision reads them by ImageFolder and a DataLoader with 2 workers. This library reads them in threads
or with 2 workers. In each turn an engine starts anew and goes through the folder once; the others are idle then. The
table has medians: images per second, images per second of CPU time (of all processes of the engine), and the seconds
until the first batch. The rates count from the second batch on: both workers have started then.

    pip install -e ".[benchmark]"
    python benchmarks/input.py
"""

import contextlib
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from side_by_side import (
    QUICK_SIZE,
    Worker,
    is_quick,
    machine,
    parse_arguments,
    print_header,
    print_row,
    progress,
    scratch,
    take_turns,
)

WORKERS = 2
QUALITY = 92

PICTURES = {(500, 375): (64, 2048), (4000, 3000): (8, 256)}
"""By width and height: the number of different pictures, and the number of files, which are links to the pictures."""

Load = Callable[[Path, bool, int], Iterator[Any]]
"""Takes a folder, whether the batches are for training, and the number of images in one; yields the batches."""


def torchvision(folder: Path, train: bool, batch: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD

    if train:
        crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(256), transforms.CenterCrop(224)]
    to_input = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    images = ImageFolder(folder, transforms.Compose([*crop, *to_input]))
    # As on Linux by default. This process was spawned, so its children would be, too, which takes seconds longer.
    return iter(DataLoader(images, batch, shuffle=train, num_workers=WORKERS, multiprocessing_context="fork"))


def flax(folder: Path, train: bool, batch: int, workers: int = 0) -> Iterator[Any]:
    from flax_googlenet.training import Recipe, keep_memory
    from flax_googlenet.training.class_folders import read_class_folders
    from flax_googlenet.training.data import eval_batches, train_batches

    keep_memory()  # as flax-googlenet train does
    images, recipe = read_class_folders(str(folder)), Recipe(batch_size=batch, workers=workers)
    if not train:
        yield from eval_batches(images, recipe, fail=print)
        return
    with contextlib.closing(train_batches(images, recipe)) as batches:
        for _ in range(len(images) // batch):
            yield next(batches)


ENGINES: dict[str, Load] = {
    f"torchvision, {WORKERS} workers": torchvision,
    "train_batches, eval_batches": flax,
    f"the same, {WORKERS} workers": functools.partial(flax, workers=WORKERS),
}


def main() -> None:
    """Run the benchmark and print its table in Markdown."""
    arguments = parse_arguments(__doc__, ENGINES, batches=[32], rounds=3)
    kinds = {(QUICK_SIZE, QUICK_SIZE): (2, 256)} if is_quick() else PICTURES
    print(machine("torch", "torchvision", "pillow", "grain", "numpy") + "\n")
    print_header("", "engine", "images/s", "images per second of CPU time", "first batch, s")
    with scratch() as folder, contextlib.ExitStack() as processes:
        workers = {
            name: processes.enter_context(Worker(name, folder, functools.partial(load, name)))
            for name in arguments.engines
        }
        for (width, height), (distinct, count) in kinds.items():
            pictures = folder / f"{width}x{height}"
            progress(f"writing {count} files of {pictures.name}")
            write_pictures(pictures, width, height, distinct, count)
            for batch, train in itertools.product(arguments.batches, (True, False)):
                name = f"{pictures.name}, {'training' if train else 'evaluation'}"
                request = {"pictures": pictures, "train": train, "batch": batch}
                report(name, take_turns(workers, arguments.rounds, name, **request))
    print("\nIn brackets: how many times as fast as torchvision.")


def write_pictures(folder: Path, width: int, height: int, distinct: int, count: int) -> None:
    """Write JPEG files in two class folders.

    Photographs that are too small are enlarged to twice their size and continued as in a mirror. A pixel then takes
    about as many bytes as in a camera's file; it would take fewer if they were enlarged as a whole.
    """
    import reference

    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i >= distinct:
            os.link(folder / "ab"[i % distinct % 2] / f"{i % distinct:05}.jpg", path)
            continue
        picture = Image.fromarray(reference.photographs()[i % 2])
        if width > picture.width:
            picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC)
        margins = max(height - picture.height, 0), max(width - picture.width, 0)
        pixels = np.pad(np.asarray(picture), [*((0, margin) for margin in margins), (0, 0)], mode="reflect")
        top, left = rng.integers(pixels.shape[0] - height + 1), rng.integers(pixels.shape[1] - width + 1)
        Image.fromarray(pixels[top : top + height, left : left + width]).save(path, quality=QUALITY)


def load(name: str) -> Callable[..., dict[str, Any]]:
    return functools.partial(go_through, ENGINES[name])


def go_through(batches_of: Load, pictures: Path, train: bool, batch: int) -> dict[str, float]:
    """Go through a folder once, and return the rates and the seconds until the first batch."""
    count = len(list(pictures.glob("*/*"))) // batch
    start = time.perf_counter()
    for number, _ in enumerate(batches_of(pictures, train, batch), 1):
        if number == 1:
            first = time.perf_counter() - start
        if number == WORKERS:
            since, computed = time.perf_counter(), computing_seconds()
        if number == count:
            images, seconds = (count - WORKERS) * batch, time.perf_counter() - since
            cores = (computing_seconds() - computed) / seconds
    return {"rate": images / seconds, "core": images / seconds / cores, "first": first}


def computing_seconds() -> float:
    """Return the seconds for which this process and its children have computed, those that have ended included."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (this, *this.children(recursive=True)))


def report(name: str, answers: dict[str, list[dict[str, Any]]]) -> None:
    """Print the rows for one kind of pictures and batches."""
    medians = {
        engine: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        for engine, turns in answers.items()
    }
    baseline = next(iter(medians.values()))
    for engine, median in medians.items():
        rates = [f"{median[key]:.0f} ({median[key] / baseline[key]:.2f}x)" for key in ("rate", "core")]
        print_row(name, engine, *rates, f"{median['first']:.1f}")


if __name__ == "__main__":
    main()
