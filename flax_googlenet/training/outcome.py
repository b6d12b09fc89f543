"""What a run leaves at its end: the weights, the curves, and what can be done next."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from flax_googlenet.checkpoint import save
from flax_googlenet.training.logs import draw_curves
from flax_googlenet.training.step import TrainState

MODEL = "model.safetensors"  # in the folder of the run


def write_outcome(
    workdir: Path, state: TrainState, metadata: dict[str, Any], data: str, tell: Callable[[str], None]
) -> None:
    """Writes ``model.safetensors`` and ``curves.png``.

    Args:
        workdir: the folder of the run.
        state: the last one; its average is written, where it has one.
        metadata: for the weights; its ``accuracy`` is told.
        data: as the command line named it.
        tell: takes lines for the person.

    Raises:
        OSError: if the weights cannot be written.
    """
    path = workdir / MODEL
    variables = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), state.eval_variables)
    save(path, state.model.clone(dtype=jnp.float32), variables, metadata)
    try:
        draw_curves(workdir)
    except OSError as error:
        tell(f"warning: no curves: {error.strerror}")
    file = shlex.quote(str(path))
    tell(f"held out: {metadata['accuracy']:.2%} right, by {path}; next:")
    tell(f"  flax-googlenet evaluate {file} {shlex.quote(data)}")
    tell(f"  python convert/port_weights.py {file} --to-torchvision FILE.pth")
