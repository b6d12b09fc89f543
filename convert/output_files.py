"""Where the results go: named, checked before the work is done, and written whole or not at all."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from download import name_in_url
from exit_status import PortFailureError, Status
from interrupt import cleans_up


def default_output(checkpoint: str) -> Path:
    """Where a port goes unless it is said: into the working directory, named after the checkpoint."""
    if checkpoint in ("imagenet", "random"):
        return Path(f"googlenet-{checkpoint}.safetensors")
    name = Path((name_in_url(checkpoint) or "checkpoint") if "://" in checkpoint else checkpoint)
    return Path(f"{name.stem}-flax.safetensors" if name.suffix == ".safetensors" else f"{name.stem}.safetensors")


def check_outputs(checkpoint: str, *outputs: Path | None) -> None:
    """Before the work is done: is there a place for the results, and is it not the checkpoint's own?

    Raises:
        PortFailureError: USAGE or NOT_WRITTEN if not.
    """
    targets = [os.path.realpath(output) for output in outputs if output]
    if len(set(targets)) < len(targets):
        raise PortFailureError(Status.USAGE, f"{outputs[0]} is named twice: the report needs a file of its own")
    for output in filter(None, outputs):
        if os.path.realpath(output) == os.path.realpath(checkpoint):
            raise PortFailureError(Status.USAGE, f"{output} is the checkpoint itself: name another file to write")
        if not output.absolute().parent.is_dir():
            message = f"cannot write {output}: there is no folder {output.absolute().parent}"
            raise PortFailureError(Status.NOT_WRITTEN, message)
        if os.path.exists(output) and not os.path.isfile(output):
            raise PortFailureError(Status.NOT_WRITTEN, f"cannot write {output}: it is there and not a regular file")


@contextmanager
def writing(path: Path, facts: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """For a block that writes ``path``: what goes wrong becomes a PortFailureError, and Ctrl-C cleans up."""
    try:
        with cleans_up():
            yield
    except OSError as error:
        raise PortFailureError(Status.NOT_WRITTEN, f"cannot write {path}: {error.strerror}", facts) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
