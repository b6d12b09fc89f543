"""Pretrained weights: downloaded once, and whatever happens, the cache holds the right file or none.

The original file of these tests is a random network of torchvision's, in the format of the real one.
"""

import hashlib
import io
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import bvlc
import jax
import numpy as np
import pytest
import reference
import torch
from caffe_files import caffemodel
from serving import Server, half, rest, serve

import flax_googlenet
from flax_googlenet import DownloadError
from flax_googlenet.weights.pretrained import PRETRAINED, Source, pretrained_file

NAME = "googlenet-1378be20.pth"


@pytest.fixture(scope="module")
def original() -> bytes:
    state_dict = reference.random_checkpoint()
    without_aux = {key: tensor for key, tensor in state_dict.items() if not key.startswith("aux")}
    file = io.BytesIO()
    torch.save(without_aux, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that does not exist yet."""
    monkeypatch.setenv("FLAX_GOOGLENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLAX_GOOGLENET_MIRROR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def server(original: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the file that the weights ``imagenet`` are converted from."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(original) as server:
        url = server.url.replace("model.pth", NAME)
        monkeypatch.setitem(PRETRAINED, "imagenet", Source(url, hashlib.sha256(original).hexdigest()[:8]))
        yield server


@pytest.fixture
def path(cache: Path) -> Path:
    return cache / "googlenet-imagenet.safetensors"


def contents(cache: Path) -> set[str]:
    """The files of a cache but the one that is locked, which stays."""
    return {file.name for file in cache.iterdir()} - {"googlenet-imagenet.lock"}


class Process:
    """A process that gets the weights; ``lines`` has what it has printed: its progress, warnings and errors."""

    def __init__(self) -> None:
        program = f"""
import warnings
from flax_googlenet.weights import pretrained
warnings.showwarning = lambda message, *rest: print(message, flush=True)
pretrained.PRETRAINED["imagenet"] = pretrained.{PRETRAINED["imagenet"]!r}
pretrained.pretrained_file("imagenet", lambda done, total: print(done, flush=True))
"""
        command = [sys.executable, "-c", program]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def wait_for(self, line: str) -> None:
        while line not in self.lines:
            assert self.reader.is_alive() or line in self.lines, self.lines
            time.sleep(0.01)

    def end(self, by: signal.Signals | None = None) -> int:
        if by:
            self.process.send_signal(by)
        status = self.process.wait(60)
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


def test_imagenet_is_torchvisions_file() -> None:
    assert PRETRAINED["imagenet"].url == reference.IMAGENET.url
    assert f"-{PRETRAINED['imagenet'].sha256}.pth" in reference.IMAGENET.url


def test_weights_are_downloaded_once_and_need_no_network_afterwards(
    server: Server, original: bytes, path: Path, cache: Path
) -> None:
    calls: list[tuple[int, int | None]] = []
    model, variables = flax_googlenet.pretrained(
        "imagenet", on_progress=lambda done, total: calls.append((done, total))
    )
    assert calls[0] == (0, len(original))
    assert calls[-1] == (len(original), len(original))
    assert model == flax_googlenet.GoogLeNet(aux_logits=False, transform_input=True)
    expected = flax_googlenet.from_torchvision(torch.load(io.BytesIO(original)))
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert flax_googlenet.load_metadata(path) == {
        "source": PRETRAINED["imagenet"].url,
        "source_sha256": hashlib.sha256(original).hexdigest(),
        "class_names": reference.IMAGENET.meta["categories"],
    }
    assert contents(cache) == {path.name}  # the download is not kept beside it

    jax.tree.map(np.testing.assert_array_equal, flax_googlenet.pretrained("imagenet")[1], expected)
    assert server.ranges == [None]


def test_bvlc_is_berkeleys_file_by_its_sha1_whose_download_is_resumed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = caffemodel({name: x for name, x in bvlc.random_weights().items() if not name.startswith("aux")}, v1=True)
    sha1 = hashlib.sha1(original).hexdigest()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(original) as server:
        url = server.url.replace("model.pth", "bvlc_googlenet.caffemodel")
        monkeypatch.setitem(PRETRAINED, "bvlc", PRETRAINED["bvlc"]._replace(url=url, sha1=sha1))
        server.answer = half
        with pytest.raises(DownloadError, match="cut off after"):
            flax_googlenet.pretrained("bvlc")
        server.answer = rest
        model, variables = flax_googlenet.pretrained("bvlc")
    assert server.ranges == [None, f"bytes={len(original) // 2}-"]
    assert model == flax_googlenet.GoogLeNet(variant="bvlc", aux_logits=False, dropout=0.4)
    (cache / "right.caffemodel").write_bytes(original)
    jax.tree.map(np.testing.assert_array_equal, variables, flax_googlenet.from_caffe(cache / "right.caffemodel")[1])
    metadata = flax_googlenet.load_metadata(cache / "googlenet-bvlc.safetensors")
    assert (metadata["source"], metadata["source_sha1"]) == (url, sha1)
    assert metadata["class_names"] == reference.IMAGENET.meta["categories"]
    assert "BGR" in metadata["input"]

    monkeypatch.setitem(PRETRAINED, "bvlc", PRETRAINED["bvlc"]._replace(sha1="0" * 40))
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", str(cache))
    (cache / "bvlc_googlenet.caffemodel").write_bytes(original)
    with pytest.raises(DownloadError, match=f"wrong file: its sha1 is {sha1}, and it should start with 0000"):
        flax_googlenet.pretrained("bvlc")


def test_a_file_in_the_cache_that_is_damaged_or_of_another_source_is_made_anew(server: Server, path: Path) -> None:
    right = pretrained_file("imagenet").read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    assert pretrained_file("imagenet").read_bytes() == right
    assert server.ranges == [None] * 2
    PRETRAINED["imagenet"] = Source(PRETRAINED["imagenet"].url, "00000000")  # the fixture restores it
    with pytest.raises(DownloadError, match="wrong file"):
        pretrained_file("imagenet")
    assert path.read_bytes() == right


def test_a_download_that_was_cut_off_is_resumed(server: Server, original: bytes, path: Path) -> None:
    server.answer = half
    with pytest.raises(DownloadError, match="cut off after"):
        pretrained_file("imagenet")
    assert not path.exists()
    server.answer = rest
    flax_googlenet.load(pretrained_file("imagenet"))
    assert server.ranges == [None, f"bytes={len(original) // 2}-"]


def test_a_file_with_another_hash_is_refused_and_nothing_is_kept(server: Server, cache: Path) -> None:
    server.content = b"something else"
    with pytest.raises(DownloadError, match="wrong file: its sha256 is "):
        pretrained_file("imagenet")
    assert contents(cache) == set()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_message_says_what_to_put_where(
    original: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = (
        f"no connection: .*; without a network connection, put {NAME} at {cache / NAME} and run this again, or set"
    )
    with pytest.raises(DownloadError, match=message):
        flax_googlenet.pretrained("imagenet")
    assert contents(cache) == set()
    (cache / NAME).write_bytes(original)
    with pytest.raises(DownloadError, match=re.escape(f"the file at {cache / NAME} is damaged")):
        flax_googlenet.pretrained("imagenet")

    digest = hashlib.sha256(original).hexdigest()
    monkeypatch.setitem(PRETRAINED, "imagenet", PRETRAINED["imagenet"]._replace(sha256=digest))
    flax_googlenet.load(pretrained_file("imagenet"))
    assert contents(cache) == {"googlenet-imagenet.safetensors"}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("form", ["{folder}", "file://{folder}/", "{url}", "{cache}"])
def test_a_mirror_is_a_folder_or_a_url_of_one(
    form: str, original: bytes, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(original).hexdigest()
    monkeypatch.setitem(PRETRAINED, "imagenet", PRETRAINED["imagenet"]._replace(sha256=digest))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = cache if form == "{cache}" else tmp_path / "mirror"
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_bytes(original)
    paths: list[str] = []
    with serve(original) as server:
        server.answer = lambda handler: (paths.append(handler.path), rest(handler))
        mirror = form.format(folder=folder, cache=cache, url=server.url.removesuffix("/model.pth"))
        monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", mirror)
        flax_googlenet.load(pretrained_file("imagenet"))
    assert paths == ([f"/{NAME}"] if "url" in form else [])
    assert contents(cache) - contents(folder) <= {"googlenet-imagenet.safetensors"}
    assert (folder / NAME).read_bytes() == original
    # Not the mirror: files of the same weights are the same bytes everywhere.
    assert flax_googlenet.load_metadata(cache / "googlenet-imagenet.safetensors")["source"] == reference.IMAGENET.url


def test_a_mirror_without_the_file_or_with_another_one_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", str(tmp_path))
    missing = f"cannot read {tmp_path / NAME}: No such file or directory; set FLAX_GOOGLENET_MIRROR to"
    with pytest.raises(DownloadError, match=missing):
        flax_googlenet.pretrained("imagenet")
    (tmp_path / NAME).write_bytes(b"something else")
    with pytest.raises(DownloadError, match=f"{tmp_path / NAME}: wrong file: its sha256 is "):
        flax_googlenet.pretrained("imagenet")
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", "ftp://127.0.0.1")
    with pytest.raises(DownloadError, match="only http and https URLs can be downloaded"):
        flax_googlenet.pretrained("imagenet")
    assert contents(cache) == set()


@pytest.mark.parametrize("url", ["file://data/weights", "file://[data", "file:///data/%00"])
def test_a_file_url_that_is_no_path_of_this_machine_is_an_error_with_the_way_out(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", url)
    with pytest.raises(DownloadError) as caught:
        flax_googlenet.pretrained("imagenet")
    assert "data" in str(caught.value)
    assert "FLAX_GOOGLENET_MIRROR" in str(caught.value)
    assert "\0" not in str(caught.value)
    assert contents(cache) == set()


def test_a_training_takes_pretrained_weights_by_their_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", str(tmp_path))
    with pytest.raises(DownloadError, match=f"cannot read {tmp_path / NAME}"):
        flax_googlenet.training.train("digits", tmp_path / "run", weights="imagenet")
    assert not (tmp_path / "run").exists()
    assert contents(cache) == set()


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="there are no pretrained weights 'imagenet21k': the names are 'imagenet'"):
        flax_googlenet.pretrained("imagenet21k")


def test_the_cache_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAX_GOOGLENET_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", str(tmp_path))
    for folder in (tmp_path / ".cache", tmp_path / "xdg"):
        with pytest.raises(DownloadError, match="cannot read"):
            flax_googlenet.pretrained("imagenet")
        assert contents(folder / "flax-googlenet") == set()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(DownloadError, match="this user has no home folder for a cache: set FLAX_GOOGLENET_CACHE"):
        flax_googlenet.pretrained("imagenet")


def test_a_tilde_in_the_names_of_the_cache_and_the_mirror_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLAX_GOOGLENET_CACHE", "~/cache")
    monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", "~/mirror")
    with pytest.raises(DownloadError) as caught:
        flax_googlenet.pretrained("imagenet")
    assert str(tmp_path / "home" / "mirror" / NAME) in str(caught.value)
    assert contents(tmp_path / "home" / "cache") == set()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_full_disk_leaves_nothing_broken_and_the_download_is_resumed(
    server: Server, original: bytes, path: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = (
        f"cannot keep the weights 'imagenet' in {cache}: File too large; make room there, or set FLAX_GOOGLENET_CACHE"
    )
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, hard))  # as on a full disk, the system refuses more bytes
        with pytest.raises(DownloadError, match=re.escape(message)):
            pretrained_file("imagenet")
        assert contents(cache) == {f"{NAME}.partial"}
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (tmp_path / NAME).write_bytes(original)
        monkeypatch.setenv("FLAX_GOOGLENET_MIRROR", str(tmp_path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, hard))
        with pytest.raises(DownloadError, match=re.escape(message)):  # while the converted file is written
            pretrained_file("imagenet")
        assert contents(cache) == {f"{NAME}.partial"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.delenv("FLAX_GOOGLENET_MIRROR")
    (cache / f".{path.name}.0123abcd.tmp").write_bytes(b"left by a process that was killed")
    flax_googlenet.load(pretrained_file("imagenet"))
    assert server.ranges[0] is None
    assert server.ranges[1] is not None
    assert contents(cache) == {path.name}


WAITS = "another process is downloading the weights 'imagenet': waiting for it"


@pytest.mark.slow
def test_one_process_downloads_and_another_that_waits_takes_over_if_it_is_killed(server: Server, path: Path) -> None:
    server.answer = server.stall
    first = Process()
    first.wait_for(str(len(server.content) // 2))
    others = [Process(), Process()]
    for other in others:
        other.wait_for(WAITS)
    assert server.ranges == [None]
    assert not path.exists()
    server.answer = rest
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    assert [other.end() for other in others] == [0, 0], [other.lines for other in others]
    assert len(server.ranges) == 2  # the third process found the file that the second one had made
    assert server.ranges[1] is not None  # and that one continued where the first had stopped
    flax_googlenet.load(path)


@pytest.mark.slow
def test_a_kill_during_the_conversion_leaves_the_right_file_or_none(server: Server, path: Path) -> None:
    rng = random.Random(0)
    for _ in range(3):
        shutil.rmtree(path.parent, ignore_errors=True)
        process = Process()
        process.wait_for(str(len(server.content)))
        time.sleep(rng.uniform(0, 2))  # the conversion takes about 2 seconds
        process.end(signal.SIGKILL)
        if path.exists():
            flax_googlenet.load(path)
    flax_googlenet.load(pretrained_file("imagenet"))
    assert len(server.ranges) == 3  # the last call needed no download, whenever the kill came
