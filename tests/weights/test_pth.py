"""Untrusted files: each is refused with one line that names it, or read bit for bit."""

import argparse
import collections
import datetime
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import safetensors.torch
import torch
import torchvision

from flax_googlenet import StateDictError, read_state_dict
from flax_googlenet.weights import pth
from flax_googlenet.weights.pickles import MAX_PICKLE_BYTES

Tensors = dict[str, torch.Tensor]

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, pickled


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Without auxiliary heads: half the bytes."""
    return {k: x for k, x in reference.random_checkpoint(num_classes=3).items() if not k.startswith("aux")}


@pytest.fixture(scope="module")
def zipped(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zipped") / "model.pth"
    torch.save(tensors, path)
    return path


def same(state_dict: dict[str, np.ndarray], tensors: Tensors) -> bool:
    return state_dict.keys() == tensors.keys() and all(
        state_dict[key].tobytes() == tensor.numpy().tobytes() for key, tensor in tensors.items()
    )


def refusal(path: Path, key: str | None = None) -> str:
    """Return the message without the name of the file, with which it must begin."""
    with pytest.raises(StateDictError) as caught:
        pth.read(path, key)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_a_zip_is_read_bit_for_bit(tensors: Tensors, zipped: Path) -> None:
    assert same(pth.read(zipped).state_dict, tensors)


def test_the_legacy_format_is_read_bit_for_bit(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "legacy.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert same(pth.read(path).state_dict, tensors)


def test_safetensors_is_read_bit_for_bit(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert same(pth.read(path).state_dict, tensors)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bfloat16_is_read_bit_for_bit(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    tensors = {"fc.bias": torch.randn(5).bfloat16()}
    torch.save(tensors, path) if suffix == ".pth" else safetensors.torch.save_file(tensors, path)
    array = pth.read(path).state_dict["fc.bias"]
    assert array.dtype.name == "bfloat16"
    assert array.astype(np.float32).tobytes() == tensors["fc.bias"].float().numpy().tobytes()


@pytest.fixture(scope="module")
def training_checkpoint(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint like those of torchvision's training script."""
    path = tmp_path_factory.mktemp("training") / "checkpoint.pth"
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    average = torch.optim.swa_utils.AveragedModel(torchvision.models.googlenet(weights=None, init_weights=False))
    content = {
        "model": {f"module.{key}": tensor for key, tensor in tensors.items()},
        "model_ema": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, data_path="/data", amp=False),
    }
    torch.save(content, path)
    return path


def test_a_training_checkpoint_gives_its_model_and_a_note_on_the_other(
    tensors: Tensors, training_checkpoint: Path
) -> None:
    checkpoint = pth.read(training_checkpoint)
    assert same(checkpoint.state_dict, tensors)
    assert checkpoint.notes == ["took 'model'; the file's other weights have the key model_ema"]


def test_key_chooses_the_averaged_model(training_checkpoint: Path) -> None:
    checkpoint = pth.read(training_checkpoint, "model_ema")
    assert len(checkpoint.state_dict) == 364
    assert "n_averaged" not in checkpoint.state_dict
    assert checkpoint.state_dict["fc.bias"].shape == (1000,)


def test_a_key_that_is_not_there_is_refused_with_the_keys_found(training_checkpoint: Path) -> None:
    for key in ("ema", "epoch"):
        assert refusal(training_checkpoint, key) == (
            f"there is no state dict under the key {key}; the keys found: model, model_ema, optimizer, lr_scheduler, "
            "epoch, args"
        )


