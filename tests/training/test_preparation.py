"""What a run is going to do, and the state that it starts from."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from flax_googlenet.architecture import BLOCKS
from flax_googlenet.model import GoogLeNet
from flax_googlenet.training.datasets import Dataset
from flax_googlenet.training.devices import Devices
from flax_googlenet.training.finetune import reorder_head
from flax_googlenet.training.preparation import Plan, describe_classes, find_head, initial_state, update_class_weights
from flax_googlenet.training.recipe import Recipe, RecipeError
from flax_googlenet.weights.checkpoint import Weights


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
            "is kept: W has no class names: its 2 classes are assumed to be",
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
def test_the_head_of_the_weights_is_kept_for_the_same_classes_in_any_order_and_the_reason_is_given(
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


def test_the_classes_are_listed_with_their_images_and_a_warning_if_these_are_very_unequal() -> None:
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
        "warning: class1 has 30 images to train on and class2 3: set class_weights to balanced, so that "
        "every class counts the same"
    )
    assert described(4, 30, 3, balanced=True) == [classes]
    assert described(1, 1) == ["2 classes: class0, class1; 1 image each"]
    assert described(*[5] * 1000)[0].startswith("1000 classes: class0, class1, ")
    assert described(*[5] * 1000)[0].endswith(", class7, ..., class999; 5 images each")


def make_plan(data: Dataset, **fields: Any) -> Plan:
    return Plan(Recipe(**fields), data, data, 1, 90, {}, ())


@pytest.mark.parametrize(("class_weights", "shape"), [("none", None), ("balanced", (3,))])
def test_the_recipe_says_whether_classes_are_weighted(class_weights: Any, shape: tuple[int, ...] | None) -> None:
    data = Dataset(("a", "b", "c"), np.array([0, 0, 1, 2], np.int32), tuple("0123"))
    shapes, _ = initial_state(make_plan(data, class_weights=class_weights), None, None, Devices())
    assert getattr(shapes.class_weights, "shape", None) == shape


def test_a_run_that_is_continued_with_other_data_gets_the_class_weights_of_these() -> None:
    plan = make_plan(Dataset(("a", "b"), np.array([0, 0, 0, 1], np.int32), tuple("0123")), class_weights="balanced")
    shapes, _ = initial_state(plan, None, None, Devices())
    resumed = shapes.replace(class_weights=np.array([1, 1], np.float32))
    weights = update_class_weights(resumed, plan, Devices()).class_weights
    np.testing.assert_array_equal(weights, np.array([4 / 6, 2], np.float32), strict=True)


def test_a_batch_of_one_small_image_is_refused_unless_batchnorm_is_frozen() -> None:
    data = Dataset(("a", "b"), np.array([0, 1], np.int32), tuple("01"))
    with pytest.raises(RecipeError, match=r"choose a batch_size of 2 or more"):
        initial_state(make_plan(data, batch_size=1, image_size=32), None, None, Devices())
    frozen = tuple(block for block in BLOCKS if block not in ("fc", "aux1", "aux2"))
    initial_state(make_plan(data, batch_size=1, image_size=32, frozen=frozen), None, None, Devices())
