"""Pretrained networks, which are downloaded and converted once and then kept in the user's cache folder."""

import hashlib
import os
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from flax_googlenet.errors import printable
from flax_googlenet.files import cache_folder, lock, read_regular_file
from flax_googlenet.model import GoogLeNet
from flax_googlenet.weights import caffe
from flax_googlenet.weights.checkpoint import CheckpointError, load, load_metadata, save
from flax_googlenet.weights.download import DownloadError, WrongFileError, fetch, name_in_url
from flax_googlenet.weights.pth import read
from flax_googlenet.weights.torchvision import from_torchvision

_MAX_BYTES = 2**28  # the file has 50 MB


class Source(NamedTuple):
    """The file that pretrained weights are converted from: PyTorch's or, with the suffix ``.caffemodel``, Caffe's."""

    url: str
    sha256: str = ""
    """First digits of the file's SHA-256 digest."""
    sha1: str = ""
    """The file's SHA-1 digest, where only this one was published."""

    @property
    def digest(self) -> tuple[str, str]:
        """Algorithm of the digest that is known, and its first digits."""
        return ("sha1", self.sha1) if self.sha1 else ("sha256", self.sha256)


PRETRAINED = {
    # torchvision's GoogLeNet_Weights.IMAGENET1K_V1
    "imagenet": Source("https://download.pytorch.org/models/googlenet-1378be20.pth", sha256="1378be20"),
    # https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet
    "bvlc": Source(
        "http://dl.caffe.berkeleyvision.org/bvlc_googlenet.caffemodel", sha1="405fc5acd08a3bb12de8ee5e23a96bec22f08204"
    ),
}
"""Name of pretrained weights -> their source."""


def pretrained(
    name: str, *, on_progress: Callable[[int, int | None], None] = lambda done, total: None
) -> tuple[GoogLeNet, dict[str, Any]]:
    """Return a network with pretrained weights, which are downloaded once and then kept in the user's cache folder.

    The weights ``"imagenet"`` are torchvision's ``IMAGENET1K_V1``: 69.8 % top-1 and 89.5 % top-5. Their auxiliary heads
    are not trained. The weights ``"bvlc"`` are those of the paper's network as Berkeley trained it with Caffe, with all
    heads: 68.7 % top-1 and 88.9 % top-5. Both have ImageNet's 1000 classes in the same order, and take the same images.

    The first call downloads 49.7 or 53.5 MB, checks their hash, converts them, and keeps a ``.safetensors`` file with a
    checksum and the class names. Later calls need no network connection. A download that was interrupted is resumed. If
    several processes call this at once, one of them downloads, and the others wait for it.

    Two environment variables change where the files are. ``FLAX_GOOGLENET_CACHE`` is the cache folder, which by default
    is ``flax-googlenet`` in ``XDG_CACHE_HOME`` or in ``~/.cache``. ``FLAX_GOOGLENET_MIRROR`` is a folder, or the URL of
    one (``https:``, ``http:`` or ``file:``), that has ``googlenet-1378be20.pth`` or ``bvlc_googlenet.caffemodel`` for
    machines which cannot reach PyTorch's or Berkeley's server.

    Args:
        name: The name of the weights: ``"imagenet"`` or ``"bvlc"``.
        on_progress: Called during the download with the number of bytes received and the total, which is None if the
            server does not send it.

    Returns:
        The model and its variables, as ``load`` returns them.

    Raises:
        ValueError: If there are no weights of that name.
        DownloadError: If the download fails, with advice on what to put where, or if the cache cannot be written.

    Example::

        model, variables = flax_googlenet.pretrained("imagenet")
    """
    return load(pretrained_file(name, on_progress))


