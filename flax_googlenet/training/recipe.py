"""What a run does: a frozen dataclass that is the configuration, the command line and its documentation at once."""

import dataclasses
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax

from flax_googlenet.errors import GoogLeNetError
from flax_googlenet.model import BLOCKS, MIN_SIZE

if TYPE_CHECKING:  # the command's --help shows the recipe where the extra "train" is not installed, too
    import optax


class RecipeError(GoogLeNetError, ValueError):
    """A recipe that cannot be followed; the message lists all that is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are those of the preset ``imagenet``; ``PRESETS`` has the others.

    BatchNorm's statistics and the moving average change with every batch, also where ``accumulate`` is more than 1.

    Raises:
        RecipeError: if a field has a value that makes no sense.
    """

    seed: int = 0
    """Seed of the initial weights, the order of the images, augmentation, dropout and the choice of held-out images."""
    epochs: int = 90
    """Number of passes over the training images."""
    batch_size: int = 256
    """Number of images in a step, over all devices and processes."""
    image_size: int = 224
    """Height and width of the training crops, in pixels."""
    learning_rate: float = 0.1
    """Highest learning rate of the schedule."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's kind of momentum, instead of the classical one."""
    weight_decay: float = 5e-5
    """Factor of the weights that is added to their gradients, for kernels only, not for biases and BatchNorm."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, 4 percent less every 8 epochs (step), or a cosine down to 0."""
    warmup_epochs: float = 5.0
    """Epochs in which the learning rate rises evenly, from 1/n of it in the first of n steps; at most half of all."""
    label_smoothing: float = 0.1
    """Share of a label that is spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the loss; with balanced, rare classes count as much as frequent ones."""
    aux_weight: float = 0.3
    """Weight of the loss of each auxiliary head; the paper has 0.3."""
    dropout: float = 0.2
    """Dropout rate before the last layer."""
    dropout_aux: float = 0.7
    """Dropout rate in the auxiliary heads."""
    average_decay: float | None = None
    """Decay of a moving average of the weights, which is evaluated and saved in their place. None keeps none."""
    accumulate: int = 1
    """Number of batches whose mean gradient makes one change of the weights. A rest at the end changes nothing."""
    frozen: tuple[str, ...] = ()
    """Blocks that stay unchanged, with their statistics: conv1-conv3, inception3a-inception5b, fc, aux1, aux2."""
    head_learning_rate: float = 1.0
    """Learning rate of fc, aux1 and aux2, as a multiple of the learning rate of the other blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the computation. Weights, BatchNorm statistics and the loss stay in float32."""
    held_out: float = 0.1
    """Share of the images that is held out for evaluation, unless the data have a part of their own for it."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a training crop, as a share of the image."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width of a training crop, as a multiple of its height."""
    interpolation: Literal["bilinear", "random"] = "bilinear"
    """Interpolation of a crop when it is resized; random chooses one of Pillow's for each crop."""
    flip: bool = True
    """Mirroring of half of the training crops."""
    distortion: bool = False
    """Random changes of brightness, contrast and saturation of the training crops."""
    patience: int | None = None
    """Number of epochs without a better held-out accuracy after which training stops early. None or 0: never."""
    max_corrupt: float = 0.001
    """Share of unreadable images above which the run stops. Three are allowed in any case, unless it is 0."""
    workers: int = 0
    """Number of processes that read images. With 0, threads of the run read them. The pixels are the same."""
    checkpoint_every: int = 1000
    """Number of steps between two checkpoints. One more is saved at the end, and one when the run is stopped."""
    keep: int = 2
    """Number of checkpoints to keep."""

    def __post_init__(self) -> None:
        problems = [
            f"{field.name} must be {_named(field.type)}"
            for field in dataclasses.fields(self)
            if not _is(getattr(self, field.name), field.type)
        ]
        if problems := problems or [message for message, holds in self._rules().items() if not holds]:
            raise RecipeError("; ".join(problems))

    def _rules(self) -> dict[str, bool]:
        counts = ("epochs", "batch_size", "accumulate", "checkpoint_every", "keep")
        shares = ("label_smoothing", "dropout", "dropout_aux", "momentum", "held_out")
        not_negative = (
            "learning_rate",
            "weight_decay",
            "warmup_epochs",
            "aux_weight",
            "head_learning_rate",
            "max_corrupt",
            "workers",
        )
        return {
            **{f"{name} must be at least 1": getattr(self, name) >= 1 for name in counts},
            **{f"{name} must be at least 0 and less than 1": 0 <= getattr(self, name) < 1 for name in shares},
            **{f"{name} must be at least 0": getattr(self, name) >= 0 for name in not_negative},
            **{
                f"{name} must be less than 2**31": value < 2**31  # the steps of a run are counted in 32 bits
                for name, value in vars(self).items()
                if type(value) is int and name != "seed"
            },
            "patience must be at least 0": (self.patience or 0) >= 0,
            "seed must be at least 0 and less than 2**32": 0 <= self.seed < 2**32,
            f"image_size must be at least {MIN_SIZE}": self.image_size >= MIN_SIZE,
            "average_decay must be more than 0 and less than 1": 0 < (self.average_decay or 0.5) < 1,
            "crop_area must rise, above 0 and up to 1": 0 < self.crop_area[0] <= self.crop_area[1] <= 1,
            "crop_aspect must rise, above 0": 0 < self.crop_aspect[0] <= self.crop_aspect[1],
            f"frozen must name blocks among {', '.join(BLOCKS)}": set(self.frozen) <= set(BLOCKS),
        }

    def steps_per_epoch(self, num_images: int) -> int:
        """Batches in an epoch; the images that do not fill one are left over."""
        return num_images // self.batch_size

    def to_json(self) -> str:
        """The recipe as a JSON object, for ``from_json``."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Recipe":
        """Reads what ``to_json`` of this version or an earlier one wrote.

        A field that the text does not have gets its default: an earlier version, which did not know the field yet, has
        trained so.

        Raises:
            RecipeError: if a field is unknown, or its value makes no sense; the message names it.
        """
        try:
            values = json.loads(text)
            if unknown := values.keys() - {field.name for field in dataclasses.fields(cls)}:
                raise RecipeError(f"unknown fields: {', '.join(sorted(unknown))}")
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except RecipeError:
            raise
        # Not JSON, not an object, or nested thousands deep.
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"not as to_json writes it: {error}") from error


def _is(value: object, kind: Any) -> bool:
    """Whether a value is of a field's type; an int will do for a float, but nothing that is not finite."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args
    if origin is types.UnionType:
        return any(_is(value, kind) for kind in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return len(value) == len(kinds) and all(map(_is, value, kinds))
    if kind is float:
        # A comparison, because math.isfinite raises for an int that no float can hold. NaN compares as False.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    return type(value) is kind


def _named(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return inspect.formatannotation(kind).replace("float", "finite float")


PRESETS = {
    # "Going Deeper with Convolutions", sections 5 to 7. What it leaves open is as in Caffe's replication of it,
    # https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet: batch, learning rate, weight decay.
    "paper": Recipe(
        epochs=250,
        batch_size=32,
        learning_rate=0.01,
        nesterov=False,
        weight_decay=2e-4,
        schedule="step",
        warmup_epochs=0.0,
        label_smoothing=0.0,
        dropout=0.4,
        average_decay=0.9999,
        interpolation="random",
        distortion=True,
    ),
    "imagenet": Recipe(),
    "finetune": Recipe(
        epochs=20,
        batch_size=32,
        learning_rate=0.005,
        weight_decay=1e-4,
        warmup_epochs=1.0,
        head_learning_rate=10.0,
        held_out=0.2,
        crop_area=(0.25, 1.0),
        checkpoint_every=200,
    ),
    "digits": Recipe(
        epochs=12,
        batch_size=32,
        image_size=32,
        learning_rate=0.02,
        weight_decay=1e-4,
        warmup_epochs=1.0,
        label_smoothing=0.0,
        average_decay=0.98,
        held_out=0.2,
        crop_area=(0.7, 1.0),
        crop_aspect=(0.9, 1.1),
        flip=False,  # a mirrored digit is none
        checkpoint_every=100,
    ),
}
"""Recipes by name."""


def schedule(recipe: Recipe, steps_per_epoch: int) -> "optax.Schedule":
    """The learning rate by the number of changes of the weights, of which ``accumulate`` steps make one.

    Args:
        recipe: the recipe.
        steps_per_epoch: batches in an epoch, at least one.
    """
    import optax

    per_epoch = steps_per_epoch / recipe.accumulate
    warmup = round(min(recipe.warmup_epochs, recipe.epochs / 2) * per_epoch)
    rest = max(1, round(recipe.epochs * per_epoch) - warmup)
    after: Callable[[Any], Any]
    if recipe.schedule == "cosine":
        after = optax.cosine_decay_schedule(recipe.learning_rate, rest)
    elif recipe.schedule == "step":
        after = optax.exponential_decay(recipe.learning_rate, max(1, round(8 * per_epoch)), 0.96, staircase=True)
    else:
        after = optax.constant_schedule(recipe.learning_rate)
    if not warmup:
        return after
    # As torch.optim.lr_scheduler.LinearLR(start_factor=1 / warmup, total_iters=warmup): from 0, the first step of a run
    # would change nothing.
    rising = optax.linear_schedule(recipe.learning_rate / warmup, recipe.learning_rate, warmup)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> "optax.GradientTransformation":
    """SGD by the recipe; as in PyTorch, weight decay is part of the gradient that the momentum takes in.

    Frozen blocks are left out by ``create_train_state``.
    """
    import optax

    from flax_googlenet.training.finetune import scale_heads

    optimizer = optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.sgd(schedule(recipe, steps_per_epoch), recipe.momentum, recipe.nesterov),
    )
    if recipe.head_learning_rate != 1:
        optimizer = scale_heads(optimizer, recipe.head_learning_rate)
    if recipe.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, recipe.accumulate).gradient_transformation()
    return optimizer
