"""Training and fine-tuning: recipes, data, the pure step, and the loop around it with checkpoints and a log.

A name is imported when it is first used: the command's ``--help`` needs the recipes, but not JAX.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:  # "as" the same name tells type checkers that the name is public
    from flax_googlenet.training.datasets import DataError as DataError
    from flax_googlenet.training.finetune import balanced_class_weights as balanced_class_weights
    from flax_googlenet.training.finetune import freeze as freeze
    from flax_googlenet.training.finetune import new_head as new_head
    from flax_googlenet.training.finetune import reestimate_batch_norm as reestimate_batch_norm
    from flax_googlenet.training.finetune import scale_heads as scale_heads
    from flax_googlenet.training.loop import TrainingResult as TrainingResult
    from flax_googlenet.training.memory import keep_memory as keep_memory
    from flax_googlenet.training.recipe import PRESETS as PRESETS
    from flax_googlenet.training.recipe import Recipe as Recipe
    from flax_googlenet.training.recipe import RecipeError as RecipeError
    from flax_googlenet.training.run import train as train
    from flax_googlenet.training.run_folder import WorkdirError as WorkdirError
    from flax_googlenet.training.step import TrainState as TrainState
    from flax_googlenet.training.step import create_train_state as create_train_state
    from flax_googlenet.training.step import cross_entropy as cross_entropy
    from flax_googlenet.training.step import eval_step as eval_step
    from flax_googlenet.training.step import train_step as train_step
    from flax_googlenet.training.stopping import TrainingStopped as TrainingStopped
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
    __all__ = sorted(name for names in _MODULES.values() for name in names)

    def __getattr__(name: str) -> object:
        return _get_lazily(__name__, _MODULES, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
