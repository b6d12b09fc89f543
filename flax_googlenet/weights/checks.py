"""Finds tensors that do not fit a network, for one message that lists all of them."""

from collections.abc import Mapping

import numpy as np


def tensor_problems(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Return the tensors that do not have the expected names and shapes, by the kind of problem."""
    return {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [name for name in tensors if name not in shapes],
        "wrong shape": [
            f"{name} {tensor.shape}, expected {shapes[name]}"
            for name, tensor in tensors.items()
            if name in shapes and tensor.shape != shapes[name]
        ],
    }


def with_problems(message: str, problems: Mapping[str, list[str]]) -> str:
    """Return a message with a line for each kind of problem, which lists all the tensors that have it."""
    return "\n".join([message, *(f"{kind}: {names}" for kind, names in problems.items() if names)])
