"""``flax-googlenet features`` as a person runs it: real images, files, processes and signals."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
import reference
from PIL import Image
from pyarrow import parquet

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.commands import cli, feature_files
from flax_googlenet.commands.feature_files import Source, open_features
from flax_googlenet.commands.status import CommandError
from flax_googlenet.weights.checkpoint import load_weights

IMAGES = [f"photos/{'more/' * (i % 2)}{i}.png" for i in (0, 2, 4, 6, 1, 3, 5)]  # as a folder is walked
OUTPUTS = ("features.npz", "features.parquet")
COMMAND = ("photos", "--weights", "weights.safetensors", "--batch-size", "4")
SOURCE = Source("0123456789abcdef", "conv1", (2, 1, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a network for small images, and 7 images."""
    folder = tmp_path_factory.mktemp("features")
    tensors = reference.random_checkpoint(num_classes=3)
    state_dict = {name: tensor.numpy() for name, tensor in tensors.items() if not name.startswith("aux")}
    variables = flax_googlenet.from_torchvision(state_dict)
    model = GoogLeNet(num_classes=3, aux_logits=False)
    flax_googlenet.save(folder / "weights.safetensors", model, variables, {"recipe": {"image_size": 64}})
    (folder / "photos" / "more").mkdir(parents=True)
    for i, image in enumerate(IMAGES):
        photograph = reference.photographs()[i % 2][20 * i : 20 * i + 90, 30 * i : 30 * i + 70]
        Image.fromarray(photograph).save(folder / image)
    return folder


@pytest.fixture(scope="module")
def stages(folder: Path) -> dict[str, np.ndarray]:
    """All stages and branches of the images, by ``endpoints``."""
    model, variables = flax_googlenet.load(folder / "weights.safetensors")
    pixels = flax_googlenet.preprocess_batch([folder / image for image in IMAGES], size=64)
    endpoints = jax.jit(lambda v, x: flax_googlenet.endpoints(model, v, x, branches=True))
    return jax.tree.map(np.asarray, endpoints(variables, pixels))


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)


def features(*arguments: str) -> int:
    return cli.main(["features", *arguments])


def read(output: str | Path) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """Return the images of a file, their features, and what made them, as a person reads them."""
    if str(output).endswith(".npz"):
        with np.load(output) as file:
            source = {name: str(file[name]) for name in ("weights", "stage")}
            return file["images"].tolist(), file["features"], source
    table = parquet.read_table(output)
    source = {name.decode(): text.decode() for name, text in table.schema.metadata.items()}
    shape = json.loads(source.pop("shape"))
    return table["image"].to_pylist(), np.stack(table["features"].to_numpy()).reshape(-1, *shape), source


# The features.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "options", "output"),
    [
        ("avgpool", "avgpool", [], "features.npz"),
        ("fc", "fc", ["--positions"], "features.npz"),
        ("mixed3a_3x3", "inception3a/branch2_1", ["--positions"], "features.parquet"),
    ],
)
def test_features_are_those_of_endpoints(
    name: str, stage: str, options: list[str], output: str, stages: dict[str, np.ndarray]
) -> None:
    expected = stages[stage]
    if expected.ndim == 4 and not options:
        expected = expected.mean((1, 2))
    assert features(*COMMAND, "--stage", name, "--output", output, *options) == 0
    images, actual, source = read(output)
    assert images == IMAGES
    assert source == {"weights": load_weights("weights.safetensors").digest, "stage": stage}
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    # A program for another number of images may add in another order. Measured: 3e-6.
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    assert not list(Path().glob("*.part"))


