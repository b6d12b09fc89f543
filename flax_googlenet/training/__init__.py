"""Training and fine-tuning: recipes, data, the pure step, and the loop around it with checkpoints and a log.

A name is imported when it is first used: the command's ``--help`` needs the recipes, but not JAX.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flax_googlenet.training.datasets import DataError
    from flax_googlenet.training.finetune import (
        balanced_class_weights,
        freeze,
        new_head,
        reestimate_batch_norm,
        scale_heads,
    )
    from flax_googlenet.training.loop import TrainingResult
    from flax_googlenet.training.memory import keep_memory
    from flax_googlenet.training.recipe import PRESETS, Recipe, RecipeError
    from flax_googlenet.training.run import train
    from flax_googlenet.training.run_folder import WorkdirError
    from flax_googlenet.training.step import TrainState, create_train_state, cross_entropy, eval_step, train_step
    from flax_googlenet.training.stopping import TrainingStopped
else:  # hidden from type checkers, which would accept any name because of __getattr__
    from flax_googlenet import _get_lazily

    _MODULES = {
        "datasets": ("DataError",),
        "loop": ("TrainingResult",),
        "recipe": ("PRESETS", "Recipe", "RecipeError"),
        "run": ("train",),
        "run_folder": ("WorkdirError",),
        "memory": ("keep_memory",),
        "finetune": ("balanced_class_weights", "freeze", "new_head", "reestimate_batch_norm", "scale_heads"),
        "step": ("TrainState", "create_train_state", "cross_entropy", "eval_step", "train_step"),
        "stopping": ("TrainingStopped",),
    }

    def __getattr__(name: str) -> object:
        return _get_lazily(__name__, _MODULES, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "PRESETS",
    "DataError",
    "Recipe",
    "RecipeError",
    "TrainState",
    "TrainingResult",
    "TrainingStopped",
    "WorkdirError",
    "balanced_class_weights",
    "create_train_state",
    "cross_entropy",
    "eval_step",
    "freeze",
    "keep_memory",
    "new_head",
    "reestimate_batch_norm",
    "scale_heads",
    "train",
    "train_step",
]
