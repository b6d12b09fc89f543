"""The layouts of folders that count as data, and one clear error for all others."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import ExifTags, Image

from flax_googlenet.images.preprocessing import rgb
from flax_googlenet.training.datasets import DataError, Dataset
from flax_googlenet.training.history import Training
from flax_googlenet.training.splits import find_data, open_data


def write_image(path: Path, colour: tuple[int, int, int] = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty cats and ten dogs."""
    for i in range(20):
        write_image(tmp_path / "data" / "cats" / f"{i:02}.png")
    for i in range(10):
        write_image(tmp_path / "data" / "dogs" / f"{i:02}.jpg")
    return tmp_path / "data"


def refusal(data: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        open_data(str(data), held_out=0.2, seed=0)
    return str(caught.value)


def paths(dataset: Dataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def test_train_and_val_are_used_as_they_are(tmp_path: Path) -> None:
    for path in ("train/b/1.png", "train/a/2.png", "train/a/more/3.png", "val/a/4.png", "val/b/5.png"):
        write_image(tmp_path / path)
    train, held_out = open_data(str(tmp_path), held_out=0.5, seed=0)
    assert [path.removeprefix(str(tmp_path)) for path in paths(train)] == [
        "/train/a/2.png",
        "/train/a/more/3.png",
        "/train/b/1.png",
    ]
    assert train.labels.tolist() == [0, 0, 1]
    assert (held_out.class_names, held_out.labels.tolist()) == (("a", "b"), [0, 1])


def test_only_images_that_are_not_hidden_count(folder: Path) -> None:
    (folder / "README.txt").write_text("about cats")
    (folder / "cats" / "notes.txt").write_text("about cats")
    write_image(folder / ".thumbnails" / "1.png")
    write_image(folder / "cats" / ".1.png")
    (folder / "birds").symlink_to(folder / "dogs")  # a link to a folder is a class, too
    train, held_out = open_data(str(folder), held_out=0.2, seed=0)
    assert train.class_names == ("birds", "cats", "dogs")
    assert len(train) + len(held_out) == 40


def test_a_class_folder_that_is_not_utf8_has_a_name_that_every_file_can_hold(tmp_path: Path) -> None:
    for name in (b"caf\xe9", rb"caf\xe9", b"tea"):
        write_image(tmp_path / os.fsdecode(name) / "1.png")
        write_image(tmp_path / os.fsdecode(name) / "2.png")
    train, held_out = open_data(str(tmp_path), held_out=0.5, seed=0)
    assert train.class_names == held_out.class_names == (r"caf\x5cxe9", r"caf\xe9", "tea")
    assert train.fingerprint != held_out.fingerprint
    assert all(dataset.read(0).size == (4, 3) for dataset in (train, held_out))


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "train"),
        ("bullet train", "tram"),
        ("seg_pred", "seg_train"),
        ("teste", "trainer", "valley"),
        ("settest", "train2"),
    ],
)
def test_a_class_may_be_called_train_or_have_the_word_in_its_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_image(tmp_path / name / "1.png")
        write_image(tmp_path / name / "2.png")
    assert open_data(str(tmp_path), held_out=0.5, seed=0)[0].class_names == names


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("Training", "Testing"),
        ("TRAIN", "Val"),
        ("train", "valid"),
        ("train", "Validation"),
        ("train", "test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("training_set/Training_Set", "test_set"),
        ("Train data", "Test data"),
        ("train2017", "val2017"),
        ("trainingSet/trainingSet", "testSet"),
        ("TrainImages", "valImages"),
    ],
)
def test_the_parts_of_a_data_set_are_known_by_the_names_that_people_give_them(
    tmp_path: Path, train: str, held_out: str
) -> None:
    for folder in (train, held_out):
        for name in ("cats", "dogs"):
            write_image(tmp_path / folder / name / "1.png")
    for junk in ("__MACOSX/train/cats/._1.png", ".git/1.png", "@eaDir/1.png", f"{train}/cats/@eaDir/1.png/thumb.jpg"):
        write_image(tmp_path / junk)
    datasets = open_data(str(tmp_path), held_out=0.5, seed=0)
    for dataset, folder in zip(datasets, (train, held_out), strict=True):
        assert (dataset.class_names, dataset.folder) == (("cats", "dogs"), f"{tmp_path}/{folder}")
        assert dataset.names == ("cats/1.png", "dogs/1.png")
    top, held_top = train.split("/")[0], held_out.split("/")[0]
    assert datasets[0].notes == (f"{tmp_path}: {top}/ is trained on and {held_top}/ is held out",)
    # The images of both parts have the same names, so only the folders tell the parts apart.
    training = Training("weights", 0.5, 0, datasets[0].fingerprint)
    evaluated, which = find_data(str(tmp_path), [training, training])
    assert evaluated.fingerprint == datasets[1].fingerprint
    assert which == [f"all 2 images of {tmp_path}/{held_out} are evaluated"]


