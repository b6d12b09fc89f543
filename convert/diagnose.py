"""Finds the first stage at which a port differs from torchvision's network, and the most likely known cause."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from inputs import Request, read_port, read_source
from porting import default_output, shown
from process import Result, Status
from proof import FLOAT64_LIMIT, flax_stages, float32_limit, proof_images, relative_error, widen_heads
from reference import build, stages
from rich.console import Console
from torch.nn import functional
from torchvision.models import GoogLeNet as TorchGoogLeNet

from flax_googlenet import CheckpointError, GoogLeNet, endpoints, from_torchvision
from flax_googlenet.commands.terminal import Messages
from flax_googlenet.errors import listing
from flax_googlenet.images.files import display_name
from flax_googlenet.model import Variables

ROUNDED = 1e-2  # an error below this could come from bfloat16, whose 8 bits round at 4e-3


@dataclass(frozen=True)
class Diagnosis:
    """The first difference between a port and its checkpoint."""

    stage: str
    """First stage that differs, by torchvision's name."""
    error: float
    """Error of that stage, as ``relative_error`` computes it."""
    cause: str
    """Likely cause: padding, flatten order, transform_input, statistics, precision, weights or unknown."""
    explanation: str
    """Result of the comparison, and how to correct the port."""


def diagnose_port(request: Request, output: Path | None, screen: Console, messages: Messages) -> Result:
    """Name the first stage at which a port differs from its checkpoint, and the likely cause. Nothing is written.

    Args:
        request: Checkpoint to read, and how.
        output: Port to examine. None takes the file that ``port`` would write, or a new port if there is no such file.
        screen: Console for the result.
        messages: Receiver of notes and progress.

    Raises:
        GoogLeNetError: For every exit status but PROVEN and NOT_PROVEN.
    """
    path = output or default_output(request.checkpoint)
    written_port = read_port(path) if output or os.path.exists(path) else None
    source = read_source(request, messages)
    subject, model, variables = f"a new port of {source.name}", source.model, source.variables
    if written_port:
        subject, model, variables = display_name(str(path)), written_port.model, written_port.variables
        if any(
            getattr(model, name) != getattr(source.model, name) for name in ("num_classes", "aux_logits", "batch_norm")
        ):
            message = "its number of classes, auxiliary heads or BatchNorm differ"
            raise CheckpointError(f"{path} is not a port of {source.name}: {message}")
    # Without the option, the setting of the reference is known only for imagenet.
    is_known = request.transform_input is not None or request.checkpoint == "imagenet"
    with messages.spinner("comparing the stages"):
        found = diagnose(
            source.state_dict,
            model,
            variables,
            transform_input=source.model.transform_input if is_known else model.transform_input,
        )
    if found is None:
        screen.print(
            f"[bold green]No difference:[/] {shown(subject)} agrees with {shown(source.name)} in every stage.",
            soft_wrap=True,
        )
        return Status.PROVEN, {"port": subject, "diagnosis": None}
    if math.isfinite(found.error):
        size = f"the largest error is {found.error:.1e} of the largest value"
    else:
        size = "the shape is different" if math.isinf(found.error) else "some values are not finite"
    screen.print(f"[bold red]First difference at {found.stage}:[/] in {shown(subject)}, {size}.", soft_wrap=True)
    screen.print(f"[bold]Likely cause: {found.cause}.[/] {shown(found.explanation)}.", soft_wrap=True)
    diagnosis = {**vars(found), "error": found.error if math.isfinite(found.error) else None}
    return Status.NOT_PROVEN, {"port": subject, "diagnosis": diagnosis}


def diagnose(
    state_dict: Mapping[str, np.ndarray], model: GoogLeNet, variables: Variables, *, transform_input: bool
) -> Diagnosis | None:
    """Compare a port with torchvision's network on the two photographs, and return None if they agree.

    Args:
        state_dict: State dict of the reference, already checked.
        model: Port as it would be used; its dtype and precision are part of the comparison.
        variables: Variables of the port.
        transform_input: Whether the reference transforms its input.
    """
    state_dict, model, variables = widen_heads(state_dict, model, variables)
    images = proof_images()[0][:2].astype(np.float64)
    torch_model = build(state_dict, transform_input=transform_input, dtype=torch.float64)
    truth = stages(torch_model, images)
    port = flax_stages(model, variables, images)

    stage = _first_divergence(port, truth)
    if stage is None:
        return _imprecision(model, variables, images, truth, torch_model)
    error = relative_error(port[stage], truth[stage])

    def found(cause: str, explanation: str) -> Diagnosis:
        return Diagnosis(stage, error, cause, explanation)

    flipped = model.clone(transform_input=not model.transform_input)
    if stage == "conv1" and _first_divergence(flax_stages(flipped, variables, images), truth) != stage:
        return found("transform_input", f"with transform_input={flipped.transform_input} the stage agrees: set it")
    different = _different_leaves(state_dict, variables, stage)
    if different:
        return found(*_explain_leaves(different))
    if error == float("inf"):
        return found(
            "padding", f"the shape is {port[stage].shape}, not {truth[stage].shape}: check ceil mode and the padding"
        )
    if stage == "conv1" and relative_error(port[stage], _conv1_with_same_padding(torch_model, images)) < FLOAT64_LIMIT:
        return found("padding", 'conv1 pads by (2, 3), as "SAME" does: PyTorch pads by (3, 3)')
    if stage in ("aux1", "aux2"):
        return found("flatten order", "the weights are right: fc1 must read the features in CHW order, channels first")
    if error < ROUNDED:
        return found(
            "precision", "the weights are right and the error is as small as rounding: compute in float64 or float32"
        )
    if _agrees_inside(port[stage], truth[stage]):
        return found("padding", "the weights are right and only the border differs: check the padding and ceil mode")
    return found("unknown", "the weights are right: the code of this stage computes something different")


