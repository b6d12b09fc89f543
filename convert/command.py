"""What ``port_weights.py`` does: from torchvision to Flax, the way back, and why a port is wrong."""

import argparse
import importlib.metadata
import io
import math
import os
import platform
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from checkpoint_source import Source, read
from class_names import read_class_names
from diagnose import diagnose
from exit_status import PortFailureError, Status
from output_files import check_outputs, default_output, sha256, writing
from proof import Proof, prove, summary
from report import render
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.commands.terminal import draws_progress
from flax_googlenet.errors import listing, printable
from flax_googlenet.files import write_atomically
from flax_googlenet.images.files import display_name
from flax_googlenet.model import Variables
from flax_googlenet.weights.checkpoint import Weights, load_weights

jax.config.update("jax_enable_x64", True)  # the proof is in float64


def port(args: argparse.Namespace, screen: Console, progress: Console) -> tuple[Status, dict[str, Any]]:
    """Reads, converts, proves, writes.

    Args:
        args: the command line.
        screen: for the table and what comes next.
        progress: for bars and notes.

    Returns:
        How it ended, and what ``--json`` prints.

    Raises:
        PortFailureError: for every status but success.
    """
    output = args.output or default_output(args.checkpoint)
    check_outputs(args.checkpoint, output, args.report)
    source = read(args, progress)
    model, variables = _convert(source, _transform_input(args))
    class_names = read_class_names(args.class_names, model.num_classes) if args.class_names else source.class_names
    if args.transform_input is None and args.checkpoint not in ("imagenet", "random") and not source.class_names:
        advice = "add --transform-input if the network was made with it on, as fine-tuned ImageNet weights are"
        progress.print(f"[yellow]note:[/] transform_input is taken as off: {advice}")
    proof = _prove(source.state_dict, model, variables, progress)
    facts = _facts(source.name, source.sha256, model, proof)
    if proof.ok:
        with writing(output):
            flax_googlenet.save(output, model, variables, facts | {"class_names": class_names})
    dtype = ", dtype=jax.numpy.float32" if model.param_dtype == np.float64 else ""  # float64 needs 64 bits enabled
    next_step = f"model, variables = flax_googlenet.load({str(output)!r}{dtype})"
    return _conclude(args.report, screen, facts, proof, output, class_names, next_step)


def port_back(args: argparse.Namespace, screen: Console, progress: Console) -> tuple[Status, dict[str, Any]]:
    """The same from a file of this library to a state dict of torchvision's; as ``port``."""
    path, output = Path(args.checkpoint), args.to_torchvision
    check_outputs(args.checkpoint, output, args.report)
    weights = _load(path)
    model, variables = weights.model, weights.variables
    try:
        state_dict = flax_googlenet.to_torchvision(variables)
    except flax_googlenet.PortingError as error:
        raise PortFailureError(Status.REFUSED, f"{path}: {_one_line(error)}") from error
    proof = _prove(state_dict, model, variables, progress)
    left_behind = what_a_state_dict_lacks(weights)
    facts = _facts(display_name(str(path)), sha256(path), model, proof) | {
        "not_in_state_dict": {name: value for name, (value, _) in left_behind.items()}
    }
    if proof.ok:
        buffer = io.BytesIO()
        torch.save({key: _tensor(array) for key, array in state_dict.items()}, buffer)
        with writing(output):
            write_atomically(output, buffer.getvalue())
    arguments = f"num_classes={model.num_classes}, aux_logits={model.aux_logits}, init_weights=False"
    if model.transform_input:
        arguments += ", transform_input=True"
    for name, default in (("dropout", 0.2), ("dropout_aux", 0.7)):
        if getattr(model, name) != default:
            arguments += f", {name}={getattr(model, name)}"
    next_step = f"model = torchvision.models.googlenet({arguments}); model.load_state_dict(torch.load({str(output)!r}))"
    concluded = _conclude(args.report, screen, facts, proof, output, weights.class_names, next_step)
    screen.print(f"{escape(printable(str(output)))} holds names and tensors alone. It lacks:", soft_wrap=True)
    table = Table("", f"in {escape(printable(str(path)))}", "in PyTorch")
    for name, (value, advice) in left_behind.items():
        table.add_row(name, escape(printable(value)), advice)
    screen.print(table)
    return concluded


