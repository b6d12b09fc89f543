"""Describes a network by its stages: their output shapes, parameters and multiply-adds."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict
from jax import numpy as jnp
from rich.console import Console
from rich.table import Table

from flax_googlenet.commands.status import CommandError, Status, write_output
from flax_googlenet.images.preprocessing import CROP
from flax_googlenet.model import MIN_SIZE, GoogLeNet
from flax_googlenet.weights.checkpoint import load_weights


class Stage(NamedTuple):
    """One line of a summary."""

    name: str
    output: tuple[int, ...]
    """[H, W, C], or [classes]."""
    parameters: int
    multiply_adds: int
    """For one image, in convolutions and dense layers alone, as torchvision counts them."""


def summarize(model: GoogLeNet, size: int = CROP) -> list[Stage]:
    """Return the stages of a network in the order of computation, and then its auxiliary heads.

    Everything is computed from the network's own shapes: no weights are made, and nothing is compiled.

    Args:
        model: The network.
        size: Height and width of the images, at least 15.
    """
    order: list[str] = []

    def init(key: jax.Array, images: jax.Array) -> Any:
        variables = model.init(key, images, capture_intermediates=True, mutable=True)
        order.extend(name.removesuffix("_output") for name in variables["intermediates"] if name.endswith("_output"))
        return variables

    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), images)
    params, outputs = flatten_dict(variables["params"]), flatten_dict(variables["intermediates"])

    def stage(name: str) -> Stage:
        own = {path: leaf for path, leaf in params.items() if path[0] == name}
        (output,) = outputs[(f"{name}_output",)] if name in order else outputs[name, "__call__"]
        multiply_adds = 0
        for path, leaf in own.items():
            if path[-1] == "kernel":  # used once for each place of the layer's output
                (layer_output,) = outputs[*path[:-1], "__call__"]
                multiply_adds += leaf.size * math.prod(layer_output.shape[1:-1])
        return Stage(name, output.shape[1:], sum(leaf.size for leaf in own.values()), multiply_adds)

    return [stage(name) for name in order + [name for name in ("aux1", "aux2") if model.aux_logits]]


def show_summary(weights: Path | None, size: int | None, as_json: bool) -> Status:
    """Do what ``flax-googlenet summary`` does.

    Raises:
        CommandError: If the weights cannot be read, or the size is too small.
    """
    if size is not None and size < MIN_SIZE:
        raise CommandError(Status.USAGE, f"--size must be at least {MIN_SIZE}, got {size}")
    loaded = load_weights(weights) if weights else None
    size = size or (loaded.image_size if loaded else CROP)
    stages = summarize(loaded.model if loaded else GoogLeNet(), size)
    inference = [stage for stage in stages if not stage.name.startswith("aux")]
    parameters = sum(stage.parameters for stage in inference)
    parameters_with_heads = sum(stage.parameters for stage in stages)
    multiply_adds = sum(stage.multiply_adds for stage in inference)
    if as_json:
        content = {
            "image_size": size,
            "parameters": parameters,
            "parameters_with_auxiliary_heads": parameters_with_heads,
            "multiply_adds": multiply_adds,
            "stages": [stage._asdict() for stage in stages],
        }
        write_output(json.dumps(content) + "\n")
    else:
        table = Table("stage", caption=f"multiply-adds for one image of {size}x{size}")
        for header in ("output", "parameters", "multiply-adds"):
            table.add_column(header, justify="right")
        for stage in inference:
            table.add_row(*_cells(stage), end_section=stage is inference[-1])
        table.add_row("total", "", f"{parameters:,}", f"{multiply_adds / 1e9:.3f} G", end_section=True)
        if stages != inference:
            for stage in stages[len(inference) :]:
                table.add_row(*_cells(stage), end_section=stage is stages[-1])
            table.add_row("with auxiliary heads", "", f"{parameters_with_heads:,}", "in training")
        console = Console(highlight=False)
        with console.capture() as captured:
            console.print(table)
        write_output(captured.get())
    return Status.DONE


def _cells(stage: Stage) -> tuple[str, ...]:
    output = "x".join(map(str, stage.output))
    if not stage.parameters:
        return stage.name, output
    return stage.name, output, f"{stage.parameters:,}", f"{stage.multiply_adds / 1e6:,.1f} M"