def _first_divergence(port: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> str | None:
    return next((name for name, x in truth.items() if not relative_error(port[name], x) <= FLOAT64_LIMIT), None)


def _imprecision(
    model: GoogLeNet,
    variables: Variables,
    images: np.ndarray,
    truth: Mapping[str, np.ndarray],
    torch_model: TorchGoogLeNet,
) -> Diagnosis | None:
    """Compare in the port's own dtype and precision on the default device, where float64 shows no difference."""
    images32 = images.astype(np.float32)
    pytorch32 = stages(torch_model.to(torch.float32), images32)
    port = jax.jit(lambda v, x: endpoints(model, v, x))(variables, images32)
    for name in (name for name in pytorch32 if name in port):
        error = relative_error(np.asarray(port[name], np.float64), truth[name])
        if not error <= float32_limit(relative_error(pytorch32[name], truth[name])):
            finding = f"exact in float64, but not with dtype {np.dtype(model.dtype)} and precision {model.precision}"
            return Diagnosis(name, error, "precision", f"{finding}: use dtype float32 and precision='highest'")
    return None


def _different_leaves(
    state_dict: Mapping[str, np.ndarray], variables: Variables, stage: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the variables of a stage that differ: path -> (value in the port, value in the reference)."""
    ours, theirs = flatten_dict(dict(variables)), flatten_dict(from_torchvision(state_dict))
    pairs: dict[str, tuple[Any, Any]] = {
        "/".join(path): (np.asarray(ours[path], np.float64), theirs[path].astype(np.float64))
        for path in theirs
        if path[1] == stage
    }
    return {path: pair for path, pair in pairs.items() if not np.array_equal(*pair)}


def _explain_leaves(different: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[str, str]:
    names = listing(different, 4)
    if any(
        all(np.array_equal(ours, theirs.astype(dtype).astype(np.float64)) for ours, theirs in different.values())
        for dtype in (ml_dtypes.bfloat16, np.float16, np.float32)
    ):
        return "precision", f"rounded to a smaller dtype: {names}: convert the checkpoint in its own dtype"
    for path, (ours, theirs) in different.items():
        if path.endswith("fc1/kernel"):
            rows = theirs.reshape(128, 4, 4, -1).transpose(1, 2, 0, 3).reshape(theirs.shape)
            if np.array_equal(ours, rows):
                return "flatten order", f"the rows of {path} are in HWC order: torchvision flattens in CHW order"
        if path.startswith("batch_stats") and path.endswith("mean"):
            var = different.get(path.removesuffix("mean") + "var")
            if var and np.array_equal(ours, var[1]) and np.array_equal(var[0], theirs):
                return "statistics", f"mean and var are swapped: {names}"
        if path.startswith("batch_stats") and np.array_equal(ours, np.full_like(ours, path.endswith("var"))):
            return "statistics", f"still at their initial 0 and 1: {names}: load the checkpoint's running statistics"
    if all("/bn/" in path for path in different):
        return "statistics", f"different from the checkpoint's: {names}"
    return "weights", f"different from the checkpoint's: {names}"


def _conv1_with_same_padding(torch_model: TorchGoogLeNet, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        x = torch_model._transform_input(torch.from_numpy(images).permute(0, 3, 1, 2))
        x = functional.conv2d(functional.pad(x, (2, 3, 2, 3)), torch_model.conv1.conv.weight, stride=2)
        return torch_model.conv1.bn(x).relu().permute(0, 2, 3, 1).numpy()


def _agrees_inside(port: np.ndarray, truth: np.ndarray) -> bool:
    inside = (slice(None), slice(2, -2), slice(2, -2))
    return port.ndim == 4 and port.shape[1] > 4 and relative_error(port[inside], truth[inside]) <= FLOAT64_LIMIT