def test_what_lies_beside_train_and_val_is_not_used_and_a_note_lists_it(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        for name in ("cats", "dogs"):
            write_image(tmp_path / part / name / "1.png")
    write_image(tmp_path / "seg_pred" / "1.png")
    write_image(tmp_path / "sample.png")
    train, held_out = open_data(str(tmp_path), held_out=0.5, seed=0)
    assert (train.folder, held_out.folder) == (f"{tmp_path}/train", f"{tmp_path}/val")
    unused = "; not used: seg_pred/, test/, 1 image"
    assert train.notes == (f"{tmp_path}: train/ is trained on and val/ is held out{unused}",)
    which = find_data(str(tmp_path), [])[1]
    assert which == [f"all 2 images of {tmp_path}/val are evaluated{unused}"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ("train/a/1.png", "train/b/1.png", "val/1.png"),
            "{0}/val has no class folders, so the classes of its images are unknown: sort them into class folders, or "
            "give {0}/train as the data to hold out some of its images",
        ),
        (
            ("train/a/1.png", "train/b/1.png", "bus/1.png"),
            "{0} has train/, but no val/ or test/ to evaluate on: add one, or give {0}/train as the data to hold out "
            "some of its images",
        ),
        (("val/a/1.png",), "{0} has val/ to evaluate on, but no train/ to train on: add one"),
        (
            ("train/a/1.png", "val/a/1.png", "valid/a/1.png"),
            "{0} has several folders that may be the same part: train/, val/, valid/; keep one for each part",
        ),
        (
            ("train/a/1.png", "test/a/1.png", "seg_train/a/1.png", "seg_test/a/1.png"),
            "{0} has several folders that may",
        ),
        (
            ("set/photos/a/1.png", "set/photos/b/1.png"),
            "{0} has 1 class folder: did you mean {0}/set/photos, which has a, b?",
        ),
        (("train/1.png", "test/1.png"), "{0}/train has no class folders; expected a folder with train/ and val/"),
    ],
)
def test_parts_that_are_missing_flat_or_ambiguous_are_refused_with_the_way_out(
    tmp_path: Path, paths: tuple[str, ...], message: str
) -> None:
    for path in paths:
        write_image(tmp_path / path)
    assert refusal(tmp_path).startswith(message.format(tmp_path))


def test_names_that_differ_only_in_their_unicode_form_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\xe9", "cafe\u0301"
    for path in (f"train/{composed}/1.png", f"train/{decomposed}/2.png", "train/tea/3.png"):
        write_image(tmp_path / path)
    for path in (f"val/{decomposed}/4.png", "val/tea/5.png"):
        write_image(tmp_path / path)
    train, held_out = open_data(str(tmp_path), held_out=0.5, seed=0)
    assert train.class_names == held_out.class_names == (composed, "tea")
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([0, 0, 1], [0, 1])
    assert all(Path(path).is_file() for path in paths(train) + paths(held_out))


def test_images_outside_of_the_class_folders_are_counted(folder: Path) -> None:
    assert open_data(str(folder), held_out=0.2, seed=0)[0].notes == ()
    write_image(folder / "1.png")
    (note,) = open_data(str(folder), held_out=0.2, seed=0)[0].notes
    assert note == f"warning: 1 image is not used, as it lies in {folder} outside its class folders"
    (folder / "IMG_2.CR2").touch()
    assert "warning: 2 images are not used, " in open_data(str(folder), held_out=0.2, seed=0)[0].notes[0]


