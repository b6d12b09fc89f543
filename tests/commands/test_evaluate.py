"""``flax-googlenet evaluate``: the figures of torchvision's model, of crops and ensembles, on any kind of data."""

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from jax import numpy as jnp
from PIL import Image
from sklearn import metrics
from torchvision.models import GoogLeNet as TorchGoogLeNet
from torchvision.transforms import functional, v2

import flax_googlenet
from flax_googlenet.commands.cli import main
from flax_googlenet.evaluation.crops import crops
from flax_googlenet.evaluation.ensembles import Network, answers, make_networks
from flax_googlenet.images.preprocessing import ImageError, normalise
from flax_googlenet.training.datasets import DataError
from flax_googlenet.training.history import Training, past_trainings, trainings_of
from flax_googlenet.training.recipe import PRESETS
from flax_googlenet.training.splits import find_data, open_data
from flax_googlenet.weights.checkpoint import load_weights

NAMES = ["flower", "goat", "temple", "zebra"]
TO_TENSOR = v2.Compose(
    [
        v2.PILToTensor(),
        v2.ConvertImageDtype(torch.float32),
        v2.Normalize(reference.IMAGENET.transforms().mean, reference.IMAGENET.transforms().std),
    ]
)


def state_dict(num_classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    tensors = reference.random_checkpoint(num_classes, seed)
    return {key: tensor.numpy() for key, tensor in tensors.items() if not key.startswith("aux")}


def save(path: Path, num_classes: int = 4, seed: int = 0, **metadata: Any) -> None:
    model = flax_googlenet.GoogLeNet(num_classes=num_classes, aux_logits=False)
    flax_googlenet.save(path, model, flax_googlenet.from_torchvision(state_dict(num_classes, seed)), metadata)


@pytest.fixture(scope="module")
def torch_model() -> TorchGoogLeNet:
    return reference.build(state_dict(4), transform_input=False, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and ``photos``: parts of both photographs in two class folders, 6 and 5 images."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("weights", 0), ("other", 1)):
        save(folder / f"{name}.safetensors", seed=seed, class_names=NAMES)
    save(folder / "nameless.safetensors")
    save(folder / "thousand.safetensors", num_classes=1000)
    save(folder / "small.safetensors", class_names=NAMES, recipe=dataclasses.asdict(PRESETS["digits"]))
    for i in range(11):
        photograph = Image.fromarray(
            reference.photographs()[i % 2][20 * i : 20 * i + 180, 30 * i : 30 * i + 200 + 7 * i]
        )
        path = folder / "photos" / ("temple", "flower")[i % 2] / f"{i:02}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.save(path)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with links to the weights and the photos."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def figures(capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What ``evaluate ... --json`` prints, one image at a time: one size of batch is compiled."""

    def run(*arguments: str) -> dict[str, Any]:
        assert main(["evaluate", *arguments, "--json", "--batch-size", "1"]) == 0
        return json.loads(capfd.readouterr().out)

    return run


def images() -> list[Path]:
    return sorted(Path("photos").glob("*/*"))


def torch_probabilities(model: TorchGoogLeNet, views: Sequence[torch.Tensor]) -> np.ndarray:
    """float64 [4]: the mean of the softmax over the views of one image."""
    with torch.inference_mode():
        return model(torch.stack(list(views))).double().softmax(1).mean(0).numpy()


def same_figures(figures: dict[str, Any], probabilities: Sequence[np.ndarray], paths: Sequence[Path]) -> None:
    """Of the four classes of NAMES; top-5 is always right then."""
    named = [NAMES[p.argmax()] for p in probabilities]
    assert len(set(named)) > 1  # a constant answer would hide what is wrong
    right = [answer == path.parent.name for answer, path in zip(named, paths, strict=True)]
    assert figures["count"] == len(paths)
    assert figures["top1"] == np.mean(right)
    assert figures["top5"] == 1
    assert figures["classes"].keys() == {"flower", "temple"}  # of the four that the network knows
    answers = [path.parent.name for path in paths], named
    with warnings.catch_warnings(action="ignore"):  # answers that are no class of the data
        assert figures["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(*answers), rel=1e-15)
    for name, found in figures["classes"].items():
        of_class = [ok for ok, path in zip(right, paths, strict=True) if path.parent.name == name]
        assert found == {"count": len(of_class), "top1": np.mean(of_class)}


# The figures.


@pytest.mark.slow
def test_with_one_crop_every_answer_is_torchvisions(
    here: Path, torch_model: TorchGoogLeNet, figures: Callable[..., dict[str, Any]]
) -> None:
    preset = reference.IMAGENET.transforms()
    expected = [torch_probabilities(torch_model, [preset(Image.open(path).convert("RGB"))]) for path in images()]
    photos, _ = find_data("photos", [])
    weights = {"weights": load_weights(Path("weights.safetensors"), dtype=jnp.float32)}
    networks, _ = make_networks(weights, photos.class_names, "photos")
    found = list(answers(networks, photos, 1, 224, 4, pytest.fail))
    assert [index for indices, _ in found for index in indices] == list(range(11))
    # Probabilities, of logits in float32 and of magnitude 3. Measured: 1.1e-6.
    np.testing.assert_allclose(np.concatenate([p for _, p in found]), expected, atol=4e-6, rtol=0)

    result = figures("weights.safetensors", "photos")
    same_figures(result, expected, images())
    about = {"data", "weights", "crops", "image_size", "unreadable"}
    assert result.keys() == about | {"count", "top1", "top5", "balanced_accuracy", "classes"}
    assert (result["data"], result["weights"]) == ("photos", ["weights.safetensors"])
    assert (result["crops"], result["image_size"], result["unreadable"]) == (1, 224, 0)


def plain_paper_crops(image: Image.Image, size: int) -> list[Image.Image]:
    """Section 7 of the paper, word by word."""
    found = []
    for short_side in (256, 288, 320, 352):
        resized = functional.resize(image, round(short_side * size / 224))
        side = min(resized.size)
        if resized.width >= resized.height:
            lefts = (0, round((resized.width - side) / 2), resized.width - side)
            squares = [functional.crop(resized, 0, left, side, side) for left in lefts]
        else:
            tops = (0, round((resized.height - side) / 2), resized.height - side)
            squares = [functional.crop(resized, top, 0, side, side) for top in tops]
        for square in squares:
            for mirrored in (False, True):
                version = functional.hflip(square) if mirrored else square
                found += [*functional.five_crop(version, [size, size]), functional.resize(version, [size, size])]
    return found


@pytest.mark.parametrize("size", [(320, 240), (241, 327), (100, 100)])
def test_crops_are_those_of_torchvision_and_of_the_paper(size: tuple[int, int]) -> None:
    image = Image.fromarray(reference.photographs()[1]).resize(size)
    ten = functional.ten_crop(functional.resize(image, 256), [224, 224])
    for count, views in ((10, ten), (144, plain_paper_crops(image, 224))):
        found = crops(image, count)
        assert found.shape == (count, 224, 224, 3)
        np.testing.assert_array_equal(found, np.stack([normalise(view) for view in views]))


def test_an_image_too_long_for_many_crops_is_named() -> None:
    strip = Image.new("RGB", (2, 100))
    assert crops(strip, 1).shape == (1, 224, 224, 3)
    with pytest.raises(ImageError, match="2x100 pixels are too long for 10 crops"):
        crops(strip, 10)


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, 144])
def test_the_softmax_of_the_crops_is_averaged_at_the_size_of_the_training(
    here: Path, torch_model: TorchGoogLeNet, figures: Callable[..., dict[str, Any]], count: int
) -> None:
    result = figures("small.safetensors", "photos", "--crops", str(count))
    assert (result["crops"], result["image_size"]) == (count, 32)
    expected = []
    for path in images():
        image = Image.open(path).convert("RGB")
        views = (
            functional.ten_crop(functional.resize(image, 37), [32, 32]) if count == 10 else plain_paper_crops(image, 32)
        )
        expected.append(torch_probabilities(torch_model, [TO_TENSOR(view) for view in views]))
    same_figures(result, expected, images())


@pytest.mark.slow
def test_an_ensemble_is_the_mean_of_its_networks(
    here: Path, torch_model: TorchGoogLeNet, figures: Callable[..., dict[str, Any]]
) -> None:
    other = reference.build(state_dict(4, seed=1), transform_input=False, dtype=torch.float32)
    # The same network as "other", with its classes in another order.
    shuffled = [2, 0, 3, 1]
    tensors = {k: x[shuffled] if k.startswith("fc.") else x for k, x in state_dict(4, seed=1).items()}
    model = flax_googlenet.GoogLeNet(num_classes=4, aux_logits=False)
    metadata = {"class_names": [NAMES[i] for i in shuffled]}
    flax_googlenet.save("shuffled.safetensors", model, flax_googlenet.from_torchvision(tensors), metadata)

    preset = reference.IMAGENET.transforms()
    views = [[preset(Image.open(path).convert("RGB"))] for path in images()]
    expected = [(torch_probabilities(torch_model, v) + torch_probabilities(other, v)) / 2 for v in views]
    for second in ("other", "shuffled"):
        same_figures(figures("weights.safetensors", f"{second}.safetensors", "photos"), expected, images())


@pytest.mark.slow
def test_the_network_whose_answers_are_not_finite_is_named(here: Path) -> None:
    photos, _ = find_data("photos", [])
    logits = {"sound": np.eye(4), "broken": np.where(np.eye(4), np.inf, 0)}
    networks = [Network(name, lambda images, x=x: x[: len(images)], np.arange(4)) for name, x in logits.items()]
    with pytest.raises(flax_googlenet.CheckpointError, match="broken is damaged: its answers are not finite"):
        next(answers(networks, photos, 1, 32, 2, pytest.fail))


# Classes.


IMAGENET = list(reference.IMAGENET.meta["categories"])
WORDNET = [f"n{1440764 + 37 * i:08}" for i in range(1000)]  # in ImageNet's order


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "data"), [(("nameless", "names", "ids"), "ids"), (("ids", "nameless", "names"), "names")]
)
def test_an_ensemble_agrees_on_its_classes_in_any_order(here: Path, kinds: Sequence[str], data: str) -> None:
    class_names = {"nameless": None, "names": IMAGENET, "ids": WORDNET[::-1]}
    in_imagenet = {"names": np.arange(1000), "ids": np.arange(1000)[::-1]}
    thousand = load_weights(Path("thousand.safetensors"))
    ensemble = {kind: thousand._replace(metadata={"class_names": class_names[kind]}) for kind in kinds}
    networks, match = make_networks(ensemble, {"names": IMAGENET, "ids": WORDNET}[data][5:7], "data")
    places = in_imagenet[data]  # of the answers: those of the network that has the names of the data
    assert match.labels[np.argsort(places)].tolist() == [-1] * 5 + [0, 1] + [-1] * 993
    assert sorted(note.partition(" ")[0] for note in match.notes) == ["nameless", "the"]
    for network in networks:
        assert (in_imagenet.get(network.name, places)[network.order] == places).all()
    with pytest.raises(DataError, match=r"2 of the 2 classes of data .* 1000"):
        make_networks(ensemble, ["a", "b"], "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nameless.safetensors", "photos"], "nameless.safetensors has no class names and 4 classes, but photos has 2"),
        (["thousand.safetensors", "photos"], "thousand.safetensors has "),
        (["weights.safetensors", "digits"], "10 of the 10 classes of digits "),
        (["weights.safetensors", "thousand.safetensors", "photos"], "they cannot be averaged"),
        (["weights.safetensors", "small.safetensors", "photos"], "different sizes: weights.safetensors: 224, small"),
        (["weights.safetensors", "nowhere"], "nowhere: no such folder"),
        (["nowhere.safetensors", "photos"], "cannot read nowhere.safetensors"),
        (["weights.safetensors", "photos", "--confusion", "nowhere/x.png"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(
    here: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", *arguments]) == 3
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: name the weights and then the data"),
        (["photos"], "error: name the weights and then the data"),
        (["photos", "weights.safetensors"], "error: photos is a folder: name the weights and then the data"),
        (["digits", "weights.safetensors"], "error: weights.safetensors is a file: name the weights and then the data"),
        (["weights.safetensors", "photos", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["a", "b", "--confusion", "x.txt"], "x.txt: the name of the picture must end in .png"),
    ],
)
def test_a_wrong_command_line_has_its_own_status(
    here: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert message in capfd.readouterr().err


# Data.


@pytest.mark.slow
def test_an_unreadable_image_is_named_and_the_others_are_evaluated(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in images():
        copy = Path("broken", path.parent.name, path.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    Path("broken/temple/02.jpg").write_bytes(b"no image")
    Path("broken/flower/raw.NEF").write_bytes(b"a camera's own format")
    Path("broken/zebra").mkdir()
    Path("broken/zebra/0.png").write_bytes(b"no image")
    assert main(["evaluate", "weights.safetensors", "broken", "--json", "--batch-size", "1"]) == 1
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert (result["count"], result["unreadable"]) == (10, 3)
    assert result["balanced_accuracy"] == np.mean([result["classes"][name]["top1"] for name in ("flower", "temple")])
    assert result["classes"]["zebra"] == {"count": 0, "top1": None}
    assert "no image is evaluated of the class 'zebra'\n" in captured.err
    assert "1 picture is in a format that cannot be read here (broken/flower/*.NEF): convert to JPEG" in captured.err
    assert "broken/temple/02.jpg is not an image" in captured.err
    assert "10 images in" in captured.err
    assert "3 could not be read" in captured.err


def test_of_a_folder_with_val_it_is_val(here: Path) -> None:
    Path("split").mkdir()
    Path("split/val").symlink_to(Path("photos").resolve())
    split, which = find_data("split", [Training("weights", 0.2, 0, "of split/train")])
    assert split.names == find_data("photos", [])[0].names
    assert len(split) == 11
    assert which == ["all 11 images of split/val are evaluated"]


@pytest.mark.slow
def test_of_the_folder_of_the_training_it_is_what_was_held_out(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(PRESETS["digits"], held_out=0.4, seed=3)
    train, held_out = open_data("photos", held_out=0.4, seed=3)
    trained = {"recipe": dataclasses.asdict(recipe), "trained_on": train.fingerprint}
    save(Path("trained.safetensors"), class_names=NAMES, source="random", **trained)
    # The second network's training counts as that of the first.
    assert main(["evaluate", "small.safetensors", "trained.safetensors", "photos", "--json", "--batch-size", "1"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["count"] == len(held_out) == 4
    assert captured.err.startswith("warning: the weights of trained.safetensors are random: the figures mean nothing\n")
    assert "4 of the 11 images of photos are evaluated: the weights were trained on the others" in captured.err


def test_images_of_a_training_before_the_last_one_do_not_count_and_are_warned_of_where_they_are_held_out(
    here: Path,
) -> None:
    recipes = [dataclasses.replace(PRESETS["digits"], held_out=held_out) for held_out in (0.1, 0.5)]
    (first, new), (second, _) = (open_data("photos", held_out=recipe.held_out, seed=0) for recipe in recipes)
    entries = [
        {"recipe": dataclasses.asdict(recipe), "trained_on": train.fingerprint}
        for recipe, train in zip(recipes, (first, second), strict=True)
    ]
    metadata = {**entries[1], "trained_before": past_trainings(entries[0])}
    trainings = trainings_of("w", metadata)
    assert past_trainings(metadata) == [entries[1], entries[0]]
    dataset, _ = find_data("photos", [Training("w", 0.5, 0, second.fingerprint, trainings)])
    assert dataset.names == new.names
    train, held = open_data("photos", held_out=0.5, seed=0, earlier=trainings)
    seen = len(set(held.names) - set(new.names))
    assert train.names == second.names
    (note,) = train.notes
    assert note.startswith(
        f"warning: w was trained on {seen} of the {len(held)} images of photos that are held out now"
    )
    assert "set seed to 0 and held_out to 0.1 " in note
    for broken in (None, 1, [1, {"trained_on": "a"}, {"trained_on": [], "recipe": entries[0]["recipe"]}]):
        assert past_trainings({"trained_before": broken}) == []


def test_one_image_added_to_the_folder_of_the_training_is_warned_of(here: Path) -> None:
    copy = Path(shutil.copytree("photos", "copy", symlinks=False))
    train, held_out = open_data("copy", held_out=0.4, seed=3)
    shutil.copy(copy / "temple" / "02.jpg", copy / "temple" / "new.jpg")
    dataset, (warning, which) = find_data("copy", [Training("weights", 0.4, 3, train.fingerprint)])
    assert len(dataset) == len(train) + len(held_out) + 1
    assert warning.startswith("warning: weights was trained on other images, or images of copy were added or removed")
    assert which == "all 12 images of copy are evaluated"


@pytest.mark.parametrize("data", ["digits", "photos"])
def test_of_several_networks_only_images_count_that_none_was_trained_on(here: Path, data: str) -> None:
    parts = {seed: open_data(data, held_out=0.5, seed=seed) for seed in (0, 1)}
    trainings = [Training(str(seed), 0.5, seed, train.fingerprint) for seed, (train, _) in parts.items()]
    trained_on = set[str]().union(*(train.names for train, _ in parts.values()))
    whole = sorted(parts[0][0].names + parts[0][1].names)
    expected = [name for name in whole if name not in trained_on]
    assert 0 < len(expected) < min(len(held) for _, held in parts.values())  # the parts differ
    for turned in (trainings, trainings[::-1]):
        dataset, (which,) = find_data(data, turned)
        assert sorted(dataset.names) == expected
        assert which.startswith(f"{len(expected)} of the {len(whole)} images of {data} are evaluated: ")
    for alone, (_, held) in zip(trainings, parts.values(), strict=True):
        assert find_data(data, [alone])[0].fingerprint == held.fingerprint


def test_where_a_training_left_no_image_one_network_is_warned_of_and_several_are_refused(here: Path) -> None:
    photos, _ = find_data("photos", [])
    on_all = Training("a.safetensors", 0.2, 0, photos.fingerprint)
    dataset, which = find_data("photos", [on_all])
    assert len(dataset) == 11
    assert len(which) == 1
    assert which[0].startswith(
        "warning: all 11 images of photos have the names of images that a.safetensors was trained on"
    )
    with pytest.raises(DataError, match="each of the 11 images of photos has the name of an image that one of the"):
        find_data("photos", [Training("b.safetensors", 0.2, 0, None), on_all])


@pytest.mark.slow
def test_of_digits_it_is_what_the_recipe_holds_out(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # 10 classes and this size have a program that test_classify.py needs, too.
    recipe = dataclasses.replace(PRESETS["digits"], held_out=0.02, image_size=64)
    save(Path("ten.safetensors"), num_classes=10, class_names=[*map(str, range(10))], recipe=dataclasses.asdict(recipe))
    assert main(["evaluate", "ten.safetensors", "digits", "--batch-size", "1"]) == 0
    captured = capfd.readouterr()
    count = len(open_data("digits", held_out=0.02, seed=0)[1])
    assert f"{count} of the 1797 images of digits are evaluated: the weights were trained on the others" in captured.err
    assert f"\n{count} images in " in captured.err
    figures = [re.fullmatch(r"(.*?) +([0-9.]+)%", line) for line in captured.out.splitlines()]
    assert [found and found[1] for found in figures] == ["top-1", "top-5", "balanced accuracy"]
    top1, top5, _ = (float(found[2]) for found in figures if found)
    assert 0 <= top1 < top5 < 100


# The picture, and what a person reads.


@pytest.mark.slow
def test_the_figures_for_a_person_and_the_picture(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "weights.safetensors", "photos", "--confusion", "confusion.png", "--batch-size", "1"]) == 0
    captured = capfd.readouterr()
    # No top-5: of four classes it is always right.
    assert [line.partition("  ")[0] for line in captured.out.splitlines()] == ["top-1", "balanced accuracy"]
    assert captured.err.startswith("all 11 images of photos are evaluated\n11 images in")
    with Image.open("confusion.png") as picture:
        assert picture.width > 500