def test_a_rerun_adds_what_is_new_and_tries_what_was_bad_again(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.png").write_text("no image yet")
    arguments = ("mine.png", IMAGES[3], IMAGES[3], *COMMAND[1:], "--stage", "conv1", "--output", "features.npz")
    assert features(*arguments) == 1
    assert "mine.png" in capsys.readouterr().err
    (image,), (first,), _ = read("features.npz")
    assert image == IMAGES[3]
    Path("mine.png").write_bytes(Path(IMAGES[5]).read_bytes())
    assert features(IMAGES[5], *arguments) == 0
    captured = capsys.readouterr()
    assert "2 images in" in captured.err
    assert "2 were done before" in captured.err
    assert not captured.out
    images, values, _ = read("features.npz")
    assert images == [IMAGES[3], IMAGES[5], "mine.png"]
    np.testing.assert_array_equal(values[0], first)
    np.testing.assert_array_equal(values[1], values[2])
    assert (values[0] != values[1]).any()


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        ("--output features.npz", 2, "name files"),
        ("photos --output features.npy", 2, ".npz, .parquet"),
        ("photos --output features.npz --batch-size 0", 2, "--batch-size"),
        ("photos --output features.npz --stage mixed6a", 2, "mixed5a"),
        ("photos --output features.npz --stage norm1 --weights weights.safetensors", 2, "norm1"),
        ("photos --output no/features.npz", 3, "no/features.npz"),
        ("missing.png --output features.npz", 3, "missing.png"),
        ("photos --output features.npz --weights missing.safetensors", 3, "missing.safetensors"),
        ("photos --output folder.npz --weights weights.safetensors", 3, "folder.npz"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    arguments: str, status: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder.npz").mkdir()
    assert features(*arguments.split()) == status
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert {path.name for path in Path().iterdir()} == {"weights.safetensors", "photos", "folder.npz"}


def test_a_batch_that_no_memory_can_hold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("photos", "--weights", "weights.safetensors", "--output", "features.npz")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, limits[1]))
    try:
        assert features(*arguments, "--batch-size", "65536") == 3  # 3.2 GB
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "--batch-size" in capsys.readouterr().err


def test_a_part_that_cannot_be_created_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert features("photos", "--weights", "weights.safetensors", "--output", "/proc/features.npz") == 3
    assert "cannot write /proc/features.npz.part" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    model, variables = flax_googlenet.load("weights.safetensors")
    variables["params"]["conv1"]["bn"]["bias"] = variables["params"]["conv1"]["bn"]["bias"] * np.nan
    flax_googlenet.save("damaged.safetensors", model, variables)
    assert features("photos", "--weights", "damaged.safetensors", "--output", "features.npz") == 3
    assert "damaged.safetensors" in capsys.readouterr().err
    assert not Path("features.npz").exists()


# The output file.


def batch(*images: str) -> tuple[list[str], np.ndarray]:
    """Return images with values that depend on their names."""
    values = [np.random.default_rng(list(image.encode())).random(SOURCE.shape, np.float32) for image in images]
    return list(images), np.stack(values)


BATCHES = [batch("a.png", "caf\\xe9.png"), batch("é\n.png", '"\\.png'), batch("c.png")]
ALL = [image for images, _ in BATCHES for image in images]


def write(path: Path, *batches: tuple[list[str], np.ndarray], source: Source = SOURCE) -> None:
    with open_features(path, source) as file:
        for images, values in batches:
            file.append(images, values)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_batch_cut_off_anywhere_is_written_anew(output: str, tmp_path: Path) -> None:
    path, part = tmp_path / output, tmp_path / f"{output}.part"
    ends = [0]
    with open_features(path, SOURCE) as file:
        for images, values in BATCHES:
            file.append(images, values)
            ends.append(part.stat().st_size)
        written = part.read_bytes()
    whole = path.read_bytes()
    images, values, _ = read(path)
    assert images == ALL
    np.testing.assert_array_equal(values, np.concatenate([values for _, values in BATCHES]))
    for cut in sorted({*range(0, len(written), 7), *ends[:-1]}):
        path.unlink()
        part.write_bytes(written[:cut])
        with open_features(path, SOURCE) as file:
            for (images, values), end in zip(BATCHES, ends[1:], strict=True):
                assert [file.claim(image) for image in images] == [cut < end] * len(images)
                if cut < end:
                    file.append(images, values)
        assert path.read_bytes() == whole
        assert not part.exists()


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_finished_file_grows_group_by_group_and_has_each_image_once(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_files, "_ROW_GROUP", 12)  # two rows
    path, part = tmp_path / output, tmp_path / f"{output}.part"
    with open_features(path, SOURCE) as file:
        file.append(*BATCHES[0])
        file.append(*BATCHES[1])
        written = part.read_bytes()
    part.write_bytes(written)  # as after a kill between the end of the output file and the removal of this one
    with open_features(path, SOURCE) as file:
        assert not any(file.claim(image) for image in ALL[:4])
        file.append(*BATCHES[2])
    images, values, _ = read(path)
    assert images == ALL
    np.testing.assert_array_equal(values, np.concatenate([values for _, values in BATCHES]))
    if output.endswith("parquet"):
        assert parquet.ParquetFile(path).num_row_groups == 3
    before = path.stat()
    write(path)  # nothing
    assert path.stat() == before
    assert [path.name for path in tmp_path.glob("features*")] == [output]


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("output", OUTPUTS)
def test_other_features_or_something_else_are_not_mixed(output: str, is_finished: bool, tmp_path: Path) -> None:
    path = tmp_path / output
    with ExitStack() as run:
        file = run.enter_context(open_features(path, SOURCE))
        file.append(*BATCHES[0])
        if not is_finished:
            path = tmp_path / f"{output}.part"
            before = path.read_bytes()
    if is_finished:
        before = path.read_bytes()
    else:
        (tmp_path / output).unlink()
    others = [(Source("f" * 16, "conv1", SOURCE.shape), "other weights"), (Source(SOURCE.weights, "fc", (6,)), "conv1")]
    others += [(Source(SOURCE.weights, "conv1", (3,)), "with --positions")]
    damaged = [b"my own notes\n", b"[]\n", b"\0\xff", b"PK\x03\x04", b"PAR1PAR1", before[1:]]
    contents = [(before, other, reason) for other, reason in others] + [(data, SOURCE, "") for data in damaged]
    for data, source, reason in contents:
        path.write_bytes(data)
        with pytest.raises(CommandError) as refused:
            write(tmp_path / output, source=source)
        assert str(path) in str(refused.value)
        assert reason in str(refused.value)
        assert "move it away" in str(refused.value)
        assert path.read_bytes() == data
        assert list(tmp_path.glob("features*")) == [path]


