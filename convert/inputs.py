"""Reads the inputs of the command: a checkpoint from a file, a URL, a cache or a seed; a port; and class names."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
from process import InputError, cleans_up

from flax_googlenet import CheckpointError, GoogLeNet, PortingError, StateDictError, from_torchvision
from flax_googlenet.commands.terminal import Messages
from flax_googlenet.errors import listing, printable, url_without_secrets
from flax_googlenet.images.files import display_name
from flax_googlenet.model import Variables
from flax_googlenet.weights import caffe, download, onnx, pth, tensorflow
from flax_googlenet.weights.checkpoint import Weights, check_class_names, load_weights
from flax_googlenet.weights.layouts import MAX_BYTES
from flax_googlenet.weights.pretrained import PRETRAINED

IMAGENET_NAME = Path(reference.IMAGENET.url).name
IMAGENET_HASH: str = download.hash_in_name(IMAGENET_NAME)  # type: ignore[assignment]  # torchvision's names have one


@dataclass(frozen=True)
class Request:
    """Which checkpoint to read, and how."""

    checkpoint: str
    """``imagenet``, ``bvlc``, ``random``, a path or a URL."""
    key: str | None
    """Which network of a training checkpoint to take, as for ``find_state_dict``."""
    without_aux: bool
    """Whether to leave out the auxiliary heads."""
    transform_input: bool | None
    """Whether the network transforms its input; None means that only ``imagenet`` does."""
    format: str
    """Format of the file: ``caffe``, ``tensorflow``, ``onnx`` or else ``pytorch``."""


@dataclass(frozen=True)
class Source:
    """A checkpoint of torchvision's, Berkeley's or Google's GoogLeNet, and its conversion to Flax."""

    name: str
    """Path or URL of the checkpoint, or "random"."""
    sha256: str | None
    """SHA-256 digest of the file; None for random weights."""
    state_dict: dict[str, np.ndarray]
    model: GoogLeNet
    variables: Variables
    class_names: list[str] | None
    """ImageNet's 1000 class names, if these are torchvision's own weights or have Berkeley's last layer."""


def read_source(request: Request, messages: Messages) -> Source:
    """Find, read and convert a checkpoint.

    Raises:
        InputError, DownloadError: If the file is not available.
        StateDictError: If it is damaged, unsafe or not a checkpoint.
        PortingError: If it holds another network.
    """
    checkpoint, transform_input = request.checkpoint, request.transform_input
    sha256 = class_names = None
    if checkpoint == "random":
        name = checkpoint
        state_dict = {name: tensor.numpy() for name, tensor in reference.random_checkpoint().items()}
        variant = "torchvision"
    else:
        name = url_without_secrets(checkpoint) if "://" in checkpoint else display_name(checkpoint)
        state_dict, sha256, notes, variant = _read_file(request, messages)
        if sha256.startswith(IMAGENET_HASH):
            class_names = reference.IMAGENET.meta["categories"]
            if checkpoint != "imagenet" and transform_input is None:
                notes = ["these are torchvision's ImageNet weights: add --transform-input", *notes]
        for note in notes:
            messages.note(f"note: {note}")
    if request.without_aux:
        state_dict = {name: array for name, array in state_dict.items() if not name.startswith(("aux1.", "aux2."))}
    try:
        if variant != "torchvision":
            model, variables = caffe.network(name, state_dict, variant)
            class_names = reference.IMAGENET.meta["categories"] if caffe.has_bvlc_classes(state_dict) else None
            return Source(name, sha256, state_dict, model, variables, class_names)
        variables = from_torchvision(state_dict)
    except PortingError as error:
        raise PortingError(f"{name}: {in_one_line(error)}") from error
    bias = variables["params"]["fc"]["bias"]
    model = GoogLeNet(
        num_classes=len(bias),
        aux_logits="aux1" in variables["params"],
        transform_input=checkpoint == "imagenet" if transform_input is None else transform_input,
        param_dtype=bias.dtype.type,
    )
    return Source(name, sha256, state_dict, model, variables, class_names)


