"""Recipes: the frozen dataclass that says how to train, and from which the command line and its help are made."""

import dataclasses
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from flax_googlenet.architecture import BLOCKS, MIN_SIZE
from flax_googlenet.errors import GoogLeNetError

if TYPE_CHECKING:  # --help shows the recipes, and need not wait for JAX
    import optax


class RecipeError(GoogLeNetError, ValueError):
    """A recipe that makes no sense; the message lists everything that is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the preset ``imagenet``; ``PRESETS`` has the others.

    BatchNorm statistics and the moving average of the weights change with every batch, even if ``accumulate`` is more
    than 1.

    Raises:
        RecipeError: If a field has a value that makes no sense.
    """

    seed: int = 0
    """Seed of the initial weights, image order, augmentation, dropout and the choice of held-out images."""
    variant: Literal["torchvision", "bvlc", "inception5h", "bvlc_floor"] = "torchvision"
    """Network to train: torchvision's, the paper's as Berkeley or Google trained it, or Berkeley's with max pools that
    round down. A run that starts from weights keeps the network of these."""
    epochs: int = 90
    """Number of passes over the training images."""
    batch_size: int = 256
    """Number of images in a step, summed over all devices and processes."""
    image_size: int = 224
    """Height and width of the training crops, in pixels."""
    learning_rate: float = 0.1
    """Highest learning rate of the schedule."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov momentum instead of classical momentum."""
    weight_decay: float = 5e-5
    """Weight decay of the kernels, added to their gradients. Biases and BatchNorm parameters have none."""
    schedule: Literal["constant", "step", "cosine", "poly"] = "cosine"
    """Learning rate after the warm-up: constant, 4 percent less every 8 epochs (step), a cosine down to 0, or as the
    square root of the steps that are left (poly)."""
    warmup_epochs: float = 5.0
    """Number of epochs over which the learning rate rises linearly at the start; at most half of all epochs."""
    label_smoothing: float = 0.1
    """Share of each label that is spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the loss. With balanced, rare classes count as much as frequent ones."""
    aux_weight: float = 0.3
    """Weight of the loss of each auxiliary head. The paper has 0.3."""
    dropout: float = 0.2
    """Dropout rate before the last layer."""
    dropout_aux: float = 0.7
    """Dropout rate in the auxiliary heads."""
    average_decay: float | None = None
    """Decay of a moving average of the weights, which is evaluated and saved in their place. None means no average."""
    accumulate: int = 1
    """Number of batches whose mean gradient makes one update of the weights. Batches left over at the end make none."""
    frozen: tuple[str, ...] = ()
    """Blocks whose weights and statistics do not change: conv1-conv3, inception3a-inception5b, fc, aux1, aux2."""
    head_learning_rate: float = 1.0
    """Learning rate of fc, aux1 and aux2 as a multiple of the learning rate of the other blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the computation. Weights, BatchNorm statistics and the loss stay in float32."""
    held_out: float = 0.1
    """Share of the images that is held out for evaluation, unless the data come with a part for it."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a training crop as a share of the image."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width of a training crop as a multiple of its height."""
    interpolation: Literal["bilinear", "random"] = "bilinear"
    """Interpolation used to resize a crop. With random, each crop gets one of four methods."""
    flip: bool = True
    """Horizontal mirroring of half of the training crops."""
    distortion: bool = False
    """Random changes of brightness, contrast and saturation of the training crops."""
    patience: int | None = None
    """Number of epochs without a better held-out accuracy after which training stops early. None or 0 means never."""
    max_corrupt: float = 0.001
    """Share of unreadable images above which the run stops. Unless it is 0, three images are always allowed."""
    workers: int = 0
    """Number of processes that read images. With 0, threads read them. The pixels are the same."""
    checkpoint_every: int = 1000
    """Number of steps between two checkpoints. The run also saves one when it ends or is stopped."""
    keep: int = 2
    """Number of checkpoints to keep, the newest ones."""

    def __post_init__(self) -> None:
        problems = [
            f"{field.name} must be {_type_name(field.type)}"
            for field in dataclasses.fields(self)
            if not _has_type(getattr(self, field.name), field.type)
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
                f"{name} must be less than 2**31": value < 2**31  # steps are counted in 32 bits
                for name, value in vars(self).items()
                if type(value) is int and name != "seed"
            },
            "patience must be at least 0": (self.patience or 0) >= 0,
            "seed must be at least 0 and less than 2**32": 0 <= self.seed < 2**32,
            f"image_size must be at least {MIN_SIZE}": self.image_size >= MIN_SIZE,
            "average_decay must be more than 0 and less than 1": 0 < (self.average_decay or 0.5) < 1,
            "crop_area must be ascending, above 0 and at most 1": 0 < self.crop_area[0] <= self.crop_area[1] <= 1,
            "crop_aspect must be ascending and above 0": 0 < self.crop_aspect[0] <= self.crop_aspect[1],
            f"frozen must name blocks among {', '.join(BLOCKS)}": set(self.frozen) <= set(BLOCKS),
        }

    def steps_per_epoch(self, num_images: int) -> int:
        """Return the number of batches in an epoch; images that do not fill another batch are left out."""
        return num_images // self.batch_size

    def to_json(self) -> str:
        """Return the recipe as a JSON object, which ``from_json`` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Recipe":
        """Read a recipe that ``to_json`` of this version or an earlier one wrote.

        Missing fields get their defaults, which is how an earlier version without these fields trained.

        Raises:
            RecipeError: If a field is unknown or its value makes no sense; the message names it.
        """
        try:
            values = json.loads(text)
            if unknown := values.keys() - {field.name for field in dataclasses.fields(cls)}:
                raise RecipeError(f"unknown fields: {', '.join(sorted(unknown))}")
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except RecipeError:
            raise
        # The text is not JSON, is not an object, or is nested thousands of levels deep.
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"not a recipe that to_json wrote: {error}") from error


def _has_type(value: object, kind: Any) -> bool:
    """Return whether a value has the type of a field. An int may stand for a float; floats must be finite."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args
    if origin is types.UnionType:
        return any(_has_type(value, kind) for kind in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if kind is float:
        # Compared, as math.isfinite raises for an int that is too large for a float. A comparison with NaN is False.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    return type(value) is kind


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return inspect.formatannotation(kind).replace("float", "finite float")


PRESETS = {
    # "Going Deeper with Convolutions", sections 5 to 7. The paper leaves open the batch size, learning rate and weight
    # decay. Here they are those of https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet.
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
    # https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet, quick_solver.prototxt: 2.4 million steps. There,
    # biases have twice the learning rate, and crops are 224x224 of images of 256x256.
    "bvlc": Recipe(
        variant="bvlc",
        epochs=60,
        batch_size=32,
        learning_rate=0.01,
        nesterov=False,
        weight_decay=2e-4,
        schedule="poly",
        warmup_epochs=0.0,
        label_smoothing=0.0,
        dropout=0.4,
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
    "small": Recipe(
        epochs=12,
        batch_size=128,
        image_size=48,
        weight_decay=5e-4,
        warmup_epochs=1.0,
        crop_area=(0.65, 0.9),  # an evaluation sees 0.77: the centre crop of IDX images is 28 of 32 pixels wide
        crop_aspect=(0.95, 1.05),
        flip=False,  # Fashion-MNIST's shoes all point to the left
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
        flip=False,  # a mirrored digit is not a digit
        checkpoint_every=100,
    ),
}
"""The recipes of ``--preset`` by name."""


def schedule(recipe: Recipe, steps_per_epoch: int) -> "optax.Schedule":
    """Return the learning rate as a function of the number of weight updates; ``accumulate`` steps make one update.

    An epoch has ``steps_per_epoch`` batches, at least one.
    """
    import optax

    per_epoch = steps_per_epoch / recipe.accumulate
    warmup = round(min(recipe.warmup_epochs, recipe.epochs / 2) * per_epoch)
    rest = max(1, round(recipe.epochs * per_epoch) - warmup)
    main: Callable[[Any], Any]
    if recipe.schedule == "cosine":
        main = optax.cosine_decay_schedule(recipe.learning_rate, rest)
    elif recipe.schedule == "step":
        main = optax.exponential_decay(recipe.learning_rate, max(1, round(8 * per_epoch)), 0.96, staircase=True)
    elif recipe.schedule == "poly":
        main = optax.polynomial_schedule(recipe.learning_rate, 0.0, 0.5, rest)
    else:
        main = optax.constant_schedule(recipe.learning_rate)
    if not warmup:
        return main
    # As torch.optim.lr_scheduler.LinearLR(start_factor=1 / warmup, total_iters=warmup). A rise from 0 would make the
    # first step change nothing.
    rising = optax.linear_schedule(recipe.learning_rate / warmup, recipe.learning_rate, warmup)
    return optax.join_schedules([rising, main], [warmup])


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> "optax.GradientTransformation":
    """Return SGD as the recipe describes it. As in PyTorch, weight decay is added before the momentum.

    ``create_train_state`` excludes the frozen blocks. ``steps_per_epoch`` is as for ``schedule``.
    """
    import jax
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