def beside(tensors: Tensors) -> dict[str, Any]:
    """What people save beside the weights: none of it is a tensor of the network."""
    return {
        "model_state_dict": tensors,
        "loss": torch.tensor(0.4),
        "best": np.float64(0.93),
        "losses": np.array([0.3]),
        "args": argparse.Namespace(data=Path("/data"), lr=0.1),
        "history": collections.defaultdict(list, {"top1": [0.5]}),
        "last_losses": collections.deque([0.4, 0.3], maxlen=2),
        "time": datetime.datetime(2026, 1, 1),
        "optimizer_state_dict": {"momentum": dict(tensors)},
    }


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_people_save_beside_the_weights_is_ignored(is_zip: bool, tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(beside(tensors), path, _use_new_zipfile_serialization=is_zip)
    checkpoint = pth.read(path)
    assert same(checkpoint.state_dict, tensors)
    assert checkpoint.notes == []


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.bin", "model"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_is_known_by_its_content_not_by_its_name(name: str, kind: str, tensors: Tensors, tmp_path: Path) -> None:
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=kind == "zip")
    assert same(pth.read(tmp_path / name).state_dict, tensors)


def test_arrays_own_their_memory_and_can_be_written(zipped: Path) -> None:
    arrays = pth.read(zipped).state_dict
    before = arrays["fc.weight"].copy()
    arrays["fc.bias"] += 1
    assert np.array_equal(arrays["fc.weight"], before)


def test_a_prefix_and_other_networks_are_said_in_warnings(tensors: Tensors, tmp_path: Path) -> None:
    averaged = {f"module.{name}": tensor + 1 for name, tensor in tensors.items()}
    torch.save({"net": tensors, "ema": averaged}, path := tmp_path / "two.pth")
    with pytest.warns(UserWarning, match="key ema"):
        assert same(read_state_dict(path), tensors)
    assert same(read_state_dict(path, "ema"), {name: tensor + 1 for name, tensor in tensors.items()})


def exploding(depth: int) -> Any:
    """Return a tuple of the same tuple twice, and so on, which takes forever to hash or to print."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


def legacy_file(content: bytes, keys: Any, values: bytes) -> bytes:
    head = pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    return LEGACY_MAGIC + head + content + pickle.dumps(keys, 2) + values


def test_a_legacy_file_with_views_of_storages_and_the_dicts_of_python_2_is_read(tmp_path: Path) -> None:
    """Versions of PyTorch before 0.4, on Python 2, wrote both; the bytes are put together here."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    view = b"(" + text("7") + b"K\2K\3t"  # 3 numbers from the third on
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("5") + text("cuda:0") + b"K\6" + view + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\1K\2\x85K\1\x85tR"  # 2 of them from the second on
    content = b"\x80\2ccollections\nOrderedDict\n](](" + text("fc.bias") + tensor + b"ee\x85R."
    values = np.arange(6, dtype=np.float32)
    path = tmp_path / "old.pth"
    path.write_bytes(legacy_file(content, ["5"], (6).to_bytes(8, "little") + values.tobytes()))
    assert pth.read(path).state_dict["fc.bias"].tolist() == [3, 4]
    path.write_bytes(legacy_file(content, ["5"], (5).to_bytes(8, "little") + values.tobytes()))
    assert "another size" in refusal(path)
    path.write_bytes(legacy_file(content, [], b""))
    assert "fc.bias claims (2,)" in refusal(path)
    for keys in (["6"], "5", {"5": 6}, [exploding(100)], exploding(100)):
        path.write_bytes(legacy_file(content, keys, bytes(100)))
        assert "damaged" in refusal(path)


def test_values_of_a_big_endian_machine_are_swapped(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.5, -2.0]), "b": torch.tensor([3, 4], dtype=torch.int16), "c": torch.tensor(1j)}
    torch.save(tensors, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path := tmp_path / "big.pth", "w") as target:
        for name in source.namelist():
            entry = source.read(name)
            if name.startswith("archive/data/"):
                entry = np.frombuffer(entry, {"0": "f4", "1": "i2", "2": "f4"}[name[-1]]).byteswap().tobytes()
            target.writestr(name, b"big" if name == "archive/byteorder" else entry)
    assert same(pth.read(path).state_dict, tensors)