def _read_file(request: Request, messages: Messages) -> pth.Checkpoint:
    checkpoint = request.checkpoint
    with cleans_up(), tempfile.TemporaryDirectory() as scratch:
        if checkpoint in PRETRAINED:
            path = _download(PRETRAINED[checkpoint].url, Path(scratch), messages, PRETRAINED[checkpoint].sha1)
        elif "://" in checkpoint:
            path = _download(checkpoint, Path(scratch), messages)
        else:
            path = Path(checkpoint)
        try:
            others = {"caffe": caffe.read, "tensorflow": tensorflow.read, "onnx": onnx.read}
            found = others[request.format](path) if request.format in others else pth.read(path, request.key)
        except OSError as error:
            advice = "" if os.path.exists(path) else ": give a file, a URL, imagenet, bvlc or random"
            raise InputError(f"cannot read {path}: {error.strerror}{advice}") from error
        except StateDictError as error:
            if isinstance(error.__cause__, OSError):  # it is a folder
                raise InputError(str(error)) from error
            raise
    if path.name == IMAGENET_NAME and not found.sha256.startswith(IMAGENET_HASH):
        # The file's format has no checksum, so a damaged weight would go unnoticed without the hash in its name.
        raise StateDictError(
            f"{path} is damaged: its sha256 is {found.sha256}, and it should start with {IMAGENET_HASH}: "
            "delete it and download it again"
        )
    return found


def _download(url: str, scratch: Path, messages: Messages, sha1: str = "") -> Path:
    """Download a file into PyTorch's cache if a hash of it is known, and else into the folder ``scratch``.

    The hash is ``sha1``, or the one in the name of the file.
    """
    name = download.name_in_url(url) or "checkpoint"
    sha256 = None if sha1 else download.hash_in_name(name)
    # Without a hash, nothing shows whether a cached file is still the one on the server.
    directory = Path(torch.hub.get_dir()) / "checkpoints" if sha1 or sha256 else scratch
    path = directory / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with messages.download_progress() as bar:
            task = bar.add_task(f"downloading {name}", total=None)
            download.fetch(
                url,
                path,
                sha256=sha256,
                sha1=sha1,
                max_bytes=MAX_BYTES,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
                warn=messages.warn,
            )
    except download.DownloadError as error:
        advice = ""
        if isinstance(error, download.WrongFileError) and sha256:
            advice = f"; if {sha256} in its name is not a hash, download the file yourself and give its path"
        if url in (source.url for source in PRETRAINED.values()):
            advice = f"; without a network, put {name} at {path} and run this again, or try: port_weights.py random"
        raise download.DownloadError(f"{error}{advice}") from error
    except OSError as error:
        raise InputError(f"cannot save {url_without_secrets(url)} as {path}: {error.strerror}") from error
    return path


def read_port(path: Path) -> Weights:
    """Read a file that this command or ``flax_googlenet.save`` wrote.

    Raises:
        InputError: If the file cannot be read.
        CheckpointError: If it is damaged, or not such a file.
    """
    try:
        return load_weights(path)
    except CheckpointError as error:
        kind = InputError if isinstance(error.__cause__, OSError) else CheckpointError
        raise kind(" ".join(str(error).split())) from error


def read_class_names(path: Path, num_classes: int) -> list[str]:
    """Read class names, one a line or as a JSON list, in the order of the logits.

    Raises:
        InputError: If the file cannot be read.
        CheckpointError: If it does not hold exactly one name for each class.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a byte order mark
        names: Any = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.rstrip().splitlines()
        check_class_names(names, num_classes)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: save it as UTF-8") from error
    except (ValueError, RecursionError) as error:  # bad JSON, a number of thousands of digits, or wrong names
        raise CheckpointError(f"{path}: {error}; expected one name a line, or a JSON list of names") from error
    names = [name.strip() for name in names]
    if "" in names:
        raise CheckpointError(f"{path}: the name of class {names.index('')} is empty")
    return names


def in_one_line(error: PortingError) -> str:
    """Summarise what is wrong with a checkpoint, and name the way out if the problems are known ones."""
    if not error.problems:
        return str(error)
    advice = f"; {error.advice}" if error.advice else ""
    if all(name.startswith(("aux1.", "aux2.")) for names in error.problems.values() for name in names):
        advice = "; only the auxiliary heads are wrong: --without-aux leaves them out"
    kinds = (f"{len(names)} {kind} ({printable(listing(names, 3))})" for kind, names in error.problems.items())
    return f"not the weights of a GoogLeNet: {'; '.join(kinds)}{advice}"
