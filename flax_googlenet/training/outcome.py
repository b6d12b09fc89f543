"""What a run leaves at its end: the weights, the curves, and what can be done next."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from flax_googlenet.training.logs import draw_curves
from flax_googlenet.training.step import TrainState
from flax_googlenet.weights.checkpoint import save

MODEL, BEST = "model.safetensors", "best.safetensors"  # in the folder of the run: the last weights and the best


def write_weights(path: Path, state: TrainState, metadata: dict[str, Any]) -> None:
    """Writes the weights of a state, the average where it has one; raises an OSError if they cannot be written."""
    variables = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), state.eval_variables)
    save(path, state.model.clone(dtype=jnp.float32), variables, metadata)


def write_outcome(
    workdir: Path,
    state: TrainState,
    metadata: dict[str, Any],
    data: str,
    best: tuple[int, str],
    tell: Callable[[str], None],
) -> None:
    """Writes ``model.safetensors`` and ``curves.png``, and says how good the last weights and the best are.

    Args:
        workdir: the folder of the run.
        state: the last one; its average is written, where it has one.
        metadata: for the weights; its ``accuracy`` is shown.
        data: as the command line named it.
        best: the step of the best evaluation, and its accuracy and epoch in words.
        tell: takes lines for the person.

    Raises:
        OSError: if the weights cannot be written.
    """
    path = workdir / MODEL
    write_weights(path, state, metadata)
    try:
        draw_curves(workdir, best)
    except OSError as error:
        tell(f"warning: no curves: {error.strerror}")
    file = shlex.quote(str(path))
    tell(f"the best weights are {workdir / BEST}: {best[1]}")
    tell(f"held out: {metadata['accuracy']:.2%} right, by {path}; next:")
    tell(f"  flax-googlenet evaluate {file} {shlex.quote(data)}")
    tell(f"  python convert/port_weights.py {file} --to-torchvision FILE.pth")