def diagnose_port(args: argparse.Namespace, screen: Console, progress: Console) -> tuple[Status, dict[str, Any]]:
    """Names the first stage that diverges and the likely cause; writes nothing. As ``port``, and NOT_PROVEN returns."""
    output = args.output or default_output(args.checkpoint)
    port_at_output = _load(output) if args.output or os.path.exists(output) else None
    source = read(args, progress)
    fresh_model, fresh_variables = _convert(source, _transform_input(args))
    if port_at_output:
        subject = display_name(str(output))
        model = port_at_output.model
        variables: Variables = port_at_output.variables
        if (model.num_classes, model.aux_logits, model.batch_norm) != (
            fresh_model.num_classes,
            fresh_model.aux_logits,
            fresh_model.batch_norm,
        ):
            message = "its number of classes, auxiliary heads or BatchNorm differ"
            raise PortFailureError(Status.REFUSED, f"{output} is no port of {source.name}: {message}")
    else:
        subject = f"a fresh port of {source.name}"
        model, variables = fresh_model, fresh_variables
    # Unless it was said, only the ImageNet checkpoint tells what its input should be.
    is_known = args.transform_input is not None or args.checkpoint == "imagenet"
    with progress.status("comparing the stages") if draws_progress(progress) else nullcontext():
        found = diagnose(
            source.state_dict,
            model,
            variables,
            transform_input=fresh_model.transform_input if is_known else model.transform_input,
        )
    if found is None:
        screen.print(
            f"[bold green]No difference:[/] {escape(printable(subject))} agrees with {escape(printable(source.name))} "
            "in every stage."
        )
        return Status.PROVEN, {"port": subject, "diagnosis": None}
    if math.isfinite(found.error):
        size = f"the largest error is {found.error:.1e} of the largest value"
    else:
        size = "its shape differs" if math.isinf(found.error) else "it has values that are not finite"
    screen.print(f"[bold red]Diverges at {found.stage}:[/] {escape(printable(subject))}, {size}.", soft_wrap=True)
    screen.print(f"[bold]Likely cause: {found.cause}.[/] {escape(found.explanation)}.", soft_wrap=True)
    diagnosis = {**vars(found), "error": found.error if math.isfinite(found.error) else None}
    return Status.NOT_PROVEN, {"port": subject, "diagnosis": diagnosis}


def _convert(source: Source, transform_input: bool) -> tuple[GoogLeNet, Variables]:
    try:
        variables = flax_googlenet.from_torchvision(source.state_dict)
    except flax_googlenet.PortingError as error:
        raise PortFailureError(Status.REFUSED, f"{source.name}: {_one_line(error)}") from error
    bias = variables["params"]["fc"]["bias"]
    model = GoogLeNet(
        num_classes=len(bias),
        aux_logits="aux1" in variables["params"],
        transform_input=transform_input,
        param_dtype=bias.dtype.type,
    )
    return model, variables


def _load(path: Path) -> Weights:
    try:
        return load_weights(path)
    except flax_googlenet.CheckpointError as error:
        status = Status.UNAVAILABLE if isinstance(error.__cause__, OSError) else Status.REFUSED
        raise PortFailureError(status, " ".join(str(error).split())) from error


def _prove(state_dict: dict[str, np.ndarray], model: GoogLeNet, variables: Variables, progress: Console) -> Proof:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} runs"))
    with Progress(*columns, console=progress, transient=True, disable=not draws_progress(progress)) as bar:
        task = bar.add_task("proving the port", visible=False)  # until the first run, when their number is known

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        return prove(state_dict, model, variables, show)


def _facts(source: str, source_sha256: str | None, model: GoogLeNet, proof: Proof) -> dict[str, Any]:
    packages = ("flax-googlenet", "jax", "flax", "torch", "torchvision", "numpy")
    return {
        "source": source,
        "source_sha256": source_sha256,
        "num_classes": model.num_classes,
        "aux_logits": model.aux_logits,
        "transform_input": model.transform_input,
        "parity": summary(proof),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
    }


