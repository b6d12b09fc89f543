"""Ports a checkpoint to Flax, or from Flax to PyTorch, proves the result, and writes it with its report."""

import hashlib
import importlib.metadata
import io
import os
import platform
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from inputs import Request, in_one_line, read_class_names, read_port, read_source
from process import InputError, Result, Status, cleans_up
from proof import Proof, prove, summary
from report import render
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.table import Table

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.commands.status import CommandError, UsageError
from flax_googlenet.commands.terminal import Messages, require_folder_of, writing
from flax_googlenet.errors import listing, printable
from flax_googlenet.files import write_atomically
from flax_googlenet.images.files import display_name
from flax_googlenet.model import Variables
from flax_googlenet.weights import caffe, onnx, tensorflow
from flax_googlenet.weights.checkpoint import Weights
from flax_googlenet.weights.download import name_in_url
from flax_googlenet.weights.torchvision import shapes_by_path, to_arrays

jax.config.update("jax_enable_x64", True)  # the proof needs float64

_FACTS = {
    "torchvision": {},
    "bvlc": {"input": caffe.INPUT},
    "bvlc_floor": {"input": caffe.INPUT, "pools": onnx.FLOOR_POOLS},
    "inception5h": {"input": tensorflow.INPUT},
}
"""Variant -> what the metadata of files and the report say about it."""


def port(
    request: Request,
    output: Path | None,
    report: Path | None,
    class_names: Path | None,
    device: jax.Device | None,
    screen: Console,
    messages: Messages,
) -> Result:
    """Port a checkpoint of any of the networks to Flax, prove the port, and write it if it is proven.

    Args:
        request: Checkpoint to read, and how.
        output: File to write. None names it after the checkpoint.
        report: File to write the proof to, as an HTML page.
        class_names: File with the class names.
        device: Device on which Flax also computes in float32, besides the proof on the CPU.
        screen: Console for the result.
        messages: Receiver of notes and progress.

    Raises:
        GoogLeNetError: For every exit status but PROVEN and NOT_PROVEN.
    """
    checkpoint = request.checkpoint
    output = output or default_output(checkpoint)
    _check_outputs(checkpoint, output, report)
    source = read_source(request, messages)
    model = source.model
    names = read_class_names(class_names, model.num_classes) if class_names else source.class_names
    is_known = model.variant != "torchvision" or checkpoint in ("imagenet", "random") or source.class_names
    if request.transform_input is None and not is_known:
        advice = "add --transform-input if the network was built with it, as fine-tuned ImageNet weights are"
        messages.note(f"note: transform_input is assumed to be off: {advice}")
    proof = _prove(source.state_dict, model, source.variables, device, messages)
    facts = _facts(source.name, source.sha256, model, proof)
    if proof.ok:
        with writing(output), cleans_up():
            flax_googlenet.save(output, model, source.variables, facts | {"class_names": names})
    dtype = ", dtype=jax.numpy.float32" if model.param_dtype == np.float64 else ""  # JAX has 64 bits off by default
    next_step = f"model, variables = flax_googlenet.load({str(output)!r}{dtype})"
    return _conclude(proof, facts, output, report, names, next_step, screen)


def port_back(
    checkpoint: Path,
    output: Path,
    report: Path | None,
    device: jax.Device | None,
    screen: Console,
    messages: Messages,
) -> Result:
    """Port a file of this library to a state dict that torchvision loads; otherwise like ``port``."""
    _check_outputs(checkpoint, output, report)
    weights = read_port(checkpoint)
    model = weights.model
    if model.variant != "torchvision":
        advice = "use --to-caffe" if model.variant == "bvlc" else "it goes back to no other format"
        raise flax_googlenet.PortingError(f"{checkpoint} is not torchvision's network, but the paper's: {advice}")
    try:
        state_dict = flax_googlenet.to_torchvision(weights.variables)
    except flax_googlenet.PortingError as error:
        raise flax_googlenet.PortingError(f"{checkpoint}: {in_one_line(error)}") from error
    proof = _prove(state_dict, model, weights.variables, device, messages)
    lacking = what_a_state_dict_lacks(weights)
    facts = _facts(display_name(str(checkpoint)), weights.sha256, model, proof) | {
        "not_in_state_dict": {name: value for name, (value, _) in lacking.items()}
    }
    if proof.ok:
        buffer = io.BytesIO()
        torch.save({key: _tensor(array) for key, array in state_dict.items()}, buffer)
        with writing(output), cleans_up():
            write_atomically(output, buffer.getvalue())
    arguments = f"num_classes={model.num_classes}, aux_logits={model.aux_logits}, init_weights=False"
    if model.transform_input:
        arguments += ", transform_input=True"
    for name, default in (("dropout", 0.2), ("dropout_aux", 0.7)):
        if getattr(model, name) != default:
            arguments += f", {name}={getattr(model, name)}"
    next_step = f"model = torchvision.models.googlenet({arguments}); model.load_state_dict(torch.load({str(output)!r}))"
    status, facts = _conclude(proof, facts, output, report, weights.class_names, next_step, screen)
    if status == Status.PROVEN:
        screen.print(f"{shown(output)} holds names and tensors only. It lacks:", soft_wrap=True)
        table = Table("", f"in {shown(checkpoint)}", "in PyTorch")
        for name, (value, advice) in lacking.items():
            table.add_row(name, shown(value), advice)
        screen.print(table)
    return status, facts


