"""HostBatch n is the same whoever makes it, a replaced image shows, and workers end with their run."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
import reference
from jax._src import xla_bridge
from PIL import Image

from flax_googlenet import ImageError, preprocess
from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD
from flax_googlenet.images.preprocessing import Reduction
from flax_googlenet.training import reader
from flax_googlenet.training.data import eval_batches, train_batches
from flax_googlenet.training.datasets import DataError, Dataset
from flax_googlenet.training.reader import HostBatch, Reader, WaitStoppedError
from flax_googlenet.training.recipe import Recipe

RECIPE = Recipe(batch_size=4, image_size=32, interpolation="random", distortion=True)


def take(batches: Iterator[HostBatch], count: int) -> list[HostBatch]:
    return list(itertools.islice(batches, count))


def assert_equal(first: list[HostBatch], second: list[HostBatch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


def colours(array: np.ndarray) -> np.ndarray:
    return np.rint((array * IMAGENET_STD + IMAGENET_MEAN) * 255).astype(np.uint8)


def as_dataset(*paths: Path) -> Dataset:
    return Dataset(("any",), np.zeros(len(paths), np.int32), tuple(map(str, paths)))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eleven JPEG files of random parts of photographs, in two classes."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(11):
        top, left = rng.integers(0, 200, 2)
        path = folder / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(reference.photographs()[i % 2][top : top + 90, left : left + 120]).save(path)
    paths = sorted(folder.glob("*/*"))
    labels = np.array([path.parent.name == "b" for path in paths], np.int32)
    return Dataset(("a", "b"), labels, tuple(str(path.relative_to(folder)) for path in paths), str(folder))


@pytest.fixture(scope="module")
def expected(photographs: Dataset) -> list[HostBatch]:
    """Seven batches, which are three and a half epochs, made by one process without workers."""
    return take(train_batches(photographs, RECIPE), 7)


def test_batches_have_the_promised_shapes_and_the_labels_of_their_images(
    photographs: Dataset, expected: list[HostBatch]
) -> None:
    for batch in expected:
        assert {key: (array.dtype, array.shape) for key, array in batch.items()} == {
            "image": (np.float32, (4, 32, 32, 3)),
            "label": (np.int32, (4,)),
            "index": (np.int64, (4,)),
            "used": (np.int64, (4,)),
        }
        np.testing.assert_array_equal(batch["used"], batch["index"])
        np.testing.assert_array_equal(batch["label"], photographs.labels[batch["index"]])
        assert np.isfinite(batch["image"]).all()
        assert (abs(batch["image"]).max(axis=(1, 2, 3)) > 0.5).all()


def test_an_epoch_shows_each_image_at_most_once_in_an_order_of_its_own(photographs: Dataset) -> None:
    epochs = np.concatenate([batch["index"] for batch in take(train_batches(photographs, RECIPE), 200)]).reshape(-1, 8)
    assert all(len(set(epoch)) == 8 for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 95  # of 100
    assert np.bincount(epochs.ravel(), minlength=11).min() > 50  # other epochs have the images that one leaves out


def test_pixels_depend_on_seed_epoch_and_image(photographs: Dataset) -> None:
    def seen(seed: int) -> list[bytes]:
        batches = take(train_batches(photographs, replace(RECIPE, seed=seed)), 8)
        return [image.tobytes() for batch in batches for image in batch["image"]]

    assert len(set(seen(0))) == len(seen(0))  # no epoch repeats the pixels of another
    assert not set(seen(0)) & set(seen(1))  # and no run those of another seed


@pytest.mark.slow
@pytest.mark.parametrize(("start", "workers"), [(0, 2), (3, 0), (3, 2)])
def test_batches_are_the_same_from_any_start_and_by_any_number_of_workers(
    start: int, workers: int, photographs: Dataset, expected: list[HostBatch]
) -> None:
    with closing(train_batches(photographs, replace(RECIPE, workers=workers), start)) as batches:
        assert_equal(take(batches, 7 - start), expected[start:])


def test_two_processes_give_the_batches_of_one(photographs: Dataset, expected: list[HostBatch]) -> None:
    halves = [take(train_batches(photographs, RECIPE, process_index=i, process_count=2), 7) for i in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)]
    assert len(halves[0][0]["label"]) == 2
    assert_equal(joined, expected)


def test_a_dataset_smaller_than_a_batch_is_refused(photographs: Dataset) -> None:
    with pytest.raises(DataError, match="11 images are too few for a batch of 12"):
        train_batches(photographs, replace(RECIPE, batch_size=12))


def test_a_batch_that_processes_cannot_share_is_refused(photographs: Dataset) -> None:
    with pytest.raises(DataError, match="3 processes cannot share a batch of 4"):
        train_batches(photographs, RECIPE, process_count=3)
    with pytest.raises(DataError, match="3 processes cannot share a batch of 4"):
        next(eval_batches(photographs, RECIPE, fail=print, process_count=3))


@pytest.fixture
def damaged(tmp_path: Path) -> Dataset:
    """Eight files, of which 2 (cut off), 3 (text) and 7 (empty) cannot be read."""
    for i in range(8):
        Image.fromarray(reference.photographs()[0][40 * i : 40 * i + 40, :60]).save(tmp_path / f"{i}.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:600])
    (tmp_path / "3.jpg").rename(tmp_path / "3.png").write_text("text")
    (tmp_path / "7.jpg").write_bytes(b"")
    return replace(as_dataset(*sorted(tmp_path.iterdir())), labels=np.arange(8, dtype=np.int32))


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_one_and_that_shows(damaged: Dataset) -> None:
    first, second = (take(train_batches(damaged, RECIPE), 4) for _ in range(2))
    assert_equal(first, second)
    indices = np.concatenate([batch["index"] for batch in first])
    used = np.concatenate([batch["used"] for batch in first])
    labels = np.concatenate([batch["label"] for batch in first])
    assert sorted(indices.tolist()) == sorted([*range(8), *range(8)])
    replacement = {2: 4, 3: 4, 7: 0}
    assert used.tolist() == [replacement.get(i, i) for i in indices.tolist()]
    np.testing.assert_array_equal(labels, used)
    with pytest.raises(ImageError, match=r"2\.jpg is damaged or cut off"):
        damaged.read(2)


def test_a_run_whose_images_cannot_be_read_ends_with_an_error(tmp_path: Path) -> None:
    for i in range(120):
        (tmp_path / f"{i:03}.jpg").write_text("text")
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"100 images in a row cannot be read, starting with .*jpg; the last: .*not an"):
        next(train_batches(as_dataset(*paths), RECIPE))
    with pytest.raises(DataError, match="5 images in a row"):
        next(train_batches(as_dataset(*paths[:5]), RECIPE))


KINDS = ["cmyk.jpg", "palette.png", "16-bit.png", "alpha.png", "turned.jpg", "one-pixel.png", "wide.png"]


@pytest.fixture
def kinds(tmp_path: Path) -> Dataset:
    """A file of each of ``KINDS``, in the colour (200, 200, 200); the turned one is black on its right."""
    image, exif = Image.new("RGB", (64, 64), (200, 200, 200)), Image.Exif()
    exif[274] = 6  # the image has to be turned by 90 degrees clockwise
    half = image.copy()
    half.paste((0, 0, 0), (0, 0, 64, 32))
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.quantize(4).save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(np.full((64, 64), 200 * 257, np.uint16)).save(tmp_path / "16-bit.png")
    Image.new("RGBA", (64, 64), (200, 200, 200, 9)).save(tmp_path / "alpha.png")
    half.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    image.resize((1, 1)).save(tmp_path / "one-pixel.png")
    image.resize((20000, 1)).save(tmp_path / "wide.png")
    return as_dataset(*(tmp_path / name for name in KINDS))


def test_every_kind_of_image_gives_its_colours(kinds: Dataset) -> None:
    (batch,) = eval_batches(kinds, replace(RECIPE, batch_size=len(KINDS)), fail=pytest.fail)
    for name, image in zip(KINDS, colours(batch["image"]).astype(int), strict=True):
        visible = image[:, :14] if name == "turned.jpg" else image
        assert abs(visible - 200).max() <= 3, name
    assert colours(batch["image"][KINDS.index("turned.jpg")])[:, 18:].max() <= 3
    plain = replace(RECIPE, batch_size=len(KINDS), distortion=False, flip=False)
    for batch in take(train_batches(kinds, plain), 3):
        np.testing.assert_array_equal(batch["used"], batch["index"])
        for index, image in zip(batch["index"], colours(batch["image"]).astype(int), strict=True):
            assert KINDS[index] == "turned.jpg" or abs(image - 200).max() <= 3


def test_an_image_of_too_many_pixels_is_an_error_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (100, 100)).save(tmp_path / "huge.png")
    messages: list[str] = []
    (batch,) = eval_batches(as_dataset(tmp_path / "huge.png"), replace(RECIPE, batch_size=1), fail=messages.append)
    assert batch["label"].tolist() == [-1]
    assert len(messages) == 1
    assert messages[0].startswith(f"{tmp_path}/huge.png has more than 1000 pixels")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once_in_order_and_pads_the_last_batch(photographs: Dataset, workers: int) -> None:
    recipe = replace(RECIPE, image_size=224, workers=workers)
    batches = list(eval_batches(photographs, recipe, fail=pytest.fail))
    assert np.concatenate([batch["index"] for batch in batches]).tolist() == [*range(11), -1]
    assert np.concatenate([batch["label"] for batch in batches]).tolist() == [*photographs.labels, -1]
    images = np.concatenate([batch["image"] for batch in batches])
    for i in range(11):
        np.testing.assert_array_equal(images[i], preprocess(photographs.name(i)))
    assert not images[11].any()


def test_processes_share_an_evaluation_in_as_many_batches_each(photographs: Dataset) -> None:
    recipe = replace(RECIPE, batch_size=10)
    alone = list(eval_batches(photographs, recipe, fail=pytest.fail))
    halves = [
        list(eval_batches(photographs, recipe, fail=pytest.fail, process_index=i, process_count=2)) for i in range(2)
    ]
    assert_equal([{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)], alone)
    assert len(alone) == 2


def test_evaluation_names_the_images_that_it_cannot_read(damaged: Dataset) -> None:
    messages: list[str] = []
    batches = list(eval_batches(damaged, replace(RECIPE, batch_size=8), fail=messages.append))
    assert batches[0]["label"].tolist() == [0, 1, -1, -1, 4, 5, 6, -1]
    assert [damaged.name(i) in message for i, message in zip((2, 3, 7), messages, strict=True)] == [True] * 3


@pytest.mark.slow
def test_no_worker_is_left_after_its_iterator(photographs: Dataset) -> None:
    before = set(multiprocessing.active_children())
    recipe = replace(RECIPE, workers=1)
    closed, forgotten = train_batches(photographs, recipe), train_batches(photographs, recipe)
    left_early = eval_batches(photographs, replace(recipe, batch_size=2), fail=pytest.fail)
    for batches in (closed, forgotten, left_early):
        next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 3
    closed.close()
    del batches, forgotten, left_early
    assert set(multiprocessing.active_children()) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "message"),
    [
        (
            signal.SIGKILL,
            "was killed by SIGKILL, as the kernel does when memory runs out: choose fewer workers",
        ),
        (signal.SIGBUS, r"/dev/shm, .*, is full at \d+ MiB: choose fewer workers, .* \(docker run --shm-size"),
        (signal.SIGSTOP, r"suspended \(SIGSTOP\) for 5 seconds: .* 0 workers"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_noticed_and_none_is_left(
    signal_number: signal.Signals, message: str, photographs: Dataset
) -> None:
    before = set(multiprocessing.active_children())
    with closing(train_batches(photographs, replace(RECIPE, workers=1))) as batches:
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - before
        start = time.monotonic()
        os.kill(worker.pid, signal_number)  # SIGBUS is what writing to a full /dev/shm gives
        with pytest.raises(DataError, match=message):
            take(batches, 100)  # some batches are made already
        assert time.monotonic() - start < 10
    assert set(multiprocessing.active_children()) == before


@pytest.fixture
def hanging() -> Iterator[tuple[Dataset, threading.Event]]:
    """Return a dataset whose images do not come, and an event that is set when one is asked for."""
    asked, released = threading.Event(), threading.Event()

    class Hanging(Dataset):
        def read(self, index: int, reduction: Reduction | None = None) -> Image.Image:
            asked.set()
            released.wait()
            return Image.new("RGB", (1, 1))

    yield Hanging(("any",), np.zeros(4, np.int32), ("0", "1", "2", "3")), asked
    released.set()


def test_waiting_for_an_image_that_never_comes_ends_when_the_run_stops(
    hanging: tuple[Dataset, threading.Event],
) -> None:
    dataset, asked = hanging
    batches = train_batches(dataset, RECIPE, stopped=asked.is_set)
    with pytest.raises(WaitStoppedError):
        next(batches)


def test_waiting_for_an_image_that_never_comes_is_reported_once_and_ends_with_an_error(
    hanging: tuple[Dataset, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_NOTICE_SECONDS", 0.5)
    monkeypatch.setattr(reader, "HANG_SECONDS", 1.5)
    messages: list[str] = []
    batches = train_batches(hanging[0], RECIPE, report=messages.append)
    with pytest.raises(DataError, match=r"no batch came for 0\.025 minutes: reading the images hangs"):
        next(batches)
    assert len(messages) == 1
    assert "no batch came for 0.5 seconds" in messages[0]


@pytest.mark.parametrize(("quiet_seconds", "is_reported"), [(0.0, True), (600.0, False)])
def test_another_wait_is_reported_unless_it_comes_soon_after_the_last_report(
    quiet_seconds: float, is_reported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(reader, "_QUIET_SECONDS", quiet_seconds)
    messages: list[str] = []

    def wait_for_a_report(number: int) -> HostBatch:
        before, deadline = len(messages), time.monotonic() + (60 if is_reported or number == 0 else 1)
        while len(messages) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"label": np.full(1, number)}

    dataset = grain.MapDataset.source([0, 1]).map(wait_for_a_report)
    one_at_a_time = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    iterator = iter(dataset.to_iter_dataset(one_at_a_time))
    with closing(Reader(iterator, 0, stopped=lambda: False, report=messages.append)) as batches:
        next(batches)
        reports = len(messages)
        next(batches)
    assert reports > 0
    assert (len(messages) > reports) == is_reported


def test_a_worker_cannot_use_a_gpu_and_has_not_started_jax() -> None:
    class Reporting(Dataset):
        def read(self, index: int, reduction: Reduction | None = None) -> Image.Image:
            platform, started = jax.config.jax_platforms, xla_bridge.backends_are_initialized()
            return Image.new("RGB", (1, 1), (255 * (platform == "cpu"), 255 * started, 0))

    dataset = Reporting(("any",), np.zeros(4, np.int32), ("0", "1", "2", "3"))
    batches = train_batches(dataset, replace(RECIPE, workers=1, distortion=False))
    image = next(batches)["image"]
    batches.close()
    np.testing.assert_array_equal(np.unique(colours(image).reshape(-1, 3), axis=0), [[255, 0, 0]])


RUN = """
import signal, sys
from contextlib import closing
from dataclasses import replace
from flax_googlenet.training.data import train_batches
from flax_googlenet.training.recipe import PRESETS
from flax_googlenet.training.splits import open_data
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
def run():  # in a function, because a global would be closed again while Python shuts down
    data = open_data("digits", held_out=0.2, seed=0)[0]
    print("starting", flush=True)
    with closing(train_batches(data, replace(PRESETS["digits"], workers=2))) as batches:
        next(batches)
        print("running", flush=True)
        while not stopped:
            next(batches)
        for _ in range(20):
            next(batches)