def _conclude(
    report: Path | None,
    screen: Console,
    facts: dict[str, Any],
    proof: Proof,
    output: Path,
    class_names: list[str] | None,
    next_step: str,
) -> tuple[Status, dict[str, Any]]:
    """Says what came out, on the screen and in the report; returns and raises as ``port``."""
    screen.print(_table(proof))
    written = {"output": display_name(str(output)), "output_sha256": sha256(output)} if proof.ok else {"output": None}
    facts = facts | written
    if report:
        hidden = ("parity", "versions", "not_in_state_dict", "source_sha256" if facts["source_sha256"] is None else "")
        shown = {name: str(value) for name, value in facts.items() if name not in hidden} | facts["versions"]
        shown |= {f"not in the .pth: {name}": value for name, value in facts.get("not_in_state_dict", {}).items()}
        with writing(report, facts):
            write_atomically(report, render(proof, shown, class_names).encode())
        screen.print(f"Report: {escape(printable(str(report)))}", soft_wrap=True)
    if not proof.ok:
        first = next(stage.name for stage in proof.stages if not stage.ok)
        message = f"{facts['source']}: not proven: {first} is off, and nothing was written; --diagnose tells more"
        raise PortFailureError(Status.NOT_PROVEN, message, facts)
    size = output.stat().st_size / 1e6
    screen.print(f"[bold green]Proven:[/] all {len(proof.stages)} stages agree.", soft_wrap=True)
    screen.print(f"Wrote {escape(printable(str(output)))} ({size:.1f} MB). Next:", soft_wrap=True)
    screen.print(f"    {escape(next_step)}", soft_wrap=True)
    return Status.PROVEN, facts


def _table(proof: Proof) -> Table:
    table = Table(
        caption="Largest errors, relative to the largest value of the stage. The truth is PyTorch in float64."
    )
    table.add_column("stage")
    for header in ("shape", "float64:\nFlax - PyTorch", "float32:\nPyTorch - truth", "float32:\nFlax - truth"):
        table.add_column(header, justify="right")
    table.add_column("")
    for stage in proof.stages:
        shape = "x".join(str(size) for size in stage.shape[1:])
        errors = (f"{error:.1e}" for error in (stage.float64, stage.pytorch32, stage.flax32))
        table.add_row(stage.name, shape, *errors, "[green]ok[/]" if stage.ok else "[bold red]off[/]")
    return table


def what_a_state_dict_lacks(weights: Weights) -> dict[str, tuple[str, str]]:
    """Return what a file of this library holds beside names and tensors: name -> its value, and what to do about it."""
    model, metadata, size = weights.model, weights.metadata, weights.image_size
    names, recipe = weights.class_names, metadata.get("recipe")
    call = "an argument of the call above"
    lacking = {
        "class names": (
            f"{len(names)}: {listing(names, 4)}" if names else "none",
            "keep them as a list, in the order of the logits" if names else "",
        ),
        "image size": (f"{size}x{size}", "resize and crop images to it, and normalise them as ImageNet's"),
        "transform_input": (str(model.transform_input), call),
        "dropout": (f"{model.dropout}; auxiliary heads {model.dropout_aux}", call),
        "computation": (f"{np.dtype(model.dtype)}, precision {model.precision}", "model.to(dtype), torch.backends"),
    }
    if isinstance(recipe, dict):
        blocks = recipe.get("frozen")  # metadata is free: anything can be there
        frozen = ", ".join(map(str, blocks)) if isinstance(blocks, list) and blocks else "none"
        lacking["recipe"] = (f"{len(recipe)} fields; frozen: {frozen}", "to train on, freeze the same blocks yourself")
    if others := [str(name) for name in metadata if name not in ("class_names", "recipe")]:
        lacking["other metadata"] = (", ".join(others), "flax_googlenet.load_metadata reads it")
    return lacking


def _transform_input(args: argparse.Namespace) -> bool:
    return args.checkpoint == "imagenet" if args.transform_input is None else args.transform_input


def _one_line(error: flax_googlenet.PortingError) -> str:
    if not error.problems:
        return str(error)
    advice = ""
    if all(re.match(r"aux\d\.", name) for names in error.problems.values() for name in names):
        advice = "; only the auxiliary heads are: --without-aux leaves them out"
    elif any(name.endswith(("_orig", "_mask")) for name in error.problems.get("unexpected", [])):
        advice = "; it was pruned: call torch.nn.utils.prune.remove(module, 'weight') for each module, and save again"
    kinds = (f"{len(names)} {kind} ({listing(names, 3)})" for kind, names in error.problems.items())
    return f"not the weights of a GoogLeNet: {'; '.join(kinds)}{advice}"


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:  # torch.from_numpy knows only NumPy's own dtypes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