def port_to_caffe(
    checkpoint: Path,
    output: Path,
    report: Path | None,
    device: jax.Device | None,
    screen: Console,
    messages: Messages,
) -> Result:
    """Port a file of this library to a ``.caffemodel`` of Berkeley's network; otherwise like ``port``."""
    _check_outputs(checkpoint, output, report)
    weights = read_port(checkpoint)
    model = weights.model
    if model.variant != "bvlc":
        reason = {
            "torchvision": "is not the paper's network, but torchvision's: use --to-torchvision",
            "bvlc_floor": "has max pools that round their sizes down, and Caffe's round up",
            "inception5h": "is the paper's network as Google trained it, and Caffe's has other layers",
        }[model.variant]
        raise flax_googlenet.PortingError(f"{checkpoint} {reason}")
    try:
        state_dict = to_arrays(weights.variables, shapes_by_path(model))
    except flax_googlenet.PortingError as error:
        raise flax_googlenet.PortingError(f"{checkpoint}: {in_one_line(error)}") from error
    proof = _prove(state_dict, model, weights.variables, device, messages)
    if proof.ok:
        with writing(output), cleans_up():
            write_atomically(output, caffe.encode(state_dict))
    facts = _facts(display_name(str(checkpoint)), weights.sha256, model, proof)
    next_step = f"net = cv2.dnn.readNetFromCaffe('deploy.prototxt', {str(output)!r})  # in OpenCV 4"
    return _conclude(proof, facts, output, report, weights.class_names, next_step, screen)


def default_output(checkpoint: str) -> Path:
    """Return the file in the working directory that a port is written to by default, named after the checkpoint."""
    if checkpoint in ("imagenet", "bvlc", "random"):
        return Path(f"googlenet-{checkpoint}.safetensors")
    name = Path((name_in_url(checkpoint) or "checkpoint") if "://" in checkpoint else checkpoint)
    return Path(f"{name.stem}-flax.safetensors" if name.suffix == ".safetensors" else f"{name.stem}.safetensors")


def _check_outputs(checkpoint: str | Path, output: Path, report: Path | None) -> None:
    """Raise UsageError if two of the files are the same, and CommandError if an output could not be written."""
    if report and os.path.realpath(report) == os.path.realpath(output):
        raise UsageError(f"{output} is named twice: the report needs a file of its own")
    for path in filter(None, (output, report)):
        if os.path.realpath(path) == os.path.realpath(checkpoint):
            raise UsageError(f"{path} is the checkpoint itself: name another file to write")
        require_folder_of(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise CommandError(f"cannot write {path}: it exists and is not a regular file")


def find_device(platform: str) -> jax.Device:
    """Return this machine's first device of a platform; raise an InputError if there is none."""
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError as error:
        advice = "install JAX for such a device on a machine that has one, or leave out --device"
        raise InputError(f"--device {platform}: JAX has no such device here; {advice}") from error


def _prove(
    state_dict: dict[str, np.ndarray],
    model: GoogLeNet,
    variables: Variables,
    device: jax.Device | None,
    messages: Messages,
) -> Proof:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} runs"))
    with messages.progress(*columns) as bar:
        task = bar.add_task("proving the port", visible=False)  # shown from the first run on, when the total is known

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        return prove(state_dict, model, variables, show, device)


def _facts(source: str, source_sha256: str | None, model: GoogLeNet, proof: Proof) -> dict[str, Any]:
    packages = ("flax-googlenet", "jax", "flax", "torch", "torchvision", "numpy")
    return {
        "source": source,
        "source_sha256": source_sha256,
        "variant": model.variant,
        "num_classes": model.num_classes,
        "aux_logits": model.aux_logits,
        "transform_input": model.transform_input,
        **_FACTS[model.variant],
        "parity": summary(proof),
        **({"device": proof.device} if proof.device else {}),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
    }