# Files that are not checkpoints, and hostile ones.


class Gadget:
    """Creates a file when it is unpickled by a loader that trusts it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_gadget_is_not_run(is_zip: bool, tensors: Tensors, tmp_path: Path) -> None:
    path, trap = tmp_path / "gadget.pth", tmp_path / "trap"
    torch.save({**tensors, "fc.bias": Gadget(trap)}, path, _use_new_zipfile_serialization=is_zip)
    assert refusal(path) == ("it needs posix.mkdir, and only plain tensors are loaded: save model.state_dict() instead")
    assert not trap.exists()
    torch.load(path, weights_only=False)  # the gadget works
    assert trap.exists()


def test_a_number_in_a_pickle_fills_no_memory(tmp_path: Path) -> None:
    class Zeros:
        def __reduce__(self) -> Any:
            return bytearray, (200_000_000,)

    torch.save({"fc.bias": Zeros()}, path := tmp_path / "zeros.pth")
    assert refusal(path) == (
        "it needs builtins.bytearray, and only plain tensors are loaded: save model.state_dict() instead"
    )


def test_a_class_whose_name_no_class_can_have_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(path := tmp_path / "nul.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02ca\0b\nC\n)\x81.")
    assert refusal(path).startswith("the file is damaged or cut off (")


def test_a_plain_pickle_is_not_even_opened(tmp_path: Path) -> None:
    path, trap = tmp_path / "gadget.pth", tmp_path / "trap"
    path.write_bytes(pickle.dumps(Gadget(trap)))
    assert refusal(path).startswith("this is a pickle, not a file from torch.save")
    assert not trap.exists()


def test_a_whole_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(torchvision.models.googlenet(weights=None, init_weights=False), path)
    assert refusal(path) == (
        "it needs torchvision.models.googlenet.GoogLeNet, and only plain tensors are loaded: "
        "save model.state_dict() instead"
    )


def memory_growth(path: Path) -> int:
    """Return by how many bytes the memory of a new process grows at most while it reads a file or refuses it."""
    code = """
import pathlib, re, sys
from flax_googlenet.weights import pth
def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = memory("VmRSS")
try:
    checkpoint = pth.read(sys.argv[1])
except pth.StateDictError:
    pass
print(memory("VmHWM") - before)
"""
    command = [sys.executable, "-c", code, str(path)]
    return 1024 * int(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("is_zip", [True, False])
def test_reading_a_googlenet_takes_less_memory_than_twice_the_file(is_zip: bool, tmp_path: Path) -> None:
    tensors = reference.random_checkpoint()
    torch.save({"model": tensors}, path := tmp_path / "model.pth", _use_new_zipfile_serialization=is_zip)
    size = path.stat().st_size
    assert size < memory_growth(path) < 1.3 * size  # measured: 1.02
    averaged = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "ema": averaged}, path, _use_new_zipfile_serialization=is_zip)
    assert memory_growth(path) < 1.3 * size  # what is not needed is not kept


@pytest.mark.slow
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as entry,
    ):
        for _ in range(1024):
            entry.write(bytes(2**20))
    assert "compressed entries, which torch.save never writes: a zip bomb?" in refusal(path)
    assert memory_growth(path) < 100e6


@pytest.mark.slow
def test_a_zip_of_overlapping_entries_is_refused(tmp_path: Path) -> None:
    """A zip bomb without compression: many entries of the directory share one place in the file."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(2**22))
        first = archive.infolist()[0]
        archive.filelist += [first] * 1000
    assert "claim more bytes than the file has: a zip bomb?" in refusal(path)
    assert memory_growth(path) < 100e6


