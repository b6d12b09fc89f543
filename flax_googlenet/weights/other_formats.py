"""Recognises files and folders without a state dict, and says what each of them is and what to do with it."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from flax_googlenet.weights.pickles import StateDictError

_OTHER_READERS = {
    ".caffemodel": ("from_caffe(path)", "a file of Caffe"),
    ".pb": ("from_tensorflow(path)", "a graph of TensorFlow"),
    ".onnx": ("from_onnx(path)", "a GoogLeNet of ONNX's model zoo"),
}
"""Suffix of a name -> the call that reads such a file, and what it is."""

_WEIGHTS = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors", *_OTHER_READERS)


def who_reads(path: str | os.PathLike[str]) -> str:
    """Return a clause: which call reads a file, by the suffix of its name. Without one of these, it is PyTorch's."""
    pytorch = "from_torchvision(flax_googlenet.read_state_dict(path))", "a PyTorch checkpoint"
    call, what = _OTHER_READERS.get(Path(path).suffix.lower(), pytorch)
    return f"flax_googlenet.{call} reads {what}"


def is_for_another_reader(path: str | os.PathLike[str], suffix: str = "") -> bool:
    """Return whether a name says that neither PyTorch nor the reader of files with ``suffix`` can read the file."""
    found = Path(path).suffix.lower()
    return found in _OTHER_READERS and found != suffix


def refuse_other_files(head: bytes) -> None:
    """Raise StateDictError if a file that begins with ``head`` is known not to hold a state dict."""
    if re.match(rb"\s*<(!doctype|\?xml|html|head|body)", head.lower()):
        raise StateDictError("this is a web page, not a checkpoint: download the file itself")
    if re.match(rb"\x08.\x12.(flax-googlenet|pytorch)", head, re.DOTALL):
        raise StateDictError(
            "this is an ONNX model, which ONNX Runtime and OpenVINO run: give the weights from which it was exported"
        )
    if head.startswith(b"\x08\x01\x12"):
        raise StateDictError("this is a SavedModel of TensorFlow: freeze its graph, and give the .pb of the GraphDef")
    if head.startswith(b"version https://git-lfs"):
        raise StateDictError("this is a Git LFS pointer, not the checkpoint: run `git lfs pull`")
    if head.startswith(b"\x1f\x8b"):
        raise StateDictError("this is compressed by gzip: unpack it first, with tar xzf or gunzip")
    if head[257:262] == b"ustar":
        raise StateDictError("this is a tar archive: unpack it first, with tar xf")


def refuse_other_zips(names: Sequence[str]) -> None:
    """Raise StateDictError if a zip with these entries is of another format, which may be compressed."""
    if any("/code/" in name for name in names):
        raise StateDictError("this is a TorchScript program, not a state dict: save model.state_dict() instead")
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        raise StateDictError("this is a program of torch.export, not a state dict: save model.state_dict() instead")
    if any(name.endswith(".npy") for name in names):
        raise StateDictError(
            "this is a .npz of NumPy arrays: write them with safetensors.numpy.save_file(dict(numpy.load(FILE)), "
            '"FILE.safetensors") and give that file'
        )
    if inner := [name for name in names if name.endswith(_WEIGHTS)]:
        raise StateDictError(f"this is an archive that holds {inner[0][:200]}: unpack it first, with unzip")


def folder_advice(path: Path) -> str:
    """Return the end of a message about a folder that was given instead of a file: what it is and what to do."""
    if not os.access(path, os.R_OK | os.X_OK):
        return ""
    names = sorted(entry.name for entry in path.iterdir())
    for archive in (path, *(path / name for name in names)):
        if os.path.isfile(archive / "data.pkl"):  # false where Path.is_file raises, as in a folder of another user
            parent, name = archive.resolve().parent, archive.resolve().name
            return f": it is an unpacked .pth: pack it again with (cd {parent} && zip -0 -r {name}.pth {name})"
    if ".metadata" in names:
        script = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        return f": it is a checkpoint of torch.distributed: convert it to a file with {script} {path} FILE.pth"
    if any(re.search(r"-\d+-of-\d+\.", name) for name in names):
        return (
            ": its weights are in several files: read each with flax_googlenet.read_state_dict and merge the dicts, "
            "or save the model's state_dict() with torch.save"
        )
    files = [str(path / name) for name in names if name.endswith(_WEIGHTS)]
    return f": give the file in it: {' or '.join(files[:3])}" if files else ""
