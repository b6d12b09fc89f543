"""Training and fine-tuning with optax: what to do (recipe), the input (data), the pure step, and the run (loop)."""

from flax_googlenet.memory import keep_memory
from flax_googlenet.training.finetune import (
    balanced_class_weights,
    freeze,
    new_head,
    reestimate_batch_norm,
    scale_heads,
)
from flax_googlenet.training.step import TrainState, create_train_state, cross_entropy, eval_step, train_step

__all__ = [
    "TrainState",
    "balanced_class_weights",
    "create_train_state",
    "cross_entropy",
    "eval_step",
    "freeze",
    "keep_memory",
    "new_head",
    "reestimate_batch_norm",
    "scale_heads",
    "train_step",
]