def test_pictures_of_formats_that_cannot_be_read_are_counted_with_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(Image.OPEN, "HEIF")  # as if pillow-heif were not installed
    for i in range(20):
        (folder / "cats" / f"IMG_{i}.HEIC").touch()
    (folder / "cats" / "@eaDir").mkdir()
    (folder / "cats" / "@eaDir" / "1.heic").touch()
    train, held_out = open_data(str(folder), held_out=0.2, seed=0)
    assert (len(train) + len(held_out), train.unreadable) == (30, 20)
    in_heic = f"20 pictures are in formats that cannot be read here ({folder}/cats/*.HEIC): pip install pillow-heif"
    assert train.notes == (f"warning: {in_heic}",)
    (folder / "dogs" / "raw.cr2").touch()
    (note,) = open_data(str(folder), held_out=0.2, seed=0)[0].notes
    assert f"21 pictures are in formats that cannot be read here ({folder}/cats/*.HEIC, {folder}/dogs/*.cr2)" in note
    assert note.endswith(": pip install pillow-heif for HEIC, and convert the others to JPEG or PNG")
    for path in folder.glob("cats/*.png"):
        path.unlink()
    assert f"{folder}/cats: there is no image in this folder, but {in_heic}" in refusal(folder)


def test_heic_is_an_ordinary_image_where_pillow_heif_is_installed(folder: Path) -> None:
    image = Image.new("RGB", (40, 20), (200, 30, 30))
    image.paste((30, 30, 200), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the image has to be turned by 90 degrees clockwise
    image.save(folder / "cats" / "IMG_1.HEIC", exif=exif.tobytes())
    image.save(folder / "cats" / "sent.jpg", format="HEIF", exif=exif.tobytes())  # as some phones name it
    train, held_out = open_data(str(folder), held_out=0.5, seed=0)
    assert len(train) + len(held_out) == 32
    assert train.notes == ()
    for name in ("IMG_1.HEIC", "sent.jpg"):
        pixels = np.asarray(rgb(folder / "cats" / name)).astype(int)
        assert pixels.shape == (40, 20, 3)
        assert abs(pixels[:18] - (200, 30, 30)).max() < 12  # HEIC is lossy
        assert abs(pixels[22:] - (30, 30, 200)).max() < 12


def test_a_folder_that_is_missing_or_has_no_classes_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    write_image(tmp_path / "flat" / "1.png")
    write_image(tmp_path / "nested" / "animals" / "cats" / "1.png")
    (tmp_path / "file").write_text("not a folder")
    for name in ("missing", "flat", "nested", "file"):
        message = refusal(tmp_path / name)
        assert message.startswith(str(tmp_path / name))
        assert "one folder per class, at least two" in message


def test_all_empty_classes_are_named_at_once(folder: Path) -> None:
    (folder / "birds").mkdir()
    (folder / "fish").mkdir()
    (folder / "fish" / "notes.txt").write_text("not an image")
    message = refusal(folder)
    assert f"{folder}/birds: there is no image in this folder" in message
    assert f"{folder}/fish: there is no image in this folder" in message
    assert "cats" not in message


def test_classes_that_differ_between_train_and_val_are_all_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "split" / "train")
    shutil.copytree(folder, tmp_path / "split" / "val")
    (tmp_path / "split" / "val" / "dogs").rename(tmp_path / "split" / "val" / "Dogs")
    message = refusal(tmp_path / "split")
    assert message == (
        f"{tmp_path}/split: train/ and val/ must have the same classes; only in train/: dogs; only in val/: Dogs; "
        "dogs and Dogs differ only in case: rename one of them"
    )


def test_a_folder_that_may_not_be_read_is_named() -> None:
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)  # the user nobody, because root may read everything
        try:
            assert refusal(folder) == f"cannot read {folder}: Permission denied"
        finally:
            os.seteuid(before)
            os.chmod(folder, 0o700)
