"""What a run counts, and when it stops."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_googlenet.training.datasets import Dataset
from flax_googlenet.training.stopping import RunCounts, StopSignals, TooManyFailuresError


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Ten images, the first four of them cut off."""
    names = tuple(f"{i}.png" for i in range(10))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for i, name in enumerate(names):
        Image.fromarray(pixels).save(tmp_path / name)
        if i < 4:
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    return Dataset(("a", "b"), np.zeros(10, np.int32), names, str(tmp_path))


def test_an_unreadable_image_is_named_with_the_reason_once(dataset: Dataset) -> None:
    counts, messages = RunCounts(), list[str]()
    counts.add_unreadable(dataset, [2, 2], 1, messages.append)
    counts.add_unreadable(dataset, [2], 1, messages.append)
    assert len(messages) == 1
    assert messages[0].startswith(f"{dataset.name(2)} is damaged or cut off")
    assert messages[0].endswith("; another image takes its place")
    assert counts.unreadable == [dataset.name(2)]


def test_an_image_that_can_be_read_again_counts_too(dataset: Dataset) -> None:
    messages: list[str] = []
    RunCounts().add_unreadable(dataset, [7], 1, messages.append)
    assert messages == [f"{dataset.name(7)} could not be read at first; another image takes its place"]


def test_more_unreadable_images_than_allowed_stop_the_run_after_all_are_reported(dataset: Dataset) -> None:
    counts, messages = RunCounts(), list[str]()
    counts.add_unreadable(dataset, [0, 1, 2, 3], 0.4, messages.append)
    too_many = r"5 of 10 images cannot be read, more than max_corrupt \(40.00%\) allows: .*"
    with pytest.raises(TooManyFailuresError, match=too_many):
        counts.add_unreadable(dataset, [7], 0.4, messages.append)
    assert len(messages) == 5


def test_three_unreadable_images_are_allowed_in_a_small_folder_unless_max_corrupt_is_0(dataset: Dataset) -> None:
    counts = RunCounts()
    counts.add_unreadable(dataset, [0, 1, 2], 0.001, [].append)
    with pytest.raises(TooManyFailuresError, match="4 of 10 images"):
        counts.add_unreadable(dataset, [3], 0.001, [].append)
    with pytest.raises(TooManyFailuresError, match="1 of 10 images"):
        RunCounts().add_unreadable(dataset, [0], 0, [].append)


def test_5_steps_in_a_row_that_are_not_finite_stop_the_run() -> None:
    counts, messages = RunCounts(), list[str]()
    for finite in [False] * 4 + [True] + [False] * 4:
        counts.step += 1
        counts.add_finite(finite, messages.append)
    assert [message.split()[1] for message in messages] == ["1", "2", "3", "4", "6", "7", "8", "9"]
    with pytest.raises(TooManyFailuresError, match="not finite in 5 steps in a row"):
        counts.add_finite(False, messages.append)
    assert counts.not_finite == 9


def test_of_equal_accuracies_the_first_is_the_best_and_a_repeated_evaluation_changes_nothing() -> None:
    counts = RunCounts()
    found = []
    for counts.step, accuracy in ((4, 0.0), (8, 0.5), (8, 0.5), (12, 0.5), (16, 0.25), (20, 0.75)):
        found.append(counts.add_accuracy(accuracy))
    assert found == [True, True, False, False, False, True]
    assert (counts.best_step, counts.best_accuracy) == (20, 0.75)


def test_signals_stay_as_they_are_in_another_thread_which_cannot_handle_them() -> None:
    def train() -> object:
        with StopSignals() as signals:
            return signals.received

    with ThreadPoolExecutor() as pool:
        assert pool.submit(train).result() is None