try:
    run()
except KeyboardInterrupt:
    sys.exit(130)
print("finished", flush=True)
"""


READ_TWICE = """
from contextlib import closing
from dataclasses import replace
from multiprocessing.resource_tracker import ensure_running
from flax_googlenet.training.data import eval_batches
from flax_googlenet.training.recipe import PRESETS
from flax_googlenet.training.splits import open_data
if __name__ == "__main__":
    ensure_running()  # before eval_batches, which silences its warnings
    data = open_data("digits", held_out=0.1, seed=0)[1]
    recipe = replace(PRESETS["digits"], batch_size=64, workers=1)
    with closing(eval_batches(data, recipe, fail=print)) as batches:
        left_early = next(batches)
    *_, last = eval_batches(data, recipe, fail=print)
"""


@pytest.mark.slow
def test_a_process_that_still_has_batches_leaves_no_shared_memory(tmp_path: Path) -> None:
    script = tmp_path / "read_twice.py"
    script.write_text(READ_TWICE)
    process = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def run_until(word: str, signal_number: int, delay: float) -> tuple[int, str, str]:
    """Return the status, output and errors of a run whose process group gets a signal ``delay`` seconds after a word.

    Every process of the run keeps the output open, so all of them have ended when the output ends.
    """
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while word not in (line := process.stdout.readline()):
            assert line
        time.sleep(delay)
        try:
            if signal_number == signal.SIGKILL:
                process.kill()
            else:
                os.killpg(process.pid, signal_number)
            output, errors = process.communicate(timeout=30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output, errors


@pytest.mark.slow
@pytest.mark.parametrize(("word", "delay"), [("starting", 0.5), ("running", 0.2)])
def test_ctrl_c_ends_a_run_and_its_workers_quietly(word: str, delay: float) -> None:
    status, _, errors = run_until(word, signal.SIGINT, delay)
    assert (status, errors) == (130, "")


@pytest.mark.slow
def test_sigterm_to_all_leaves_the_workers_to_the_run() -> None:
    status, output, errors = run_until("running", signal.SIGTERM, 0.2)
    assert (status, output, errors) == (0, "finished\n", "")


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed() -> None:
    status, _, _ = run_until("running", signal.SIGKILL, 0.2)
    assert status == -signal.SIGKILL
