"""Measure how training drifts: the loss of JAX and of PyTorch, step by step, against PyTorch in float64.

All runs start from the same random weights and see the same random images, without dropout. Training is chaotic: the
next steps amplify what rounding changes in one step. In float32, both libraries have drifted as far as they ever will
after five steps. In float64, JAX and PyTorch stay together for about fifty steps. Prints a table and writes a picture.

    pip install -e ".[benchmark]"
    python benchmarks/drift.py docs/drift.png
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import torch
from side_by_side import LEARNING_RATE, MOMENTUM, flax_step, optax_sgd, torch_sgd

import flax_googlenet
from flax_googlenet.training import create_train_state

import reference  # isort: skip  # side_by_side puts convert/ on the path

BATCH_SIZE, SIZE = 8, 64

Step = Callable[[np.ndarray, np.ndarray], float]
"""Takes images NHWC and labels, and returns the loss before the step."""


def pytorch(state_dict: dict[str, np.ndarray], dtype: type[np.floating]) -> Step:
    torch_dtype = {np.float32: torch.float32, np.float64: torch.float64}[dtype]
    model = reference.build_for_training(state_dict, torch_dtype)
    optimizer = torch_sgd(model)
    return lambda images, labels: reference.train_step(model, optimizer, images.astype(dtype), labels)


def flax(state_dict: dict[str, np.ndarray], dtype: type[np.floating]) -> Step:
    model = flax_googlenet.GoogLeNet(dropout=0.0, dropout_aux=0.0, dtype=dtype, param_dtype=dtype)
    variables = jax.tree.map(lambda x: x.astype(dtype), flax_googlenet.from_torchvision(state_dict))
    step = flax_step(create_train_state(model, variables, optax_sgd()))
    return lambda images, labels: step(images.astype(dtype), labels)


def losses(step: Step, steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (BATCH_SIZE, SIZE, SIZE, 3)
    return np.array([step(rng.standard_normal(shape), rng.integers(0, 1000, BATCH_SIZE)) for _ in range(steps)])


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
        shown = [drift[min(i, len(drift) - 1)] for i in (0, 9, 19, 29, len(drift) - 1)]
        print(f"{name:>15} " + " ".join(f"{x:8.1e}" for x in shown))
        # Losses that are equal in every bit have no place on a logarithmic axis: they leave a gap.
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
