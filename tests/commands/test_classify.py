"""``flax-googlenet classify`` as a person runs it: real images, files, processes, signals, pipes and terminals."""

import csv
import io
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pyarrow
import pytest
import reference
import scipy.special
import torch
from hypothesis import strategies
from PIL import Image
from pyarrow import parquet

import flax_googlenet
from flax_googlenet.commands.cli import main
from flax_googlenet.commands.results import Row, open_results
from flax_googlenet.commands.status import CommandError
from flax_googlenet.errors import printable
from flax_googlenet.images.files import display_name, find_images, read_ahead
from flax_googlenet.model import GoogLeNet

COMMAND = Path(sys.executable).with_name("flax-googlenet")
NAMES = [f"thing {i}, or so" for i in range(10)]


@pytest.fixture(scope="module")
def model() -> GoogLeNet:
    return GoogLeNet(num_classes=10, aux_logits=False)


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    tensors = reference.random_checkpoint(num_classes=10)
    return {key: tensor.numpy() for key, tensor in tensors.items() if not key.startswith("aux")}


@pytest.fixture(scope="module")
def variables(state_dict: dict[str, np.ndarray]) -> Any:
    return flax_googlenet.from_torchvision(state_dict)


@pytest.fixture(scope="module")
def probabilities(state_dict: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """images -> the probabilities of torchvision's network."""
    network = reference.build(state_dict, transform_input=False, dtype=torch.float32)
    return lambda images: scipy.special.softmax(reference.stages(network, images)["fc"], axis=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: GoogLeNet, variables: Any) -> Path:
    """Weights, and ``photos`` with 12 images in it and in a folder below."""
    folder = tmp_path_factory.mktemp("classify")
    flax_googlenet.save(folder / "weights.safetensors", model, variables, {"class_names": NAMES})
    flax_googlenet.save(folder / "nameless.safetensors", model, variables)
    (folder / "photos" / "more").mkdir(parents=True)
    for i in range(12):
        photograph = Image.fromarray(reference.photographs()[i % 2][20 * i : 20 * i + 180, 30 * i : 30 * i + 200])
        photograph.save(folder / "photos" / ("more" if i % 3 == 0 else "") / f"{i:02}.{'jpg' if i % 2 else 'PNG'}")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder, with links to the weights and the photos."""
    for name in ("weights.safetensors", "nameless.safetensors", "photos"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def environment() -> dict[str, str]:
    """Of the processes. Unbuffered, Python's standard output does not notice when only a part of a line was written."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def classify(*arguments: str) -> int:
    return main(["classify", *arguments])


PHOTOS = ("photos", "--weights", "weights.safetensors")


def images_of(output: str) -> list[str]:
    """The images in a .csv, .jsonl or .parquet file, whatever the case of its suffix."""
    path = Path(output)
    if path.suffix.lower() == ".parquet":
        return parquet.read_table(path)["image"].to_pylist()
    if path.suffix.lower() == ".csv":
        return [row["image"] for row in csv.DictReader(path.read_text().splitlines())]
    return [json.loads(line)["image"] for line in path.read_text().splitlines()]


# The answers.


@pytest.mark.slow
def test_images_are_of_the_size_of_the_training_and_all_classes_are_named_where_these_are_few(
    here: Path,
    model: GoogLeNet,
    variables: Any,
    probabilities: Callable[[np.ndarray], np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained_at_64 = {"class_names": NAMES, "recipe": {"image_size": 64}}
    flax_googlenet.save("small.safetensors", model, variables, trained_at_64)
    assert classify("photos/01.jpg", "--weights", "small.safetensors", "--json", "--top", "99") == 0
    (line,) = capsys.readouterr().out.splitlines()
    images = flax_googlenet.preprocess_batch(["photos/01.jpg"], size=64)
    (expected,) = probabilities(images)
    predictions = sorted(json.loads(line)["predictions"], key=lambda prediction: prediction["index"])
    assert [prediction["label"] for prediction in predictions] == NAMES
    actual = [prediction["probability"] for prediction in predictions]
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.slow
def test_the_answers_are_torchvisions(
    here: Path, probabilities: Callable[[np.ndarray], np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify(*PHOTOS, "--json", "--top", "3", "--batch-size", "5") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [
        *(f"photos/{i:02}.{'jpg' if i % 2 else 'PNG'}" for i in range(12) if i % 3),
        *(f"photos/more/{i:02}.{'jpg' if i % 2 else 'PNG'}" for i in range(0, 12, 3)),
    ]
    images = flax_googlenet.preprocess_batch(row["image"] for row in rows)
    for row, expected in zip(rows, probabilities(images), strict=True):
        assert row.keys() == {"image", "predictions"}
        indices = [prediction["index"] for prediction in row["predictions"]]
        assert indices == np.argsort(-expected)[:3].tolist()
        assert [prediction["label"] for prediction in row["predictions"]] == [NAMES[index] for index in indices]
        # Relative; the logits, of magnitude 3, are float32. Measured: 4e-6.
        given = [prediction["probability"] for prediction in row["predictions"]]
        np.testing.assert_allclose(given, expected[indices], rtol=2e-5)
    assert len({row["predictions"][0]["probability"] for row in rows}) == 12  # no two images have the same answer


@pytest.mark.slow
def test_without_names_the_classes_are_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = "photos/01.jpg"
    assert classify(image, "--weights", "nameless.safetensors", "--json") == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert [prediction["label"] for prediction in predictions] == [None] * 5
    assert classify(image, "--weights", "nameless.safetensors") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["class", str(predictions[0]["index"])]


@pytest.mark.slow
def test_a_person_gets_a_block_with_bars_for_each_image(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(*PHOTOS) == 0
    out, err = capsys.readouterr()
    blocks = out.strip().split("\n\n")
    assert len(blocks) == 12
    name, *answers = blocks[0].splitlines()
    assert name.strip() == "photos/01.jpg"
    assert len(answers) == 5
    percent = [float(answer.split("%")[0].split()[-1]) for answer in answers]
    bars = [answer.count("━") for answer in answers]
    assert sorted(percent, reverse=True) == percent
    assert sorted(bars, reverse=True) == bars
    assert bars[0] > bars[-1]
    assert all("thing" in answer for answer in answers)
    assert err.startswith("12 images in ")
    assert err.endswith(" images/s\n")


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "output"), [("ascii", "answers.CSV"), ("latin-1", "answers.parquet")])
def test_names_that_standard_output_or_utf8_does_not_have_are_escaped(
    here: Path, model: GoogLeNet, variables: Any, encoding: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding, write_through=True))
    flax_googlenet.save("foreign.safetensors", model, variables, {"class_names": ["花", "caf\udce9", *NAMES[2:]]})
    Path("été.jpg").symlink_to("photos/01.jpg")
    assert classify("été.jpg", "--weights", "foreign.safetensors", "--top", "10") == 0
    lines = screen.getvalue().splitlines()
    assert lines[0].strip() == "été.jpg".encode(encoding, "backslashreplace")
    assert [b"---" in line for line in lines].count(True) > 1  # bars in ASCII
    for label in (rb"\u82b1", rb"caf\xe9"):
        assert any(label in line for line in lines)
    assert classify("été.jpg", "--weights", "foreign.safetensors", "--top", "10", "--output", output) == 0
    assert images_of(output) == ["été.jpg"]


@pytest.mark.slow
def test_random_weights_are_called_random(
    here: Path, model: GoogLeNet, variables: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flax_googlenet.save("googlenet-random.safetensors", model, variables, {"source": "random"})
    assert classify("photos/01.jpg") == 0
    assert "these weights are random: the answers mean nothing" in capsys.readouterr().err
    flax_googlenet.save("googlenet-imagenet.safetensors", model, variables, {"source": "imagenet"})
    assert classify("photos/01.jpg") == 0  # the better ones are taken
    assert "random" not in capsys.readouterr().err


# Images: found, decoded ahead, or named.


def test_a_folder_stands_for_its_images_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/10.JPEG", "a.png", "b-1.webp", "c.txt", ".hidden.jpg", ".cache/1.jpg", "d.jpg/e.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    problems: list[str] = []
    found = [os.path.relpath(path, tmp_path) for path in find_images([str(tmp_path)], problems.append, Counter())]
    assert found == ["a.png", "b/10.JPEG", "b/2.jpg", "b-1.webp", "d.jpg/e.gif"]
    assert problems == []


def test_globs_are_expanded_unless_a_file_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b/c.jpg", "b/d/e.jpg", "b/f.png", "x[1].jpg", "x1.jpg", "folder.jpg/g.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    problems: list[str] = []
    assert list(find_images(["**/*.jpg"], problems.append, Counter())) == [
        "a.jpg",
        "b/c.jpg",
        "b/d/e.jpg",
        "x1.jpg",
        "x[1].jpg",
    ]
    assert list(find_images(["b/?.*"], problems.append, Counter())) == ["b/c.jpg", "b/f.png"]
    assert list(find_images(["x[1].jpg"], problems.append, Counter())) == ["x[1].jpg"]
    assert problems == []
    assert (
        list(find_images(["*.gif", "a.gif", "b/d", "b/d/e.jpg", "folder.jpg"], problems.append, Counter()))
        == ["b/d/e.jpg"] * 2
    )
    assert problems == [
        "*.gif: no file matches",
        "a.gif: no such file",
        "folder.jpg: there is no image in this folder",
    ]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    problems: list[str] = []
    (tmp_path / "a").mkdir()
    (tmp_path / "b.jpg").touch()
    paths = find_images([str(tmp_path), str(tmp_path / "b.jpg")], problems.append, Counter())
    (tmp_path / "c").mkdir()
    first = next(paths)
    (tmp_path / "c").rmdir()  # root may list any folder, but not one that is gone
    assert [first, *paths] == [str(tmp_path / "b.jpg")] * 2
    assert problems == [f"{tmp_path / 'c'}: No such file or directory"]


@pytest.mark.slow
def test_folders_of_any_size_are_walked_in_little_memory(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03}").mkdir()
        for j in range(100):
            (tmp_path / f"{i:03}" / f"a-rather-long-name-of-a-photograph-{j}.jpg").touch()
    tracemalloc.start()
    assert sum(1 for _ in find_images([str(tmp_path)], pytest.fail, Counter())) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # bytes; a list of the paths is 1.6 MB. Measured: 60 kB


def test_no_more_images_are_decoded_ahead_than_asked_for(here: Path) -> None:
    asked = 0

    def paths() -> Iterator[str]:
        nonlocal asked
        for _ in range(100):
            asked += 1
            yield "photos/01.jpg"

    for given, (_, pixels) in enumerate(read_ahead(paths(), flax_googlenet.preprocess, 8, pytest.fail), 1):
        assert pixels.shape == (224, 224, 3)
        assert given + 7 <= asked + (given > 93) * 8
        assert asked <= given + 7
    assert given == asked == 100


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_named_and_the_others_are_done(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jpg").write_text("no image")
    evil = "evil\x1b[31m\nname.jpg"
    Path(evil).touch()
    Path("camera").mkdir()
    for name in ("1.CR2", "2.CR2", "3.jpg"):
        Path("camera", name).symlink_to(Path("photos/01.jpg").resolve())
    arguments = ["photos/01.jpg", "bad.jpg", "missing.jpg", evil, "camera", "photos/02.PNG"]
    assert classify(*arguments, "--weights", "weights.safetensors", "--json") == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == [
        "photos/01.jpg",
        "camera/3.jpg",
        "photos/02.PNG",
    ]
    errors = sorted(line for line in err.splitlines() if line.startswith("error:"))
    named = ("camera/*.CR2", "bad.jpg", r"evil\x1b[31m\x0aname.jpg", "missing.jpg")
    assert len(errors) == len(named)
    assert all(name in error for name, error in zip(named, errors, strict=True))
    assert "3 images in" in err
    assert "5 could not be read" in err


def test_a_name_that_is_no_utf8_is_written_as_text() -> None:
    assert display_name(os.fsdecode(b"caf\xe9/\xc3\xa9.jpg")) == r"caf\xe9/é.jpg"


@hypothesis.given(
    strategies.lists(
        strategies.text(strategies.sampled_from("\\x5cue9é\u202e\x1b\udce9"), max_size=9),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_no_two_names_are_written_alike(names: list[str]) -> None:
    assert len(set(map(display_name, names))) == 2
    assert len({printable(display_name(name)) for name in names}) == 2


def test_what_steers_a_terminal_is_escaped_and_every_other_character_stays() -> None:
    assert printable("a\r\n\t\x1b\x85\u2028\udce9") == r"a\x0d\x0a\x09\x1b\u0085\u2028\xe9"
    assert printable("\u202egpj\u2069") == r"\u202egpj\u2069"
    # Persian and an emoji with joiners, spaces of several kinds, a character of nobody's and one of private use.
    text = "می\u200cرود 👩\u200d🔬 花\u3000子 10\xa0% \u0378 \ue000"
    assert printable(text) == text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "no images: name files, folders or globs"),
        (["photos", "--top", "0"], 2, "--top must be at least 1"),
        (["photos", "--batch-size", "0"], 2, "--batch-size must be at least 1"),
        (["photos", "--batch-size", "99999999999999999999"], 2, "--batch-size must be at least 1 and at most 65536"),
        (["photos", "--output", "answers.xlsx"], 2, "must end in one of .csv, .jsonl, .parquet"),
        (["missing.jpg", "no*.jpg"], 3, "missing.jpg: no such file"),
        (["photos", "--weights", "missing.safetensors"], 3, "missing.safetensors: No such file or directory"),
        (["photos", "--weights", "photos"], 3, "photos: Is a directory"),
        (["photos", "--weights", "photos/01.jpg"], 3, "not a checkpoint of flax_googlenet"),
        (
            ["photos", "--output", "answers.jsonl", "--json"],
            2,
            "--json is for standard output: leave it out, or --",
        ),
        (
            ["photos", "--output", "nowhere/a.csv", "--weights", "missing"],
            3,
            "nowhere/a.csv: there is no folder nowhere",
        ),
        (["photos", "--output", "folder.csv"], 3, "cannot write folder.csv: "),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    Path("folder.csv").mkdir()
    weights = [] if "--weights" in arguments else ["--weights", "weights.safetensors"]
    assert classify(*arguments, *weights) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert message in err.splitlines()[0]


def test_answers_that_are_not_finite_are_refused(here: Path, model: GoogLeNet, variables: Any) -> None:
    infinite = jax.tree.map(lambda x: np.full_like(x, np.inf), variables)
    flax_googlenet.save("infinite.safetensors", model, infinite)
    assert classify("photos/01.jpg", "--weights", "infinite.safetensors", "--json") == 3


# The output file.


@pytest.fixture
def json_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> list[Row]:
    assert classify(*PHOTOS, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_every_kind_of_output_has_the_same_rows(
    here: Path, json_rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("answers.csv", "answers.jsonl", "answers.parquet"):
        assert classify(*PHOTOS, "--output", name) == 0
        assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert parquet.read_table("answers.parquet").to_pylist() == lines
    weights = {line.pop("weights") for line in lines}
    assert lines == json_rows
    table = list(csv.DictReader(Path("answers.csv").read_text().splitlines()))
    assert list(table[0])[:7] == ["image", "index1", "label1", "probability1", "index2", "label2", "probability2"]
    for line, row in zip(lines, table, strict=True):
        assert row["image"] == line["image"]
        assert {row["weights"]} == weights
        for rank, prediction in enumerate(line["predictions"], 1):
            assert int(row[f"index{rank}"]) == prediction["index"]
            assert row[f"label{rank}"] == prediction["label"]
            assert float(row[f"probability{rank}"]) == prediction["probability"]
    assert not list(here.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("output", ["answers.csv", "answers.jsonl", "answers.parquet"])
def test_a_rerun_adds_what_is_new_and_tries_what_was_bad_again(
    here: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.jpg").write_text("no image yet")
    arguments = ("mine.jpg", "photos/01.jpg", "photos/01.jpg", "--weights", "weights.safetensors", "--output", output)
    assert classify(*arguments) == 1
    assert images_of(output) == ["photos/01.jpg"]
    Path("mine.jpg").write_bytes(Path("photos/05.jpg").read_bytes())
    capsys.readouterr()
    assert classify("photos/02.PNG", *arguments) == 0
    assert "2 images in" in (err := capsys.readouterr().err)
    assert "2 were done before" in err
    assert images_of(output) == ["photos/01.jpg", "photos/02.PNG", "mine.jpg"]


def row(image: str) -> Row:
    return {"image": image, "predictions": [{"index": 1, "label": 'a "b",\nc', "probability": 1e-9}]}


@pytest.mark.parametrize("name", ["answers.csv", "answers.jsonl", "answers.parquet"])
def test_rows_of_other_weights_another_number_or_something_else_are_not_mixed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with open_results(path, "w", 1) as results:
        results.append([row("a.jpg")])
    before = path.read_bytes()
    for weights, top, message in [("other", 1, "it was made with other weights"), ("w", 2, "it was made with --top 1")]:
        refused = rf"answers\.\w+ cannot be continued \(.*{message}\): name another --output, or move it away"
        with pytest.raises(CommandError, match=refused), open_results(path, weights, top):
            pass
        assert path.read_bytes() == before
    others = [b"my own notes", b"my own notes\n", b'{"a": 1}\n', b"image,mine\n1,2\n", b"\0\xff", b"[]\n"]
    others += [b"[" * 10**5 + b"\n"]
    if name == "answers.parquet":  # elsewhere these are what a kill cuts off
        others += [before[: len(before) // 2], before[:-20] + b"\xff" * 12 + before[-8:]]
    for other in others:
        path.write_bytes(other)
        with pytest.raises(CommandError, match=r"\(it holds something else\)"), open_results(path, "w", 1):
            pass
        assert path.read_bytes() == other
    os.truncate(path, 60 * 10**9)  # one line of 60 GB, most of it on no disk
    with pytest.raises(CommandError, match=r"\(it holds something else\)"), open_results(path, "w", 1):
        pass
    assert list(tmp_path.iterdir()) == [path]


UNUSUAL = [
    b"caf\xe9.jpg",
    rb"caf\xe9.jpg",
    "é.jpg".encode(),
    "e\u0301.jpg".encode(),
    b"a\rb.jpg",
    b"a\tb.jpg",
    b"\r.jpg",
]
UNUSUAL += [
    b"=1+1.jpg",
    b"'=1+1.jpg",
    b"'quoted'.jpg",
    b"-1.jpg",
    b"+1.jpg",
    b"@A1.jpg",
    "\uff1d1.jpg".encode(),
    b"a\x1b[31m.jpg",
]
UNUSUAL += ["gpj.\u202e.jpg".encode(), rb"\\\x5c.jpg", b'",\n"\n.jpg', rb"gpj.\u202e.jpg"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_each_name_has_a_row_of_its_own_that_a_rerun_finds(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"answers{suffix}"
    images = [display_name(os.fsdecode(name)) for name in UNUSUAL]
    for _ in range(2):
        with open_results(path, "w", 1) as results:
            results.append([row(image) for image in images if results.claim(image)])
    assert len(set(images_of(str(path)))) == len(images_of(str(path))) == len(UNUSUAL)
    if suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert {len(fields) for fields in rows} == {5}
        assert all(cell.isprintable() and cell[:1] not in [*"=+-@\uff1d"] for fields in rows for cell in fields)
    else:
        assert images_of(str(path)) == images


def test_a_csv_of_before_names_were_escaped_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    rows = 'photos/1.jpg,1,cat,0.5,w\n=1+1.jpg,1,=cat,0.5,w\n"a\nb.jpg",1,cat,0.5,w\né.jpg,1,cat,0.5,w\n'
    path.write_text(f"image,index1,label1,probability1,weights\n{rows}")
    with open_results(path, "w", 1) as results:
        assert [results.claim(image) for image in ("photos/1.jpg", "=1+1.jpg", "a\nb.jpg", "é.jpg")] == [False] * 4
        assert results.claim("e\u0301.jpg")


@pytest.mark.parametrize(
    "change",
    [
        {"image": 1},
        {"image": "\ud800.jpg"},
        {"predictions": "x"},
        {"predictions": [1]},
        {"predictions": [{"index": "1", "label": None, "probability": 0.5}]},
        {"predictions": [{"index": 10**400, "label": None, "probability": 0.5}]},
        {"predictions": [{"index": 1, "label": 0, "probability": 0.5}]},
        {"predictions": [{"index": 1, "label": None, "probability": float("nan")}]},
    ],
)
def test_a_row_that_no_run_has_written_is_refused_before_the_work(change: Row, tmp_path: Path) -> None:
    for part in (tmp_path / "answers.jsonl", tmp_path / "answers.parquet.part"):
        part.write_text(json.dumps(row("a.jpg") | {"weights": "w"} | change) + "\n")
        path = part.with_name(part.name.removesuffix(".part"))
        with pytest.raises(CommandError, match=r"\(it holds something else\)"), open_results(path, "w", 1):
            pytest.fail("it was taken")


def test_a_parquet_file_of_other_columns_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "answers.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row("a.jpg") | {"weights": "w", "more": 1}]), path)
    with pytest.raises(CommandError, match=r"\(it holds something else\)"), open_results(path, "w", 1):
        pytest.fail("it was taken")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_row_cut_off_anywhere_is_written_anew(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"answers{suffix}"
    images = ["a\nb.jpg", 'é",\n"\n.jpg', "c.jpg"]
    ends = []
    with open_results(path, "w", 1) as results:
        for image in images:
            results.append([row(image)])
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with open_results(path, "w", 1) as results:
            assert path.read_bytes() == whole[: max([0, *(end for end in ends if end <= cut)])] or cut < ends[0]
            for image, end in zip(images, ends, strict=True):
                assert results.claim(image) == (end > cut)
                if end > cut:
                    results.append([row(image)])
        assert path.read_bytes() == whole


def test_a_damaged_row_in_the_middle_is_not_taken_for_a_cut(tmp_path: Path) -> None:
    for suffix in (".csv", ".jsonl"):
        path = tmp_path / f"answers{suffix}"
        with open_results(path, "w", 1) as results:
            results.append([row("a.jpg"), row("b.jpg"), row("c.jpg")])
        damaged = path.read_bytes().replace(b"b.jpg", b"b,jpg\n")
        path.write_bytes(damaged)
        with pytest.raises(CommandError, match="cannot be continued"), open_results(path, "w", 1):
            pass
        assert path.read_bytes() == damaged


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    with open_results(path, "w", 1):
        second = open_results(path, "w", 1)
        with pytest.raises(CommandError, match="another run is writing"):
            second.__enter__()


def test_a_kill_after_the_parquet_file_was_written_leaves_no_row_twice(tmp_path: Path) -> None:
    path, part = tmp_path / "answers.parquet", tmp_path / "answers.parquet.part"
    with open_results(path, "w", 1) as results:
        results.append([row("a.jpg"), row("b.jpg")])
        rows = part.read_bytes()
    part.write_bytes(rows)
    with open_results(path, "w", 1) as results:
        assert not results.claim("b.jpg")
        results.append([row("c.jpg")])
    assert images_of(str(path)) == ["a.jpg", "b.jpg", "c.jpg"]
    assert not part.exists()


def test_a_full_disk_at_the_end_leaves_the_rows_for_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "answers.parquet"
    with ExitStack() as run:
        run.enter_context(open_results(path, "w", 1)).append([row("a.jpg")])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # bytes: enough for the row, not for the whole file
        try:
            with pytest.raises(CommandError, match=r"cannot write .+: File too large; its rows are in .+\.part"):
                run.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with open_results(path, "w", 1) as results:
        assert not results.claim("a.jpg")
    assert images_of(str(path)) == ["a.jpg"]
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_without_pyarrow_says_what_to_install(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what Python itself does for a module that must not be there
    assert classify(*PHOTOS, "--output", "answers.parquet") == 3
    assert "[parquet]" in capsys.readouterr().err
    assert classify("photos/01.jpg", "--weights", "weights.safetensors", "--output", "answers.csv") == 0


# Processes: kills, Ctrl-C, pipes, terminals.


def start(
    *arguments: str, environment: dict[str, str], prefix: tuple[str, ...] = (), **files: Any
) -> subprocess.Popen[str]:
    files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | files
    return subprocess.Popen([*prefix, COMMAND, "classify", *arguments], env=environment, text=True, **files)


MANY = 24


@pytest.fixture
def many(here: Path) -> list[str]:
    """Enough images for a kill to come half-way."""
    Path("many").mkdir()
    for i in range(MANY):
        Path(f"many/{i:03}.jpg").symlink_to(here / "photos" / "01.jpg")
    return ["many", "--weights", "weights.safetensors", "--batch-size", "2"]


def wait_for_rows(process: subprocess.Popen[str], growing: Path) -> None:
    deadline = time.monotonic() + 60
    while not growing.exists() or growing.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("answers.csv", signal.SIGKILL),
        ("answers.parquet", signal.SIGKILL),
        ("answers.jsonl", signal.SIGINT),
    ],
)
def test_after_a_kill_the_same_command_goes_on(
    here: Path, many: list[str], output: str, number: signal.Signals, environment: dict[str, str]
) -> None:
    growing = Path(f"{output}.part" if output.endswith("parquet") else output)
    process = start(*many, "--output", output, environment=environment)
    wait_for_rows(process, growing)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130 if number == signal.SIGINT else -number, "", "")
    written = growing.read_text()
    assert written.endswith("\n")
    done = written.count("\n") - output.endswith("csv")
    assert 0 < done < MANY

    growing.write_text(written + '{"image": "many/0'[output.endswith("csv") * 11 :])  # a row cut off by a loss of power
    process = start(*many, "--output", output, environment=environment)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, "")
    assert err.startswith(f"{MANY - done} images in ")
    assert f"{done} were done before" in err
    assert images_of(output) == [f"many/{i:03}.jpg" for i in range(MANY)]


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
def test_ctrl_c_while_it_starts_is_quiet(
    here: Path, many: list[str], moment: float, environment: dict[str, str]
) -> None:
    code = """
import os, sys
from flax_googlenet.__main__ import main
# Before this, hundredths of a second after the start, Ctrl-C is in Python's own hands.
def tell(event, args):
    if event == "import" and args[0] == "flax_googlenet.commands.cli":
        os.write(1, b"started\\n")
sys.addaudithook(tell)
main()
"""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            *(["--help"] if moment <= 0.05 else ["classify", *many, "--output", "answers.csv"]),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_quiet(here: Path, many: list[str], options: list[str], environment: dict[str, str]) -> None:
    process = start(*many, *options, environment=environment)
    assert "many/000.jpg" in process.stdout.readline()
    process.stdout.close()  # as head does
    assert (process.wait(), process.stderr.read()) == (141, "")
    process.stderr.close()


@pytest.mark.slow
def test_answers_go_to_the_file_and_progress_to_the_terminal(
    here: Path, many: list[str], environment: dict[str, str]
) -> None:
    ours, theirs = pty.openpty()
    with Path("answers.jsonl").open("wb") as answers:
        process = start(*many, "--json", environment=environment | {"TERM": "xterm"}, stdout=answers, stderr=theirs)
        os.close(theirs)
        screen = b""
        with open(ours, "rb", buffering=0) as terminal:
            try:
                while shown := terminal.read(4096):
                    screen += shown
            except OSError:  # Linux's way to say that the other end is closed
                pass
    assert process.wait() == 0
    assert images_of("answers.jsonl") == [f"many/{i:03}.jpg" for i in range(MANY)]
    assert b"images/s" in screen
    assert b"predictions" not in screen


@pytest.mark.slow
@pytest.mark.parametrize("output", ["standard output", "answers.csv"])
def test_a_full_disk_ends_in_one_line(here: Path, output: str, environment: dict[str, str]) -> None:
    options = ["--json"] if output == "standard output" else ["--output", output]
    limited = ("sh", "-c", 'ulimit -f 1; exec "$@"', "sh")  # no file grows beyond a block of 512 or 1024 bytes
    with Path("stdout").open("wb") as stdout:
        process = start(*PHOTOS, "--batch-size", "2", *options, environment=environment, stdout=stdout, prefix=limited)
        _, err = process.communicate()
    assert (process.returncode, err) == (3, f"error: cannot write {output}: File too large\n")


# The start.


def loaded_by(*arguments: str) -> set[str]:
    """The packages that a new Python process loads."""
    command = [sys.executable, "-X", "importtime", *arguments]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    return {line.split("|")[-1].strip().split(".")[0] for line in lines}


def test_help_does_not_wait_for_jax() -> None:
    loaded = loaded_by("-m", "flax_googlenet", "--help")
    assert {"flax_googlenet", "tyro"} <= loaded
    assert loaded.isdisjoint({"jax", "flax", "numpy", "PIL", "rich"})


def test_the_library_loads_nothing_before_it_is_used() -> None:
    before = loaded_by("-c", "import importlib")
    assert loaded_by("-c", "import flax_googlenet") - before == {"flax_googlenet"}


def test_the_library_loads_nothing_that_only_commands_or_training_need() -> None:
    loaded = loaded_by("-c", "from flax_googlenet import *") - loaded_by("-c", "import flax")
    assert {"flax_googlenet", "safetensors", "PIL"} <= loaded
    heavy = {"torch", "torchvision", "optax", "grain", "orbax", "tensorstore", "tyro", "rich", "pyarrow", "sklearn"}
    assert heavy.isdisjoint(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("is_possible", [True, False])
def test_what_is_compiled_is_kept_where_that_is_possible(
    here: Path, is_possible: bool, environment: dict[str, str]
) -> None:
    environment = environment | {"XDG_CACHE_HOME": str(here / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    if not is_possible:
        Path("cache").touch()  # a file where the folder should be
    process = start("photos/01.jpg", "--weights", "weights.safetensors", environment=environment)
    out, err = process.communicate()
    assert (process.returncode, out.splitlines()[0].strip()) == (0, "photos/01.jpg")
    assert err.startswith("1 image in ")
    assert len(err.splitlines()) == 1
    assert any(Path("cache").glob("flax-googlenet/jax/*")) == is_possible


def test_a_cache_that_jax_was_told_of_is_kept(here: Path) -> None:
    before = jax.config.values["jax_compilation_cache_dir"]  # conftest.py's
    assert classify("missing.jpg") == 3
    assert before == jax.config.values["jax_compilation_cache_dir"]
    assert before is not None


def test_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flax-googlenet {metadata.version('flax-googlenet')}\n"
    assert flax_googlenet.__version__ == metadata.version("flax-googlenet")


def test_the_overview_has_a_line_or_two_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for line in ("classify   Name the likeliest", "evaluate   Measure how", "export     Write a", "train      Train a"):
        assert line in out
    assert "Exit status" not in out


def test_the_help_tells_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["classify", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for status in ("0    all", "1    some", "2    the command", "3    nothing", "130  interrupted", "141  nobody"):
        assert f"\n  {status}" in out
    assert "IMAGE|FOLDER|GLOB ..." in out
    assert "--weights FILE" in out
    assert main(["classify", "--tip", "5"]) == 2
