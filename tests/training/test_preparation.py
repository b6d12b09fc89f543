"""Where a run goes on, and what must be as it was."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flax_googlenet.commands.status import CommandError
from flax_googlenet.model import GoogLeNet
from flax_googlenet.training import checkpoints
from flax_googlenet.training.datasets import Dataset
from flax_googlenet.training.devices import Devices
from flax_googlenet.training.finetune import reorder_head
from flax_googlenet.training.manifest import seal
from flax_googlenet.training.preparation import describe_classes, find_head, initial_state, resume, save, weigh_classes
from flax_googlenet.training.recipe import Recipe
from flax_googlenet.training.tally import Tally
from flax_googlenet.weights.checkpoint import CheckpointError, Weights

STATE: Any = {"weights": np.arange(6, dtype=np.float32)}  # any tree will do
TALLY = Tally(step=7, unreadable=["a.jpg"], not_finite=2, not_finite_in_a_row=1, best_step=4, best_accuracy=0.1)


def identity(data: str = "digits", **fields: Any) -> dict[str, Any]:
    return {"recipe": dataclasses.asdict(Recipe(**fields)), "data": [data, data], "weights": None}


def make_weights(num_classes: int, *names: str, **metadata: Any) -> Weights:
    metadata = metadata | {"class_names": names or None}
    return Weights(GoogLeNet(num_classes=num_classes), {}, json.loads(json.dumps(metadata)), "")


IMAGENET = [f"class {i}" for i in range(1000)]
IMAGENET[0], IMAGENET[1], IMAGENET[6], IMAGENET[999] = "tench", "goldfish", "stingray", "toilet tissue"
WORDNET = [f"n{1450000 + 7000 * i:08}" for i in range(1000)]
WORDNET[0], WORDNET[1], WORDNET[6], WORDNET[999] = "n01440764", "n01443537", "n01498041", "n15075141"


@pytest.mark.parametrize(
    ("weights", "class_names", "order", "reason"),
    [
        (make_weights(2, "cat", "dog"), ("cat", "dog"), [0, 1], "is kept: its classes are those of DATA"),
        (
            make_weights(3, "dog", "ant", "cat"),
            ("ant", "cat", "dog"),
            [1, 2, 0],
            "is kept: its classes are those of DATA",
        ),
        (
            make_weights(2),
            ("cat", "dog"),
            [0, 1],
            "is kept: W has no class names: its 2 classes are taken in the order",
        ),
        (make_weights(1000, *IMAGENET), WORDNET, list(range(1000)), "is kept: the WordNet identifiers of DATA"),
        (
            make_weights(1000, *IMAGENET),
            WORDNET[:10],
            None,
            "is replaced by a new one: its 1000 classes are not those of DATA",
        ),
        (
            make_weights(2, "cat", "dog"),
            ("cat", "cow"),
            None,
            "is replaced by a new one: its 2 classes are not those of DATA",
        ),
        (
            make_weights(3),
            ("cat", "dog"),
            None,
            "is replaced by a new one: its 3 classes have no names, and DATA has 2",
        ),
        (
            make_weights(3, "ant", "cat", "dog"),
            ("cat", "dog"),
            None,
            "is replaced by a new one: DATA has only 2 of its 3 classes",
        ),
    ],
)
def test_the_head_of_the_weights_is_kept_for_the_same_classes_in_any_order_and_the_reason_is_said(
    weights: Weights, class_names: tuple[str, ...], order: list[int] | None, reason: str
) -> None:
    head = find_head(tuple(class_names), "DATA", weights, "W")
    assert head.order is order or head.order.tolist() == order
    assert head.reason.startswith(f"the head of W {reason}")


def test_a_head_that_is_kept_gets_the_order_of_the_data() -> None:
    rng = np.random.default_rng(0)
    layer = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    variables = {"params": {"conv1": layer, "fc": layer, "aux1": {"fc1": layer, "fc2": layer}}, "batch_stats": {}}
    reordered = {"kernel": layer["kernel"][:, [1, 2, 0]], "bias": layer["bias"][[1, 2, 0]]}
    expected = {
        "params": {"conv1": layer, "fc": reordered, "aux1": {"fc1": layer, "fc2": reordered}},
        "batch_stats": {},
    }
    jax.tree.map(np.testing.assert_array_equal, reorder_head(variables, np.array([1, 2, 0])), expected)


def test_the_classes_are_said_with_their_images_and_a_warning_where_these_are_very_unequal() -> None:
    def described(*counts: int, balanced: bool = False) -> list[str]:
        names = tuple(f"class{i}" for i in range(len(counts)))
        return describe_classes(
            Dataset(names, np.repeat(np.arange(len(counts), dtype=np.int32), counts), ()), balanced=balanced
        )

    assert described(8, 8, 8) == ["3 classes: class0, class1, class2; 8 images each"]
    assert described(9, 1, 4) == ["3 classes: class0, class1, class2; 1 (class1) to 9 (class0) images each"]
    classes, warning = described(4, 30, 3)
    assert classes == "3 classes: class0, class1, class2; 3 (class2) to 30 (class1) images each"
    assert warning == (
        "warning: class1 has 30 images to train on and class2 3: with --recipe.class-weights balanced every class "
        "counts the same"
    )
    assert described(4, 30, 3, balanced=True) == [classes]
    assert described(1, 1) == ["2 classes: class0, class1; 1 image each"]
    assert described(*[5] * 1000)[0].startswith("1000 classes: class0, class1, ")
    assert described(*[5] * 1000)[0].endswith(", class7, ..., class999; 5 images each")


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    (tmp_path / "recipe.json").write_text(Recipe().to_json())
    (tmp_path / "best.safetensors").touch()
    save(tmp_path, TALLY, STATE, identity(), keep=1)
    return tmp_path


def refusal(workdir: Path, wanted: dict[str, Any]) -> str:
    with pytest.raises(CommandError) as caught:
        resume(workdir, STATE, wanted, False, pytest.fail)
    return str(caught.value)


def test_what_was_counted_comes_back_with_the_state(workdir: Path, tmp_path: Path) -> None:
    found = resume(workdir, STATE, identity(), False, pytest.fail)
    assert found is not None
    assert found[0] == TALLY
    np.testing.assert_array_equal(found[1]["weights"], STATE["weights"])  # type: ignore[index]
    assert resume(tmp_path / "another", STATE, identity(), False, pytest.fail) is None


def test_best_weights_that_were_removed_are_no_longer_the_best(workdir: Path) -> None:
    (workdir / "best.safetensors").unlink()
    found = resume(workdir, STATE, identity(), False, pytest.fail)
    assert found is not None
    assert found[0] == dataclasses.replace(TALLY, best_step=0, best_accuracy=0.0)


def test_a_checkpoint_of_a_version_that_did_not_know_the_best_evaluation_is_continued(tmp_path: Path) -> None:
    extra = {"identity": identity(), "tally": {"unreadable": ["a.jpg"], "not_finite": 2, "not_finite_in_a_row": 1}}
    checkpoints.save(tmp_path / "checkpoints", 7, STATE, extra)
    found = resume(tmp_path, STATE, identity(), False, pytest.fail)
    assert found is not None
    assert found[0] == dataclasses.replace(TALLY, best_step=0, best_accuracy=0.0)


def test_another_recipe_or_other_data_are_refused_unless_told(workdir: Path) -> None:
    said = refusal(workdir, identity(label_smoothing=0.2, keep=7))
    assert "holds a run with label_smoothing 0.1, now 0.2: choose another folder, or add --override" in said
    assert "holds a run with other data: choose another folder" in refusal(workdir, identity("photos"))
    assert resume(workdir, STATE, identity(keep=7), False, pytest.fail) is not None  # which changes no bit
    told: list[str] = []
    found = resume(workdir, STATE, identity("photos", label_smoothing=0.2), True, told.append)
    assert found is not None
    past = {"trained_on": "digits", "recipe": json.loads(Recipe().to_json())}
    assert found[0] == dataclasses.replace(TALLY, best_step=0, best_accuracy=0.0, trained_before=[past])
    assert told == ["warning: the run was trained on other data before: they may have images that are held out now"]


def test_a_run_of_an_earlier_version_goes_on_with_the_defaults_of_the_fields_that_came_later(tmp_path: Path) -> None:
    earlier = identity(epochs=3)
    del earlier["recipe"]["nesterov"]
    (tmp_path / "recipe.json").write_text(json.dumps(earlier["recipe"]))
    save(tmp_path, TALLY, STATE, earlier, keep=1)
    assert resume(tmp_path, STATE, identity(epochs=3), False, pytest.fail) is not None
    assert "a run with nesterov True, now False" in refusal(tmp_path, identity(epochs=3, nesterov=False))


def test_a_recipe_that_makes_another_state_is_refused_even_when_told(workdir: Path) -> None:
    state = {**STATE, "average": STATE["weights"]}
    with pytest.raises(CommandError) as caught:
        resume(workdir, state, identity(average_decay=0.9), True, pytest.fail)
    assert str(caught.value) == f"{workdir} holds a run with average_decay None, now 0.9: choose another folder"
    with pytest.raises(CheckpointError, match=r"missing: .*average"):  # whatever else has made another state
        resume(workdir, state, identity(), True, pytest.fail)


def test_a_damaged_recipe_is_named(workdir: Path) -> None:
    (workdir / "recipe.json").write_bytes(b"\xff\xfe")
    assert f"{workdir}/recipe.json: not as to_json writes it" in refusal(workdir, identity())


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_a_recipe_that_is_no_file_is_named(kind: str, workdir: Path) -> None:
    recipe = workdir / "recipe.json"
    recipe.unlink()
    if kind == "folder":
        recipe.mkdir()
    elif kind == "pipe":
        os.mkfifo(recipe)
    else:
        recipe.symlink_to("none")
    assert f"cannot read {recipe}: " in refusal(workdir, identity())


def test_checkpoints_of_a_later_version_are_refused(workdir: Path) -> None:
    step = workdir / "checkpoints" / "step_00000007"
    content = json.loads((step / "extra.json").read_text())
    content["extra"]["tally"]["colour"] = 1
    (step / "extra.json").write_text(json.dumps(content))
    (step / "manifest.sha256").unlink()
    seal(step)
    with pytest.raises(CheckpointError, match=r"step 7 is of another version of flax_googlenet: .*colour"):
        resume(workdir, STATE, identity(), False, pytest.fail)


def test_where_no_checkpoint_is_whole_each_damage_is_told(workdir: Path) -> None:
    (workdir / "checkpoints" / "step_00000007" / "extra.json").unlink()
    told: list[str] = []
    with pytest.raises(CheckpointError, match="none is whole"):
        resume(workdir, STATE, identity(), False, told.append)
    assert len(told) == 1
    assert "extra.json" in told[0]


@pytest.mark.parametrize(("class_weights", "shape"), [("none", None), ("balanced", (3,))])
def test_the_recipe_says_whether_classes_are_weighted(class_weights: Any, shape: tuple[int, ...] | None) -> None:
    data = Dataset(("a", "b", "c"), np.array([0, 0, 1, 2], np.int32), tuple("0123"))
    shapes, _ = initial_state(Devices(), Recipe(class_weights=class_weights), data, 1, None, None)
    assert getattr(shapes.class_weights, "shape", None) == shape


def test_a_run_that_goes_on_with_other_data_weighs_the_classes_by_these() -> None:
    data = Dataset(("a", "b"), np.array([0, 0, 0, 1], np.int32), tuple("0123"))
    shapes, _ = initial_state(Devices(), Recipe(class_weights="balanced"), data, 1, None, None)
    resumed = shapes.replace(class_weights=np.array([1, 1], np.float32))
    weights = weigh_classes(resumed, Devices(), data).class_weights
    np.testing.assert_array_equal(weights, np.array([4 / 6, 2], np.float32), strict=True)
