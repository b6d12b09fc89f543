"""The files of the subcommands: whatever is wrong with one ends the command with one line that names it."""

from pathlib import Path
from typing import Any, NamedTuple

from flax_googlenet.commands.status import CommandError, Status
from flax_googlenet.errors import well_formed
from flax_googlenet.images.preprocessing import CROP
from flax_googlenet.model import MIN_SIZE, Dtype, GoogLeNet
from flax_googlenet.weights.checkpoint import CheckpointError, check_class_names, load_whole

_MAX_SIZE = 2**13  # pixels; in a file that somebody has forged, a size could ask for any memory


class Weights(NamedTuple):
    """What ``flax_googlenet.save`` wrote."""

    model: GoogLeNet
    variables: dict[str, Any]
    metadata: dict[str, Any]
    digest: str
    """The first 16 digits of the sha256 of the file."""

    @property
    def class_names(self) -> list[str] | None:
        """A name for each class, if the metadata has them; whatever else it has in their place is no names."""
        names = self.metadata.get("class_names")
        try:
            check_class_names(names, self.model.num_classes)
        except CheckpointError:
            return None
        return names and list(map(well_formed, names))

    @property
    def image_size(self) -> int:
        """Height and width of the images of the training, in pixels; 224 unless the metadata has those of a run."""
        recipe = self.metadata.get("recipe")
        size = recipe.get("image_size") if isinstance(recipe, dict) else None
        return size if type(size) is int and MIN_SIZE <= size <= _MAX_SIZE else CROP


def load_weights(path: Path, *, dtype: Dtype | None = None) -> Weights:
    """Reads weights; ``dtype`` as for ``flax_googlenet.load``.

    Raises:
        CommandError: if they cannot be read, or are not those of this library.
    """
    try:
        model, variables, metadata, sha256 = load_whole(path, dtype=dtype)
        return Weights(model, variables, metadata, sha256[:16])
    except CheckpointError as error:
        raise CommandError(Status.NOT_DONE, error) from error
    except OSError as error:
        raise CommandError(Status.NOT_DONE, f"cannot read {path}: {error.strerror}") from error


def require_folder_of(output: Path) -> None:
    """Raises a CommandError if the folder of an output is not there: before the work, not after it."""
    if not output.parent.is_dir():
        raise CommandError(Status.NOT_DONE, f"cannot write {output}: there is no folder {output.parent}")
