"""Finds the state dict of a GoogLeNet in what people save: training checkpoints, wrapped modules, additional tensors.

The rules look at names and nesting only. The values can be arrays or tensors of any library.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flax_googlenet.architecture import BLOCKS
from flax_googlenet.errors import listing
from flax_googlenet.weights.torchvision import NAMES, PortingError

_NAME = re.compile(
    rf"(?:^|\.)(({'|'.join(BLOCKS)})(\.branch\d(\.\d)?)?(\.(conv|bn|fc1|fc2))*"
    rf"\.({'|'.join(sorted(set(NAMES.values())))}))\Z"
)
"""torchvision's name of a tensor, at the end of a name with any prefix."""

_ENOUGH = 100  # of the 287 names without counters and auxiliary heads; a ResNet has two of them, those of fc
_MAX_DEPTH = 4
_MAX_NETWORKS = 100  # more are not told apart, because a hostile file could have thousands
_SHOWN = 60  # characters of a name in a message
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|average|averaged|teacher)([._]|$)", re.IGNORECASE)
_BOOKKEEPING = ("n_averaged",)  # the counter of torch.optim.swa_utils.AveragedModel


class FoundStateDict(NamedTuple):
    """A state dict, and notes on how it was found."""

    state_dict: dict[str, Any]
    """Unchanged arrays under torchvision's names, or under the names of another network that the file holds."""
    notes: list[str]
    """Notes on which of several networks was taken and on what was left out, one line each."""


class _Candidate(NamedTuple):
    path: tuple[str, ...]
    """Keys that lead to the mapping."""
    prefix: str
    """Start of all names of the network in the mapping: "", "module.", "model.net.", ..."""
    mapping: Mapping[str, Any]

    @property
    def names(self) -> set[str]:
        """Keys that choose it: the path of the mapping with or without the prefix, or the prefix."""
        place, prefix = ".".join(self.path), self.prefix.rstrip(".")
        return {place, prefix, f"{place}.{prefix}".strip(".")}


def find_state_dict(content: Any, key: str | None = None) -> FoundStateDict:
    """Find the weights of a GoogLeNet in the contents of a file.

    A network is recognised by torchvision's names. A prefix that all of them share (``module.``, ``model.``,
    ``_orig_mod.``, ...) is removed. If the network has a prefix, tensors without it are left out, such as the weights
    of a loss or the counters of a metric. If it has none, only values that cannot belong to a layer are left out.

    Args:
        content: Contents of a file: a state dict, or mappings, lists or tuples that contain one.
        key: Which of several networks to take: the keys that lead to it, joined by dots, or its prefix. None takes the
            first network that is not a moving average of another one.

    Returns:
        The state dict. If there is no GoogLeNet, the mapping with the most arrays, for which ``from_torchvision``
        raises an error that explains what is wrong.

    Raises:
        PortingError: If there are no arrays, or none under ``key``.
    """
    outermost = _as_mapping(content)
    if outermost is None:
        raise PortingError(f"it holds a {type(content).__name__}, not a state dict")
    mappings = list(_mappings(outermost))
    candidates = [_Candidate(path, prefix, mapping) for path, mapping in mappings for prefix in _prefixes(mapping)]
    candidates = candidates[:_MAX_NETWORKS]
    wanted = candidates
    if key is not None:
        wanted = [
            candidate
            for candidate in candidates
            if any(f"{name}.".startswith(f"{key}.") for name in candidate.names if name)
        ]
        mappings = [(path, mapping) for path, mapping in mappings if ".".join(path) == key]
    if wanted:
        return _choose(wanted, candidates)
    fullest = max((mapping for _, mapping in mappings), key=lambda x: sum(map(_is_array, x.values())), default={})
    arrays = {str(name): value for name, value in fullest.items() if _is_array(value)}
    if not arrays:
        missing = "no state dict found" if key is None else f"there is no state dict under the key {key}"
        raise PortingError(f"{missing}; the keys found: {_shown(outermost, 12) or 'none'}")
    return FoundStateDict(arrays, [])


def _choose(wanted: list[_Candidate], candidates: list[_Candidate]) -> FoundStateDict:
    chosen = min(wanted, key=lambda candidate: any(map(_AVERAGED.search, candidate.names)))
    prefixes = [candidate.prefix for candidate in candidates if candidate.mapping is chosen.mapping]
    state_dict, left_out = {}, []
    for key, value in chosen.mapping.items():
        name = str(key)
        longest = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if longest == chosen.prefix and (chosen.prefix or _could_be_of_a_layer(name, value)):
            state_dict[name.removeprefix(chosen.prefix)] = value
        elif longest in (chosen.prefix, None) and name not in _BOOKKEEPING:
            left_out.append(name)
    notes = []
    if others := [_label(candidate, candidates) for candidate in wanted if candidate is not chosen]:
        taken = repr(_label(chosen, candidates)[:_SHOWN] or "the outermost weights")
        keys = " or ".join(key[:_SHOWN] for key in others[:8] if key)
        notes.append(f"took {taken}; the file's other weights have the key {keys}")
    if left_out:
        notes.append(f"left out entries that do not belong to the network: {_shown(left_out, 3)}")
    return FoundStateDict(state_dict, notes)


def _label(candidate: _Candidate, candidates: list[_Candidate]) -> str:
    """Return the shortest key for a candidate, with the prefix only if its mapping holds several networks."""
    is_only_network = sum(other.mapping is candidate.mapping for other in candidates) == 1
    return ".".join(filter(None, (*candidate.path, "" if is_only_network else candidate.prefix.rstrip("."))))


def _could_be_of_a_layer(name: str, value: Any) -> bool:
    return name not in _BOOKKEEPING and ("." in name or (_is_array(value) and len(value.shape) > 0))


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield the mappings in ``content`` except optimizers, outermost first, with the keys that lead to them."""
    level: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    seen = {id(content)}  # a mapping in a pickle can contain itself, and a long list be there a million times
    for _ in range(_MAX_DEPTH):
        yield from level
        inner = []
        for path, mapping in level:
            for name, value in mapping.items():
                if not isinstance(value, Mapping | list | tuple) or id(value) in seen or str(name).startswith("optim"):
                    continue
                seen.add(id(value))
                if (found := _as_mapping(value)) is not None:
                    inner.append(((*path, str(name)), found))
        level = inner


def _as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """Return a mapping as it is, the mappings in a list or tuple by their indices, and None for everything else."""
    if isinstance(value, list | tuple):
        return {str(i): element for i, element in enumerate(value) if isinstance(element, Mapping)} or None
    return value if isinstance(value, Mapping) else None


def _prefixes(mapping: Mapping[Any, Any]) -> list[str]:
    """Return the prefixes of the GoogLeNets in a mapping, in the order of the mapping."""
    counts: Counter[str] = Counter()
    for name, value in mapping.items():
        if isinstance(name, str) and _is_array(value) and (match := _NAME.search(name)):
            counts[name[: match.start(1)]] += 1
    return [prefix for prefix, count in counts.items() if count >= _ENOUGH]


def _shown(names: Iterable[Any], most: int) -> str:
    return listing((str(name)[:_SHOWN] for name in names), most)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