def _conclude(
    proof: Proof,
    facts: dict[str, Any],
    output: Path,
    report: Path | None,
    class_names: list[str] | None,
    next_step: str,
    screen: Console,
) -> Result:
    """Write the report and show the result; ``output`` has been written if the port is proven."""
    screen.print(_table(proof))
    facts = facts | {"output": display_name(str(output)) if proof.ok else None}
    if proof.ok:
        facts["output_sha256"] = hashlib.sha256(output.read_bytes()).hexdigest()
    if report:
        hidden = ("parity", "versions", "not_in_state_dict", "source_sha256" if facts["source_sha256"] is None else "")
        entries = {name: str(value) for name, value in facts.items() if name not in hidden} | facts["versions"]
        entries |= {f"not in the .pth: {name}": value for name, value in facts.get("not_in_state_dict", {}).items()}
        try:
            with writing(report), cleans_up():
                write_atomically(report, render(proof, entries, class_names).encode())
        except CommandError as error:
            return Status.NOT_WRITTEN, facts | {"error": str(error)}
        screen.print(f"Report: {shown(report)}", soft_wrap=True)
    if not proof.ok:
        first = next(stage.name for stage in proof.stages if not stage.ok)
        message = f"{facts['source']}: not proven: {first} differs, and no port was written; --diagnose finds the cause"
        return Status.NOT_PROVEN, facts | {"error": message}
    size = output.stat().st_size / 1e6
    screen.print(f"[bold green]Proven:[/] all {len(proof.stages)} stages agree.", soft_wrap=True)
    screen.print(f"Wrote {shown(output)} ({size:.1f} MB). Next:", soft_wrap=True)
    screen.print(f"    {escape(next_step)}", soft_wrap=True)
    return Status.PROVEN, facts


def shown(text: str | Path) -> str:
    """Return text from a file, or the name of one, for a console: control characters and rich's markup are escaped."""
    return escape(printable(str(text)))


def _table(proof: Proof) -> Table:
    caption = "Largest difference from PyTorch in float64, relative to the stage's largest value"
    headers = ["shape", "Flax\nfloat64", "PyTorch\nfloat32", "Flax\nfloat32"]
    if proof.device:
        headers.append("on the\ndevice")
        caption += f"\nThe device, in float32: {shown(proof.device)}"
    table = Table(caption=caption)
    table.add_column("stage")
    for header in headers:
        table.add_column(header, justify="right")
    table.add_column("")
    for stage in proof.stages:
        shape = "x".join(str(size) for size in stage.shape[1:])
        errors = [f"{error:.1e}" for error in (stage.float64, stage.pytorch32, stage.flax32)]
        if stage.device32 is not None:
            errors.append(f"{stage.device32:.1e}")
        table.add_row(stage.name, shape, *errors, "[green]ok[/]" if stage.ok else "[bold red]differs[/]")
    return table


def what_a_state_dict_lacks(weights: Weights) -> dict[str, tuple[str, str]]:
    """Return what a file of this library holds besides names and tensors: name -> (value, how to keep it)."""
    model, metadata, size = weights.model, weights.metadata, weights.image_size
    names, recipe = weights.class_names, metadata.get("recipe")
    call = "an argument of the call above"
    lacking = {
        "class names": (
            f"{len(names)}: {listing(names, 4)}" if names else "none",
            "keep them as a list, in the order of the logits" if names else "",
        ),
        "image size": (f"{size}x{size}", "resize and crop images to it, and normalise them as for ImageNet"),
        "transform_input": (str(model.transform_input), call),
        "dropout": (f"{model.dropout}; auxiliary heads {model.dropout_aux}", call),
        "computation": (f"{np.dtype(model.dtype)}, precision {model.precision}", "model.to(dtype), torch.backends"),
    }
    if isinstance(recipe, dict):
        blocks = recipe.get("frozen")  # metadata can hold anything
        frozen = ", ".join(map(str, blocks)) if isinstance(blocks, list) and blocks else "none"
        lacking["recipe"] = (f"{len(recipe)} fields; frozen: {frozen}", "to train on, freeze the same blocks yourself")
    if others := [str(name) for name in metadata if name not in ("class_names", "recipe")]:
        lacking["other metadata"] = (", ".join(others), "flax_googlenet.load_metadata reads it")
    return lacking


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:  # torch.from_numpy takes only NumPy's own dtypes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