@pytest.mark.slow
@pytest.mark.parametrize("size", [(5,), (10**12,), (1000, 1000, 1000, 1000)])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_stride_of_0_is_refused_before_any_copy(
    size: tuple[int, ...], is_zip: bool, tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "strides.pth"
    torch.save({**tensors, "fc.bias": torch.zeros(1).expand(size)}, path, _use_new_zipfile_serialization=is_zip)
    advice = "call contiguous() before saving if it was expanded"
    assert refusal(path) == f"fc.bias claims {size}, more than the bytes stored for it: {advice}"


def test_a_stride_of_0_fills_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "strides.pth"
    torch.save({"fc.bias": torch.zeros(1).expand(2_500_000_000)}, path)  # 10 GB, were it copied
    assert memory_growth(path) < 100e6


class Storage:
    """Stands for the storage of a tensor in a pickle, and claims to hold ``numel`` numbers."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


class View:
    def __init__(self, storage: Storage, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.arguments = (storage, 0, size, stride, False, collections.OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Forger(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", obj.numel) if isinstance(obj, Storage) else None


def forged_pickle(view: View) -> bytes:
    buffer = io.BytesIO()
    Forger(buffer, 2).dump({"fc.bias": view})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("numel", "size"), [(16, (400, 4)), (1600, (1600,)), (10**12, (4,)), (16, (10**12,)), (16, (2_500_000_000,))]
)
def test_a_zip_whose_tensors_are_larger_than_their_bytes_is_refused(
    numel: int, size: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "forged.pth"
    view = View(Storage(numel), size, tuple(int(np.prod(size[i + 1 :])) for i in range(len(size))))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", forged_pickle(view))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(64))
        archive.writestr("archive/version", "3\n")
    refusal(path)


@pytest.mark.slow
@pytest.mark.parametrize(("numel", "size"), [(16, (400,)), (10**9, (10**9,)), (10**13, (4,)), (16, (2_500_000_000,))])
def test_a_legacy_file_whose_tensors_are_larger_than_its_bytes_is_refused(
    numel: int, size: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "forged.pth"
    head = pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    forged = forged_pickle(View(Storage(numel), size, (1,)))
    # The list of storages that follow is empty, so nothing would ever fill this one.
    path.write_bytes(LEGACY_MAGIC + head + forged + pickle.dumps([], 2) + bytes(64))
    refusal(path)
    if numel * 4 == 4e9:  # the one that PyTorch would allocate
        assert memory_growth(path) < 100e6


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_out_of_all_proportion_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "lists.pth"
    text = pickle.dumps("x" * MAX_PICKLE_BYTES, 2)
    if legacy:
        path.write_bytes(LEGACY_MAGIC + text)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", text)
    assert refusal(path) == "its pickle has more than 4,194,304 bytes, too many for a list of tensors"


class Config(dict[str, float]):
    """A configuration, as people save it beside the weights."""


def test_an_object_of_an_unknown_class_beside_the_weights_is_named_and_left_out(
    tensors: Tensors, tmp_path: Path
) -> None:
    torch.save({"model": tensors, "args": Config(lr=0.1)}, path := tmp_path / "config.pth")
    checkpoint = pth.read(path)
    assert same(checkpoint.state_dict, tensors)
    assert f"{Config.__module__}.Config" in checkpoint.notes[-1]
    with pytest.warns(UserWarning, match="Config"):
        assert same(read_state_dict(path), tensors)


def sparse(tensors: Tensors) -> Any:
    return {**tensors, "fc.bias": torch.eye(3).to_sparse()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sparse, "fc.bias is not a plain tensor"),
        (lambda t: {**t, "fc.bias": torch.zeros(3, device="meta")}, "fc.bias is not a plain tensor"),
        (lambda t: {**t, "fc.bias": "text"}, "fc.bias is not a plain tensor"),
        (
            lambda t: {**t, "fc.bias": torch.zeros(3).to(torch.float8_e5m2)},
            "fc.bias is not a plain tensor: it is of the dtype torch.float8_e5m2",
        ),
        (lambda t: list(t.values()), "it holds a list, not a state dict"),
        (lambda t: t["fc.bias"], "it holds a Tensor, not a state dict"),
        (lambda t: {}, "no state dict found; the keys found: none"),
    ],
    ids=["sparse", "meta", "text", "float8", "list", "tensor", "nothing"],
)
def test_other_contents_are_refused(
    make: Callable[[Tensors], Any], message: str, tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(make(tensors), path)
    assert refusal(path).startswith(message)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("empty.pth", b"", "the file is empty"),
        (
            "page.pth",
            b"\n<!DOCTYPE html><title>Sign in</title>",
            "this is a web page, not a checkpoint: download the fi",
        ),
        ("page.safetensors", b"<html>", "this is a web page"),
        (
            "pointer.pth",
            b"version https://git-lfs.github.com/spec/v1\n",
            "this is a Git LFS pointer, not the checkpoint",
        ),
        ("noise.pth", b"\x93NUMPY" * 20, "this is neither a file from torch.save nor a .safetensors"),
        ("noise.safetensors", b"\x93NUMPY" * 20, "the file is damaged or cut off"),
        ("short.safetensors", b"\0", "the file is damaged or cut off"),
        ("torchscript.pth", "model/code/__torch__.py", "this is a TorchScript program, not a state dict"),
        ("exported.pt2", "model/archive_format", "this is a program of torch.export, not a state dict"),
        ("weights.npz", "fc.bias.npy", "this is a .npz of NumPy arrays: write them with"),
        ("weights.zip", "plain.pth", "this is an archive that holds plain.pth: unpack it first"),
        ("plain.tar.gz", b"\x1f\x8b\x08", "this is compressed by gzip: unpack it first"),
        ("plain.tar", bytes(257) + b"ustar", "this is a tar archive: unpack it first"),
        (
            "data.pkl",
            b"\x80\x02}",
            "this is a pickle, not a file from torch.save; if it is the data.pkl",
        ),
    ],
)
def test_other_files_are_refused(name: str, contents: bytes | str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(contents, str):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(contents, bytes(100))
    else:
        path.write_bytes(contents)
    assert refusal(path).startswith(message)


def test_a_port_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "port.safetensors"
    safetensors.torch.save_file({"params/fc/bias": torch.zeros(3)}, path)
    assert "flax_googlenet.load reads" in refusal(path)
    assert "--to-torchvision" in refusal(path)


def test_a_folder_is_named_for_what_it_is_with_the_step_that_helps(
    tensors: Tensors, zipped: Path, tmp_path: Path
) -> None:
    def advice(folder: Path) -> str:
        with pytest.raises(StateDictError) as caught:
            pth.read(folder)
        assert str(folder) in str(caught.value)
        return str(caught.value)

    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path / "unpacked")
    root = next((tmp_path / "unpacked").iterdir())
    for folder in (tmp_path / "unpacked", root):
        assert f"(cd {root.parent} && zip -0 -r {root.name}.pth {root.name})" in advice(folder)
    with zipfile.ZipFile(path := tmp_path / "packed.pth", "w") as archive:  # what the command does
        for entry in [root, *sorted(root.rglob("*"))]:
            archive.write(entry, entry.relative_to(root.parent))
    assert same(pth.read(path).state_dict, tensors)

    (folder := tmp_path / "sharded").mkdir()
    (folder / ".metadata").touch()
    assert "dcp_to_torch" in advice(folder)
    (folder := tmp_path / "hub").mkdir()
    (folder / "pytorch_model.bin").touch()
    assert f"give the file in it: {folder / 'pytorch_model.bin'}" in advice(folder)
    (zoo := tmp_path / "googlenet").mkdir()
    (zoo / "model.onnx").touch()
    assert f"give the file in it: {zoo / 'model.onnx'}" in advice(zoo)
    (folder / "model-00001-of-00002.safetensors").touch()
    assert "several files" in advice(folder)


def test_a_folder_in_which_not_every_path_can_be_looked_up_is_named_all_the_same(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_PATH_MAX") - 1
    folder = tmp_path
    while longest - len(str(folder)) > 260:
        folder = folder / ("d" * 200)
    folder = folder / ("d" * (longest - len(str(folder)) - 12))
    folder.mkdir(parents=True)
    (folder / "model.pth").touch()  # data.pkl in it, where an unpacked archive would have one, has too long a path
    with pytest.raises(StateDictError, match=r"give the file in it: .*/model\.pth"):
        pth.read(folder)


def test_a_model_is_named_rather_than_what_is_beside_it(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=0.1), "model": torch.nn.Linear(1, 1)}, path := tmp_path / "whole.pth")
    assert refusal(path).startswith("it needs torch.nn.modules.linear.Linear, ")


@pytest.mark.parametrize(
    "header",
    [
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"fc.bias": 3}',
        b'{"fc.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"fc.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"fc.bias": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"fc.bias": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"fc.bias": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"fc.bias": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}',
        b'{"fc.bias": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
        b'{"fc.bias": {"dtype": "F32", "shape": [0, 9223372036854775807, 9], "data_offsets": [0, 0]}}',
        b'{"fc.bias": {"dtype": "F32", "shape": [' + b"9," * 100_000 + b'9], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"fc.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"fc.bias": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"' + b"x" * 4_000_000 + b'": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
    ids=range(15),
)
def test_a_hostile_safetensors_is_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert len(refusal(path)) < 400


def test_a_zip_with_a_huge_directory_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(path := tmp_path / "many.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        entry = archive.infolist()[0]
        archive.filelist += [entry] * 100_000
    assert "directory of the zip" in refusal(path)


def test_entries_of_a_zip_that_share_a_place_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(8), "b": torch.zeros(1000)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path := tmp_path / "shared.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        first, second = target.getinfo("archive/data.pkl"), target.getinfo("archive/version")
        second.header_offset, second.CRC, second.file_size = first.header_offset, first.CRC, first.file_size
        second.compress_size = first.compress_size
    assert "two of its parts are in one place" in refusal(path)


def test_a_file_above_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    with path.open("wb") as file:
        file.truncate(10**12)
    assert refusal(path) == "the file has 1,000,000,000,000 bytes, and no GoogLeNet has more than 1,073,741,824"


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_truncated_file_is_refused(is_zip: bool, tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    rng = random.Random(0)
    for length in [30, 1000, 50_000, len(data) - 1, *(rng.randrange(100, len(data)) for _ in range(10))]:
        path.write_bytes(data[:length])
        assert "is damaged or cut off" in refusal(path)


@pytest.mark.slow
def test_200_flipped_bits_in_a_zip_are_refused_or_change_nothing(
    tensors: Tensors, zipped: Path, tmp_path: Path
) -> None:
    data = zipped.read_bytes()
    path = tmp_path / "flipped.pth"
    rng = random.Random(0)
    # Half of them in the structure: the beginning with the pickle, and the directory at the end.
    structure = [*range(70_000), *range(len(data) - 40_000, len(data))]
    positions = [rng.randrange(len(data)) for _ in range(100)] + rng.choices(structure, k=100)
    refused = 0
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(pth.read(path).state_dict, tensors), position
        except StateDictError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 150  # most bits carry weights


@pytest.mark.slow
def test_flipped_bits_in_a_legacy_file_never_end_in_anything_but_tensors_or_a_refusal(
    tensors: Tensors, tmp_path: Path
) -> None:
    """This format has no checksum, so a flipped weight goes unnoticed, but nothing worse may happen."""
    path = tmp_path / "legacy.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(40):
        flipped = bytearray(data)
        flipped[rng.randrange(60_000)] ^= 1 << rng.randrange(8)  # the pickles
        path.write_bytes(flipped)
        try:
            pth.read(path)
        except StateDictError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 10
