"""Where a checkpoint comes from: a file, a download, PyTorch's cache, or a seed."""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import download
import numpy as np
import reference
import torch
import untrusted
from exit_status import PortFailureError, Status
from interrupt import cleans_up
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from flax_googlenet.commands.terminal import draws_progress
from flax_googlenet.errors import printable, url_without_secrets
from flax_googlenet.images.files import display_name

IMAGENET_NAME = Path(reference.IMAGENET.url).name
IMAGENET_HASH: str = download.hash_in_name(IMAGENET_NAME)  # type: ignore[assignment]  # torchvision's names have one


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read and is sound; whether it is a GoogLeNet's is not known yet."""

    name: str
    sha256: str | None
    """Of the file; None for random weights."""
    state_dict: dict[str, np.ndarray]

    @property
    def class_names(self) -> list[str] | None:
        """ImageNet's 1000, for torchvision's own weights."""
        is_imagenet = self.sha256 is not None and self.sha256.startswith(IMAGENET_HASH)
        return reference.IMAGENET.meta["categories"] if is_imagenet else None


def read(args: argparse.Namespace, progress: Console) -> Source:
    """Finds and reads ``args.checkpoint``.

    Raises:
        PortFailureError: UNAVAILABLE if it cannot be had, REFUSED if it is damaged, unsafe or no state dict.
    """
    if args.checkpoint == "random":
        state_dict = {key: tensor.numpy() for key, tensor in reference.random_checkpoint().items()}
        return Source("random", None, _selected(state_dict, args))
    with cleans_up(), tempfile.TemporaryDirectory() as scratch:
        if args.checkpoint == "imagenet":
            path = _download(reference.IMAGENET.url, Path(scratch), progress)
        elif "://" in args.checkpoint:
            path = _download(args.checkpoint, Path(scratch), progress)
        else:
            path = Path(args.checkpoint)
        try:
            checkpoint = untrusted.read(path, args.key)
        except untrusted.UntrustedFileError as error:
            raise PortFailureError(Status.REFUSED, str(error)) from error
        except OSError as error:
            message = f"cannot read {path}: {error.strerror}{_way_out(path)}"
            raise PortFailureError(Status.UNAVAILABLE, message) from error
    if path.name == IMAGENET_NAME and not checkpoint.sha256.startswith(IMAGENET_HASH):
        # Its format has no checksum, so a damaged weight would go unnoticed; its name has one.
        message = f"{path} is damaged: its sha256 is {checkpoint.sha256}, and it should start with {IMAGENET_HASH}"
        raise PortFailureError(Status.REFUSED, f"{message}: delete it and download it again")
    name = url_without_secrets(args.checkpoint) if "://" in args.checkpoint else display_name(args.checkpoint)
    source = Source(name, checkpoint.sha256, _selected(checkpoint.state_dict, args))
    if source.class_names and args.checkpoint != "imagenet" and args.transform_input is None:
        progress.print("[yellow]note:[/] these are torchvision's ImageNet weights: they want --transform-input")
    for note in checkpoint.notes:
        progress.print(f"[yellow]note:[/] {escape(printable(note))}")
    return source


def _selected(state_dict: dict[str, np.ndarray], args: argparse.Namespace) -> dict[str, np.ndarray]:
    if not args.without_aux:
        return state_dict
    return {key: array for key, array in state_dict.items() if not key.startswith(("aux1.", "aux2."))}


def _way_out(path: Path) -> str:
    """Return the end of a message: what to give instead of a path that cannot be read."""
    if not os.path.exists(path):
        return ": give a file, a URL, imagenet or random"
    if not (path.is_dir() and os.access(path, os.R_OK | os.X_OK)):
        return ""
    if (path / "data.pkl").exists():
        return f": it is an unpacked .pth: pack it again with zip -0 -r {path.name}.pth {path.name}"
    if (path / ".metadata").exists():
        script = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        return f": it is a checkpoint of torch.distributed: turn it into a file with {script} {path} FILE.pth"
    suffixes = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar")
    names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(suffixes))
    return f": give the file in it: {' or '.join(str(path / name) for name in names[:3])}" if names else ""


def _download(url: str, scratch: Path, progress: Console) -> Path:
    name = download.name_in_url(url) or "checkpoint"
    sha256 = download.hash_in_name(name)
    # Only a file whose hash is known is kept in PyTorch's cache: nothing tells whether another is still the same.
    directory = Path(torch.hub.get_dir()) / "checkpoints" if sha256 else scratch
    path = directory / name
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with Progress(*columns, console=progress, transient=True, disable=not draws_progress(progress)) as bar:
            task = bar.add_task(f"downloading {name}", total=None)
            download.fetch(
                url,
                path,
                sha256=sha256,
                max_bytes=untrusted.MAX_BYTES,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
                warn=lambda message: progress.print(f"[bold yellow]warning:[/] {escape(printable(message))}"),
            )
    except download.DownloadError as error:
        way_out = ""
        if isinstance(error, download.WrongFileError):
            way_out = f"; if {sha256} in its name is no hash, download it yourself and give the path of the file"
        if url == reference.IMAGENET.url:
            way_out = f"; without the network, put {name} at {path} and run this again, or try the port with: random"
        raise PortFailureError(Status.UNAVAILABLE, f"{error}{way_out}") from error
    except OSError as error:
        raise PortFailureError(
            Status.UNAVAILABLE, f"cannot keep {url_without_secrets(url)} at {path}: {error.strerror}"
        ) from error
    return path
