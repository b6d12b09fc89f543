"""Reads the class names from a file that a person wrote."""

import json
from pathlib import Path
from typing import Any

from exit_status import PortFailureError, Status

from flax_googlenet import CheckpointError
from flax_googlenet.weights.checkpoint import check_class_names


def read_class_names(path: Path, num_classes: int) -> list[str]:
    """Read the class names, one a line or as a JSON list, in the order of the logits.

    Raises:
        PortFailureError: UNAVAILABLE if the file cannot be read, REFUSED if it does not hold one name for each class.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a byte order mark
        names: Any = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.rstrip().splitlines()
        check_class_names(names, num_classes)
    except OSError as error:
        raise PortFailureError(Status.UNAVAILABLE, f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PortFailureError(Status.REFUSED, f"{path} is not UTF-8: save it as UTF-8") from error
    except (ValueError, RecursionError, CheckpointError) as error:  # ValueError: bad JSON, or an endless number in it
        message = f"{path}: {error}; expected one name a line, or a JSON list of names"
        raise PortFailureError(Status.REFUSED, message) from error
    names = [name.strip() for name in names]
    if "" in names:
        raise PortFailureError(Status.REFUSED, f"{path}: the name of class {names.index('')} is empty")
    return names
