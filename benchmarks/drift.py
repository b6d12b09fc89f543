"""How training drifts: the loss of JAX and of PyTorch, step by step, against PyTorch in float64.

All start from the same random weights and see the same random images, dropout off. Training is chaotic: what rounding
changes in one step, the next steps enlarge. In float32 both are as far from the true course after five steps as they
will ever be; in float64 JAX and PyTorch go together for some fifty. Prints a table and writes a picture.

    pip install -e ".[benchmark]"
    python benchmarks/drift.py docs/drift.png
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "convert"))
import reference

import flax_googlenet
from flax_googlenet.training import create_train_state, train_step

BATCH_SIZE, SIZE = 8, 64
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.001, 0.9, 1e-4

Step = Callable[[np.ndarray, np.ndarray], float]
"""images NHWC, labels -> the loss before the step."""


def pytorch(state_dict: dict[str, np.ndarray], dtype: type[np.floating]) -> Step:
    torch_dtype = {np.float32: torch.float32, np.float64: torch.float64}[dtype]
    model = reference.build_for_training(state_dict, torch_dtype)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    return lambda images, labels: reference.train_step(model, optimizer, images.astype(dtype), labels)


def flax(state_dict: dict[str, np.ndarray], dtype: type[np.floating]) -> Step:
    model = flax_googlenet.GoogLeNet(dropout=0.0, dropout_aux=0.0, dtype=dtype, param_dtype=dtype)
    variables = jax.tree.map(lambda x: x.astype(dtype), flax_googlenet.from_torchvision(state_dict))
    sgd = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM))
    state = create_train_state(model, variables, sgd)

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        nonlocal state
        state, metrics = train_step(state, {"image": images.astype(dtype), "label": labels}, jax.random.key(0))
        return float(metrics["loss"])

    return step


def losses(step: Step, steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array(
        [
            step(rng.standard_normal((BATCH_SIZE, SIZE, SIZE, 3)), rng.integers(0, 1000, BATCH_SIZE))
            for _ in range(steps)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="the .png to write")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    jax.config.update("jax_enable_x64", True)
    state_dict = {name: tensor.numpy() for name, tensor in reference.random_checkpoint().items()}
    truth = losses(pytorch(state_dict, np.float64), arguments.steps)
    runs = {
        "JAX float32": losses(flax(state_dict, np.float32), arguments.steps),
        "PyTorch float32": losses(pytorch(state_dict, np.float32), arguments.steps),
        "JAX float64": losses(flax(state_dict, np.float64), arguments.steps),
    }

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    print(f"{'step':>15} {'first':>8} {'10':>8} {'20':>8} {'30':>8} {'last':>8}")
    for name, run in runs.items():
        drift = np.abs(run / truth - 1)
        print(
            f"{name:>15} " + " ".join(f"{drift[min(i, len(drift) - 1)]:8.1e}" for i in (0, 9, 19, 29, len(drift) - 1))
        )
        # A loss that is equal to the last bit has no place on a logarithmic axis: a gap.
        axes.semilogy(np.arange(1, len(drift) + 1), np.where(drift > 0, drift, np.nan), label=name)
    axes.set(
        xlabel=f"step of SGD (learning rate {LEARNING_RATE}, momentum {MOMENTUM})",
        ylabel="relative difference of the loss",
        title="Training drifts apart: difference from PyTorch in float64",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
