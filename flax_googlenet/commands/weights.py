"""The weights that a command line names: a file, or pretrained weights, which are downloaded with a bar."""

from pathlib import Path
from typing import TYPE_CHECKING

from flax_googlenet.commands.terminal import Messages

if TYPE_CHECKING:
    from flax_googlenet.weights.checkpoint import Weights

DEFAULTS = (Path("googlenet-imagenet.safetensors"), Path("googlenet-random.safetensors"))
"""The files that ``port_weights.py`` of the repository writes by default, into the working folder."""


def is_pretrained(named: str | Path) -> bool:
    """Return whether a word of the command line is the name of pretrained weights."""
    from flax_googlenet.weights.pretrained import PRETRAINED

    return str(named) in PRETRAINED


def weights_file(named: str | Path, messages: Messages) -> Path:
    """Return the file of the weights that a command line names, after a download if pretrained ones are not there yet.

    Raises:
        DownloadError: If the pretrained weights cannot be downloaded or kept.
    """
    if not is_pretrained(named):
        return Path(named)
    from flax_googlenet.files import cache_folder
    from flax_googlenet.weights.pretrained import pretrained_file

    with messages.download_progress() as bar:
        task = bar.add_task(f"downloading {named}", total=None, visible=False)

        def show(done: int, total: int | None) -> None:
            if not bar.tasks[0].visible:
                messages.note(f"downloading the weights {named}, once: they are kept in {cache_folder()}")
            bar.update(task, completed=done, total=total, visible=True)

        return pretrained_file(str(named), show, messages.warn)


def open_weights(named: Path | None, messages: Messages) -> tuple[Path, "Weights"]:
    """Read the weights that a command line names, or the default, in float32; warn if they are random.

    Returns:
        The file, and its contents.

    Raises:
        CheckpointError: If the file cannot be read.
        DownloadError: If the pretrained weights cannot be downloaded or kept.
    """
    import numpy as np

    from flax_googlenet.weights.checkpoint import load_weights

    path = weights_file(named or default_weights(messages), messages)
    weights = load_weights(path, dtype=np.float32)
    if weights.metadata.get("source") == "random":
        messages.warn("these weights are random: the answers mean nothing")
    return path, weights


def default_weights(messages: Messages) -> Path:
    """Return the file of weights in the working folder, or else the name ``imagenet``, and say that it is taken."""
    for path in DEFAULTS:
        if path.is_file():
            return path
    names = " or ".join(map(str, DEFAULTS))
    messages.note(f"no --weights, and no {names} in this folder: taking imagenet, torchvision's weights")
    return Path("imagenet")