def test_a_damaged_file_is_named_and_the_new_features_wait(tmp_path: Path) -> None:
    path, source = tmp_path / "features.npz", Source("w", "avgpool", (1024,))
    values = np.random.default_rng(0).random((9, 1024), np.float32)
    write(path, ([f"{i}.png" for i in range(8)], values[:8]), source=source)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(values[7].tobytes())] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CommandError, match=r"features\.npz: it is damaged, so move it away; .+features\.npz\.part"):
        write(path, (["8.png"], values[8:]), source=source)
    assert path.read_bytes() == damaged
    path.write_bytes(whole)
    write(path, source=source)
    np.testing.assert_array_equal(read(path)[1], values)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_full_disk_at_the_end_leaves_the_features_for_the_next_run(output: str, tmp_path: Path) -> None:
    path = tmp_path / output
    with ExitStack() as run:
        run.enter_context(open_features(path, SOURCE)).append(*BATCHES[0])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # bytes: less than the file has
        try:
            with pytest.raises(CommandError, match=r"cannot write .+: File too large; its rows are in .+\.part"):
                run.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(path)
    assert read(path)[0] == BATCHES[0][0]
    assert [path.name for path in tmp_path.glob("*features*")] == [output]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    path, source = tmp_path / "features.npz", Source("w", "avgpool", (1024,))
    values = np.zeros((32, 1024), np.float32)
    tracemalloc.start()
    for start in (0, 2048):  # the second run copies what the first one has written
        with open_features(path, source) as file:
            for first in range(start, start + 2048, 32):
                file.append([f"{i}.jpg" for i in range(first, first + 32)], values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 16e6
    assert peak < 2e6  # bytes


# Processes.


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [Path(sys.executable).with_name("flax-googlenet"), "features", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_after_kills_the_file_has_the_bits_of_an_uninterrupted_run(capsys: pytest.CaptureFixture[str]) -> None:
    count = 151
    Path("many").mkdir()
    for i in range(count):
        Path(f"many/{i:03}.png").symlink_to(Path(IMAGES[i % 7]).resolve())
    command = ("many", *COMMAND[1:-1], "2", "--stage", "conv3", "--output")
    part, size = Path("features.npz.part"), 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(*command, "features.npz")
        deadline = time.monotonic() + 60
        while not part.exists() or part.stat().st_size < size + 10_000:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        assert process.communicate() == ("", "")
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        os.truncate(part, part.stat().st_size - 100)  # as after a loss of power
        size = part.stat().st_size
    assert not Path("features.npz").exists()
    assert features(*command, "features.npz") == 0
    done, skipped = (int(word) for word in capsys.readouterr().err.split() if word.isdigit())
    assert done + skipped == count
    assert skipped > 20
    assert done > 0
    assert features(*command, "uninterrupted.npz") == 0
    assert Path("features.npz").read_bytes() == Path("uninterrupted.npz").read_bytes()
    assert read("features.npz")[0] == [f"many/{i:03}.png" for i in range(count)]
