"""The rows of ``BatchPredictor`` for real image files, against those of ``classify`` and ``features``."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import reference
from PIL import Image
from pyarrow import parquet
from serving import serve_objects

import flax_googlenet
from flax_googlenet import BatchPredictor, GoogLeNet, decode_batch
from flax_googlenet.commands.cli import main
from flax_googlenet.inference.batches import Batch

READABLE = [f"photos/{i}.jpg" for i in range(8)]
UNREADABLE = ["photos/cut.jpg", "photos/empty.jpg", "photos/text.jpg"]
NAMES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder: the weights of a network for images of 32x32 pixels, 8 photographs, and 3 damaged ones.

    ``classify`` computes 8 images at once on a CPU, and so do these tests. Smaller batches may differ in the last bits.
    """
    folder = tmp_path_factory.mktemp("batches")
    tensors = reference.random_checkpoint(num_classes=10)
    state_dict = {name: tensor.numpy() for name, tensor in tensors.items() if not name.startswith("aux")}
    model, variables = GoogLeNet(num_classes=10, aux_logits=False), flax_googlenet.from_torchvision(state_dict)
    metadata = {"class_names": NAMES, "recipe": {"image_size": 32}}
    flax_googlenet.save(folder / "weights.safetensors", model, variables, metadata)
    (folder / "photos").mkdir()
    for i, path in enumerate(READABLE):
        photograph = reference.photographs()[i % 2][20 * i : 20 * i + 90, 30 * i : 30 * i + 70]
        Image.fromarray(photograph).save(folder / path, exif=Image.Exif() if i else bytes(turned()))
    whole = (folder / READABLE[1]).read_bytes()
    for path, content in zip(UNREADABLE, (whole[: len(whole) // 2], b"", b"a letter"), strict=True):
        (folder / path).write_bytes(content)
    return folder


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: a quarter turn
    return exif.tobytes()


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def predict(folder: Path) -> BatchPredictor:
    return BatchPredictor(folder / "weights.safetensors", top=3, batch_size=8)


def column(values: list[str] | list[bytes]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def of_paths(paths: list[str]) -> Batch:
    return {"path": column(paths)}


def of_bytes(paths: list[str]) -> Batch:
    return {"image": column(paths), "bytes": column([Path(path).read_bytes() for path in paths])}


def of_pixels(paths: list[str]) -> Batch:
    return decode_batch(of_paths(paths), 32)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [of_paths, of_bytes, of_pixels])
def test_the_rows_have_the_answers_of_classify_to_the_bit(
    batch: type[Batch], predict: BatchPredictor, tmp_path: Path
) -> None:
    output = tmp_path / "rows.parquet"
    options = ("--weights", "weights.safetensors", "--top", "3", "--output", str(output))
    assert main(["classify", "photos", *options]) == 1
    rows = predict(batch([*READABLE, *UNREADABLE]))
    assert rows.filter(rows["error"].is_null()).drop_columns("error").equals(parquet.read_table(output))


def test_an_image_that_cannot_be_read_has_the_reason_in_its_row(predict: BatchPredictor) -> None:
    rows = predict(of_paths([UNREADABLE[0], READABLE[0], *UNREADABLE[1:], "photos/none.jpg"])).to_pylist()
    assert [row["image"] for row in rows] == [UNREADABLE[0], READABLE[0], *UNREADABLE[1:], "photos/none.jpg"]
    assert [row["predictions"] is None for row in rows] == [True, False, True, True, True]
    for row, reason in zip(rows, ("cut off", None, "is empty", "not an image", "no such file"), strict=True):
        assert row["error"] is None if reason is None else reason in row["error"] and row["image"] in row["error"]


def test_an_image_has_the_same_answer_in_every_batch(predict: BatchPredictor) -> None:
    together = predict(of_paths(READABLE + READABLE[:3]))
    alone = pyarrow.concat_tables([predict(of_paths([path])) for path in READABLE + READABLE[:3]])
    assert together.equals(alone)


def test_a_batch_without_rows_has_no_answers_and_the_same_columns(predict: BatchPredictor) -> None:
    rows = predict(of_paths([]))
    assert len(rows) == 0
    assert rows.schema == predict(of_paths(READABLE[:1])).schema


@pytest.mark.slow
def test_the_features_are_those_of_the_command(tmp_path: Path) -> None:
    output = tmp_path / "features.parquet"
    options = ("--weights", "weights.safetensors", "--stage", "inception3a", "--batch-size", "8")
    assert main(["features", "photos", *options, "--output", str(output)]) == 1
    rows = BatchPredictor("weights.safetensors", stage="mixed3a", batch_size=8)(of_paths([*READABLE, *UNREADABLE]))
    features = rows["features"].combine_chunks()
    assert rows["image"].to_pylist() == [*READABLE, *UNREADABLE]
    assert features.null_count == len(UNREADABLE)
    assert features.drop_null().equals(parquet.read_table(output)["features"].combine_chunks())


@pytest.mark.parametrize("columns", [("image",), ("bytes",), ("picture", "name")])
def test_a_batch_without_images_is_refused(columns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"path, or image and bytes, .* has {', '.join(columns)}"):
        decode_batch({name: column(["a"]) for name in columns})


@pytest.mark.parametrize("options", [{"top": 0}, {"batch_size": 0}, {"stage": "inception9z"}])
def test_a_wrong_option_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"top and batch_size|inception9z"):
        BatchPredictor("weights.safetensors", **options)


def test_images_come_from_an_object_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "password")
    with serve_objects("bucket", {path: (folder / path).read_bytes() for path in READABLE}) as query:
        urls = [f"s3://bucket/{path}?{query}" for path in [*READABLE, "photos/none.jpg"]]
        stored = decode_batch({"path": column(urls)}, 32)
    np.testing.assert_array_equal(stored["pixels"][:-1], of_pixels(READABLE)["pixels"])
    assert stored["error"][:-1].tolist() == [""] * len(READABLE)
    assert stored["error"][-1].startswith("s3://bucket/photos/none.jpg: ")


def test_workers_need_no_ray(folder: Path) -> None:
    """Other engines map functions over batches, too."""
    script = "import sys, flax_googlenet.inference.batches; print(*(name for name in sys.modules if name == 'ray'))"
    process = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=True)
    assert process.stdout == "\n"
