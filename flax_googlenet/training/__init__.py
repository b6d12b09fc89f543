"""Training and fine-tuning: recipes, data, the pure step, and the loop around it with checkpoints and a log.

A name is imported when it is first used: the command's ``--help`` needs the recipes, but not optax.
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
else:  # where a type checker sees it, it would accept any name
    _MODULES = {
        "flax_googlenet.training.datasets": ("DataError",),
        "flax_googlenet.training.loop": ("TrainingResult",),
        "flax_googlenet.training.recipe": ("PRESETS", "Recipe", "RecipeError"),
        "flax_googlenet.training.run": ("train",),
        "flax_googlenet.training.run_folder": ("WorkdirError",),
        "flax_googlenet.training.memory": ("keep_memory",),
        "flax_googlenet.training.finetune": (
            "balanced_class_weights",
            "freeze",
            "new_head",
            "reestimate_batch_norm",
            "scale_heads",
        ),
        "flax_googlenet.training.step": (
            "TrainState",
            "create_train_state",
            "cross_entropy",
            "eval_step",
            "train_step",
        ),
        "flax_googlenet.training.stopping": ("TrainingStopped",),
    }

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(module), name)
                return value
        raise AttributeError(f"module 'flax_googlenet.training' has no attribute {name!r}")

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