def pretrained_file(
    name: str,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
    warn: Callable[[str], object] = warnings.warn,
) -> Path:
    """Return the file of ``pretrained`` in the cache, after making it if it is missing or damaged.

    Args:
        name: The name of the weights.
        on_progress: Called during the download, as for ``pretrained``.
        warn: Called with a message if another process makes the file, before waiting for it, or if the file system of
            the cache has no locks.

    Raises:
        ValueError, DownloadError: For the same reasons as ``pretrained``.
    """
    if name not in PRETRAINED:
        raise ValueError(f"there are no pretrained weights {name!r}: the names are {', '.join(map(repr, PRETRAINED))}")
    source, folder = PRETRAINED[name], cache_folder()
    if folder is None:
        raise DownloadError("this user has no home folder for a cache: set FLAX_GOOGLENET_CACHE to a folder")
    path = folder / f"googlenet-{name}.safetensors"
    if _is_intact(path, source):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "ab") as lock_file:
            try:
                lock(lock_file, warn)
            except BlockingIOError:
                warn(f"another process is downloading the weights {name!r}: waiting for it")
                lock(lock_file, warn, wait=True)
            if not _is_intact(path, source):
                original, is_downloaded = _original(source, folder, on_progress, warn)
                _convert(original, path, source)
                for leftover in folder.glob(f".{path.name}.*.tmp"):  # what killed processes were writing
                    leftover.unlink(missing_ok=True)
                if is_downloaded:
                    original.unlink()
    except OSError as error:
        raise DownloadError(
            f"cannot keep the weights {name!r} in {folder}: {error.strerror}; "
            "make room there, or set FLAX_GOOGLENET_CACHE to another folder"
        ) from error
    return path


def _is_intact(path: Path, source: Source) -> bool:
    """Return whether a file exists, is undamaged and was converted from the source."""
    algorithm, digest = source.digest
    try:
        return str(load_metadata(path).get(f"source_{algorithm}")).startswith(digest)
    except (CheckpointError, OSError):
        return False


def _original(
    source: Source, folder: Path, on_progress: Callable[[int, int | None], None], warn: Callable[[str], object]
) -> tuple[Path, bool]:
    """Return the original file, after checking its hash, and whether it was downloaded to the cache.

    Otherwise it is that of a local mirror, which may be the cache's own folder.
    """
    name, (algorithm, digest) = name_in_url(source.url), source.digest
    mirror = os.environ.get("FLAX_GOOGLENET_MIRROR")
    url = f"{mirror.rstrip('/')}/{name}" if mirror else source.url
    if url.startswith("file:") or "://" not in url:
        place = os.path.expanduser(url)
        advice = f"set FLAX_GOOGLENET_MIRROR to a folder, or the URL of one, that has {name}"
        try:
            if url.startswith("file:"):
                parts = urlsplit(url)
                if parts.netloc not in ("", "localhost"):
                    raise ValueError("a file: URL has three slashes before its path, and no host")
                place = url2pathname(parts.path)
            found = hashlib.new(algorithm, read_regular_file(place, _MAX_BYTES)).hexdigest()
        except (OSError, ValueError) as error:  # also for a URL that is not valid, and for a path with a NUL
            reason = error.strerror if isinstance(error, OSError) else error
            raise DownloadError(f"cannot read {printable(place)}: {reason}; {advice}") from error
        if not found.startswith(digest):
            raise WrongFileError(
                f"{place}: wrong file: its {algorithm} is {found}, and it should start with {digest}; {advice}"
            )
        return Path(place), False
    path = folder / name
    try:
        fetch(
            url,
            path,
            sha256=source.sha256,
            sha1=source.sha1,
            max_bytes=_MAX_BYTES,
            on_progress=on_progress,
            warn=warn,
        )
    except DownloadError as error:
        raise DownloadError(
            f"{error}; without a network connection, put {name} at {path} and run this again, "
            "or set FLAX_GOOGLENET_MIRROR to a folder or a URL that has it"
        ) from error
    return path, True


def _convert(original: Path, path: Path, source: Source) -> None:
    metadata: dict[str, Any] = {"source": source.url}
    if original.suffix == ".caffemodel":
        checkpoint = caffe.read(original)
        model, variables = caffe.network(str(original), checkpoint.state_dict)
        metadata |= {"source_sha1": source.sha1, "input": caffe.INPUT}
    else:
        checkpoint = read(original)
        variables = from_torchvision(checkpoint.state_dict)
        model = GoogLeNet(aux_logits="aux1" in variables["params"], transform_input=True)
    names = resources.files(__package__).joinpath("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    save(path, model, variables, metadata | {"source_sha256": checkpoint.sha256, "class_names": names})
