"""The command as a person runs it: ports in both directions, refusals and diagnoses, with real files and processes."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
import port_weights
import pytest
import reference
import torch
import torchvision
from flax import linen as nn
from inputs import read_class_names
from jax import numpy as jnp
from process import InputError

import flax_googlenet
import flax_googlenet.model
from flax_googlenet import CheckpointError, GoogLeNet, GoogLeNetError
from flax_googlenet.weights import torchvision as torchvision_map

SCRIPT = Path(port_weights.__file__)


def command(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with an empty PyTorch cache."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return folder


@pytest.fixture(scope="module")
def ported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("ported")
    return folder, command("random", "--report", "report.html", cwd=folder)


@pytest.mark.slow
def test_random_is_ported_proven_and_written(ported: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = ported
    assert (process.returncode, process.stderr) == (0, "")
    assert "Proven: all 20 stages agree." in process.stdout
    assert "model, variables = flax_googlenet.load('googlenet-random.safetensors')" in process.stdout
    assert process.stdout.count(" ok ") == 20
    assert sorted(path.name for path in folder.iterdir()) == ["googlenet-random.safetensors", "report.html"]

    path = folder / "googlenet-random.safetensors"
    model, variables = flax_googlenet.load(path)
    assert model == GoogLeNet()
    state_dict = {key: tensor.numpy() for key, tensor in reference.random_checkpoint().items()}
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, flax_googlenet.from_torchvision(state_dict)))
    metadata = flax_googlenet.load_metadata(path)
    assert metadata["source"] == "random"
    assert metadata["class_names"] is None
    assert metadata["versions"]["torch"] == torch.__version__.split("+")[0]
    assert next(iter(metadata["parity"])) == "conv1"
    assert all(errors["float64"] < 1e-12 for errors in metadata["parity"].values())
    assert "device" not in metadata


@pytest.mark.slow
def test_the_report_shows_the_same_run(ported: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = ported
    page = (folder / "report.html").read_text()
    assert hashlib.sha256((folder / "googlenet-random.safetensors").read_bytes()).hexdigest() in page
    assert torch.__version__.split("+")[0] in page
    assert all(name in page for name in flax_googlenet.load_metadata(folder / "googlenet-random.safetensors")["parity"])


@pytest.mark.slow
def test_the_way_back_gives_a_checkpoint_that_torchvision_loads(
    ported: tuple[Path, subprocess.CompletedProcess[str]], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = ported
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii", write_through=True))
    assert port_weights.main([str(folder / "googlenet-random.safetensors"), "--to-torchvision", "zurück.pth"]) == 0
    shown = screen.getvalue()
    assert rb"load_state_dict(torch.load('zur\xfcck.pth'))" in shown
    assert rb"zur\xfcck.pth holds names and tensors only. It lacks:" in shown
    for name in (b"class names", b"image size", b"transform_input", b"dropout", b"computation", b"other metadata"):
        assert b" " + name + b" " in shown
    state_dict = torch.load(here / "zurück.pth")
    expected = reference.random_checkpoint()
    assert state_dict.keys() == expected.keys()
    for key, tensor in expected.items():
        assert key.endswith("num_batches_tracked") or torch.equal(state_dict[key], tensor), key
    torchvision.models.googlenet(weights=None, init_weights=False).load_state_dict(state_dict, strict=True)


@pytest.mark.slow
def test_a_training_checkpoint_is_ported_with_its_key_and_the_result_printed_as_json(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = reference.random_checkpoint(num_classes=4, seed=1)
    doubles = {key: tensor.double() for key, tensor in tensors.items()}
    doubles["aux1.fc2.bias"] = torch.zeros(1000).double()  # forgotten when the last layer was replaced
    averaged = {"n_averaged": torch.tensor(2), **{f"module.{key}": tensor for key, tensor in doubles.items()}}
    torch.save({"model": tensors, "model_ema": averaged, "epoch": 9}, "checkpoint.pth")
    Path("names.txt").write_text("daisy\nrose\ntulip\ncaf\N{LATIN SMALL LETTER E WITH ACUTE}\n")
    options = ["checkpoint.pth", "--key", "model_ema", "--transform-input", "--output", "ema.safetensors", "--json"]
    assert refused(["checkpoint.pth", "--key", "model_ema"], capsys) == (
        4,
        "checkpoint.pth: not the weights of a GoogLeNet: 1 wrong shape (aux1.fc2.bias (1000,), expected (4,)); "
        "only the auxiliary heads are wrong: --without-aux leaves them out",
    )
    options += ["--without-aux", "--class-names", "names.txt", "--device", "cpu"]
    assert port_weights.main(options) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result["status"] == 0
    assert result["source_sha256"] == hashlib.sha256(Path("checkpoint.pth").read_bytes()).hexdigest()
    assert result["output_sha256"] == hashlib.sha256(Path("ema.safetensors").read_bytes()).hexdigest()
    metadata = flax_googlenet.load_metadata("ema.safetensors")
    assert result["parity"].keys() == metadata["parity"].keys()
    assert not {"aux1", "aux2"} & result["parity"].keys()
    assert result["device"] == metadata["device"] == "cpu"
    assert all(errors["device32"] == errors["flax32"] for errors in result["parity"].values())  # the same device
    assert metadata["class_names"] == ["daisy", "rose", "tulip", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
    model, variables = flax_googlenet.load("ema.safetensors")
    assert model == GoogLeNet(num_classes=4, aux_logits=False, transform_input=True, param_dtype=jnp.float64)
    assert np.array_equal(variables["params"]["fc"]["bias"], doubles["fc.bias"].numpy())


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("daisy\nrose\n", ["daisy", "rose"]),
        ("\ufeffdaisy\r\n rose \r\n\n", ["daisy", "rose"]),
        ('["daisy", "a \\"rose\\", red"]', ["daisy", 'a "rose", red']),
    ],
)
def test_class_names_are_read_from_lines_or_a_json_list(content: str, names: list[str], here: Path) -> None:
    Path("names").write_text(content)
    assert read_class_names(Path("names"), 2) == names


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"daisy\n", CheckpointError, "names: class_names must have one name for each of the 2 classes, got 1"),
        (b"daisy\n\nrose\n", CheckpointError, "names: class_names must have one name for each of the 2 classes, got 3"),
        (b"\nrose\n", CheckpointError, "names: the name of class 0 is empty"),
        (b'["daisy", 3]', CheckpointError, "names: class_names must be strings, but that of class 1 is 3"),
        (b'{"0": "daisy", "1": "rose"}', CheckpointError, "names: class_names must be a list of 2 strings, got a dict"),
        (b'["daisy", "rose"', CheckpointError, "names: Expecting ',' delimiter"),
        (b"[" + b"9" * 5000 + b"]", CheckpointError, "names: Exceeds the limit (4300 digits)"),
        (b"caf\xe9\nrose\n", CheckpointError, "names is not UTF-8: save it as UTF-8"),
        (None, InputError, "cannot read names: No such file or directory"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(
    content: bytes | None, kind: type[GoogLeNetError], message: str, here: Path
) -> None:
    if content is not None:
        Path("names").write_bytes(content)
    with pytest.raises(kind) as caught:
        read_class_names(Path("names"), 2)
    assert str(caught.value).startswith(message)


@pytest.mark.slow
def test_without_pytorch_one_line_says_what_to_install(here: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; import port_weights; sys.exit(port_weights.main(['random']))"
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPT.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (3, "", 1)
    assert process.stderr.startswith("error: torch is not installed: ")
    assert "PyTorch's CPU build" in process.stderr


# Inputs that are not available or are refused: a status, one line that names the file, and nothing is written.


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    before = sorted(Path().rglob("*"))
    status = port_weights.main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert sorted(Path().rglob("*")) == before
    return status, err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("empty.pth", lambda path: path.touch(), "empty.pth: the file is empty"),
        ("page.pth", lambda path: path.write_text("<!doctype html>"), "page.pth: this is a web page"),
        (
            "resnet18.pth",
            lambda path: torch.save(torchvision.models.resnet18(weights=None).state_dict(), path),
            "resnet18.pth: not the weights of a GoogLeNet: 285 missing (",
        ),
        (
            "nan.pth",
            lambda path: torch.save({**reference.random_checkpoint(), "fc.bias": torch.full((1000,), torch.nan)}, path),
            "nan.pth: not the weights of a GoogLeNet: 1 not finite (fc.bias)",
        ),
        (
            "sequential.pth",
            lambda path: torch.save(
                {name.replace("fc.", "fc.1."): tensor for name, tensor in reference.random_checkpoint().items()}, path
            ),
            "sequential.pth: not the weights of a GoogLeNet: 2 missing (fc.bias, fc.weight); 2 unexpected "
            "(fc.1.weight, fc.1.bias); its head fc is a Sequential",
        ),
        ("port.safetensors", lambda path: path.write_bytes(b"\0" * 100), "port.safetensors: the file is damaged"),
    ],
)
def test_a_bad_file_is_refused(
    name: str, make: Callable[[Path], Any], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Path(name))
    status, error = refused([name], capsys)
    assert status == 4
    assert error.startswith(message)


@pytest.mark.slow
def test_a_bad_file_ends_a_real_process_without_a_traceback(here: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), "model.pth")
    process = command("model.pth", "--json", cwd=here)
    message = (
        "model.pth: it needs torch.nn.modules.linear.Linear, and only plain tensors are loaded: "
        "save model.state_dict() instead"
    )
    assert process.returncode == 4
    assert process.stderr == f"error: {message}\n"
    assert json.loads(process.stdout) == {"status": 4, "error": message}


def test_json_that_nobody_reads_keeps_the_status_and_json_that_cannot_be_written_changes_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, closed_pipe = os.pipe()
    os.close(reader)
    for target, status in ((closed_pipe, 3), (Path("/dev/full"), 6)):
        with open(target, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert port_weights.main(["none.pth", "--json"]) == status
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error"] * 3
    assert "cannot write standard output" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["none.pth"],
            3,
            "none.pth: No such file or directory: give a file, a URL, imagenet, bvlc or random",
        ),
        (["."], 3, "cannot read .: Is a directory"),
        (["hf"], 3, "cannot read hf: Is a directory: give the file in it: hf/pytorch_model.bin"),
        (["none.safetensors", "--to-torchvision", "out.pth"], 3, "cannot read none.safetensors: No such file"),
        (["random", "--output", "none/out.safetensors"], 6, "cannot write none/out.safetensors: there is no folder"),
        (["random", "--output", "/dev/null"], 6, "cannot write /dev/null: it exists and is not a regular file"),
        (["random", "--output", "."], 6, "cannot write .: "),
        (["random", "--report", "none/report.html"], 6, "cannot write none/report.html: there is no folder"),
        (["random", "--output", "none.safetensors", "--diagnose"], 3, "cannot read none.safetensors: No such file"),
        (["ftp://127.0.0.1/googlenet.pth"], 3, "ftp://127.0.0.1/googlenet.pth: only http and https"),
    ],
)
def test_a_file_that_cannot_be_read_or_written_is_named(
    arguments: list[str], status: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("hf").mkdir()
    Path("hf/pytorch_model.bin").touch()
    assert refused(arguments, capsys)[0] == status
    assert message in refused(arguments, capsys)[1]


def test_the_checkpoint_itself_is_never_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.safetensors").write_bytes(b"precious")
    status, error = refused(["model.safetensors", "--output", "../here/model.safetensors"], capsys)
    assert (status, error) == (2, "../here/model.safetensors is the checkpoint itself: name another file to write")


def test_a_device_that_is_not_there_is_refused_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    platform = "gpu" if jax.default_backend() != "gpu" else "tpu"
    status, error = refused(["random", "--device", platform], capsys)
    assert status == 3
    assert error.startswith(f"--device {platform}: JAX has no such device here; ")


def test_a_report_never_lands_on_the_port(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, error = refused(["random", "--output", "one", "--report", "./one"], capsys)
    assert (status, error) == (2, "one is named twice: the report needs a file of its own")


def test_a_name_that_is_too_long_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, error = refused(["x" * 300], capsys)
    assert status == 3
    assert "File name too long" in error


def test_a_checkpoint_of_pytorchs_cannot_be_ported_back_and_the_message_names_the_right_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(reference.random_checkpoint(num_classes=2), "model.pth")
    status, error = refused(["model.pth", "--to-torchvision", "back.pth"], capsys)
    assert status == 4
    assert error.startswith("model.pth is not a checkpoint of flax_googlenet")
    assert error.endswith("python convert/port_weights.py model.pth")


def test_control_characters_in_the_names_of_a_file_do_not_reach_the_terminal(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a\nb\x1b[31mred": torch.zeros(1)}, "model.pth")
    status, error = refused(["model.pth"], capsys)
    assert status == 4
    assert r"a\x0ab\x1b[31mred" in error


def test_help_lists_the_statuses_without_starting_pytorch(here: Path) -> None:
    code = """
import sys, port_weights
try:
    port_weights.parse(["--help"])
finally:
    assert not {"torch", "jax"} & sys.modules.keys()
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "COLUMNS": "80"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert max(map(len, process.stdout.splitlines())) <= 80  # a terminal would break a longer line inside a word
    for status in (
        "0    proven",
        "2    the command",
        "3    an input",
        "4    an input",
        "5    not proven",
        "6    an output",
        "130  ",
    ):
        assert f"\n  {status}" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.safetensors", "--to-torchvision", "model.pth", "--diagnose"], "--to-torchvision can be combined with"),
        (["random", "--key", "model"], "--key needs a CHECKPOINT with several state dicts"),
        (["random", "--diagnose", "--report", "report.html"], "--diagnose writes nothing"),
    ],
)
def test_options_that_contradict_each_other_are_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        port_weights.main(arguments)
    assert message in capsys.readouterr().err


# The network.


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_network")
def test_without_a_network_imagenet_says_how_to_go_on(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = refused([], capsys)
    assert status == 3
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "googlenet-1378be20.pth"
    assert f"put googlenet-1378be20.pth at {cached} and run this again" in error
    assert list(here.iterdir()) == []


@pytest.mark.usefixtures("no_network")
def test_a_damaged_file_in_the_cache_is_not_used(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "googlenet-1378be20.pth"
    cached.parent.mkdir(parents=True)
    torch.save(reference.random_checkpoint(), cached)
    status, error = refused(["imagenet"], capsys)
    assert status == 3
    assert f"the file at {cached} is damaged: its sha256 is" in error


def test_a_damaged_imagenet_file_given_by_its_path_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(reference.random_checkpoint(), "googlenet-1378be20.pth")
    status, error = refused(["googlenet-1378be20.pth"], capsys)
    assert status == 4
    assert error.startswith("googlenet-1378be20.pth is damaged: its sha256 is")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "server"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: QuietHandler(*args, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", folder
        http.shutdown()


@pytest.mark.slow
def test_a_url_with_a_hash_is_downloaded_checked_cached_and_ported(
    here: Path, server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = server
    torch.save(reference.random_checkpoint(), folder / "model.pth")
    digest = hashlib.sha256((folder / "model.pth").read_bytes()).hexdigest()
    name = f"googlenet-{digest[:16]}"
    (folder / "model.pth").rename(folder / f"{name}.pth")

    assert port_weights.main([f"{url}/{name}.pth"]) == 0
    assert capsys.readouterr().err == (
        "note: transform_input is assumed to be off: add --transform-input if the network was built with it, "
        "as fine-tuned ImageNet weights are\n"
    )
    assert flax_googlenet.load_metadata(f"{name}.safetensors")["source_sha256"] == digest
    cached = tmp_path / "torch" / "hub" / "checkpoints" / f"{name}.pth"
    assert cached.read_bytes() == (folder / f"{name}.pth").read_bytes()

    (folder / f"{name}.pth").rename(folder / "googlenet-0000000f.pth")
    status, error = refused([f"{url}/googlenet-0000000f.pth"], capsys)
    assert status == 3
    assert f"its sha256 is {digest}, and it should start with 0000000f; if 0000000f in its name is not a hash" in error
    secret = f"{url.replace('//', '//user:secret@')}/none.pth?key=secret#secret"
    assert refused([secret], capsys) == (3, f"{url}/none.pth: HTTP 404 Not Found")
    assert refused(["http://[::1/none.pth"], capsys)[0] == 3


# A port that is wrong: not written, and explained.


SWAPPED = {"weight": "running_var", "running_var": "weight"}


def floor_max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding), (padding, padding)))


@pytest.fixture
def changed_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For tests that change the code of the network: JAX's caches are cleared before and afterwards."""
    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()


@pytest.mark.slow
def test_a_port_that_differs_is_not_written(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torchvision_map.torch_key  # a variance for a scale, which changes no shape: no program is compiled anew
    wrong = {f"inception3a.branch1.bn.{one}": f"inception3a.branch1.bn.{other}" for one, other in SWAPPED.items()}
    monkeypatch.setattr(torchvision_map, "torch_key", lambda path: wrong.get(right(path), right(path)))
    assert port_weights.main(["random", "--report", "report.html"]) == 5
    out, err = capsys.readouterr()
    assert err.startswith("error: random: not proven: inception3a differs, ")
    assert err.count("\n") == 1
    assert " differs " in out
    assert [path.name for path in here.iterdir()] == ["report.html"]
    assert "inception3a" in Path("report.html").read_text()


def diagnosis(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert port_weights.main([*arguments, "--diagnose", "--json"]) == 5
    return json.loads(capsys.readouterr().out)["diagnosis"]


Edit = Callable[[Any], None]


def swap_statistics(variables: Any) -> None:
    stats = variables["batch_stats"]["inception3b"]["branch2_1"]["bn"]
    stats["mean"], stats["var"] = stats["var"], stats["mean"]


def forget_statistics(variables: Any) -> None:
    stats = variables["batch_stats"]["conv3"]["bn"]
    stats["mean"], stats["var"] = np.zeros_like(stats["mean"]), np.ones_like(stats["var"])


def swap_scale_and_bias(variables: Any) -> None:
    norm = variables["params"]["conv2"]["bn"]
    norm["scale"], norm["bias"] = norm["bias"], norm["scale"]


def flatten_as_hwc(variables: Any) -> None:
    layer = variables["params"]["aux2"]["fc1"]
    layer["kernel"] = layer["kernel"].reshape(128, 4, 4, 1024).transpose(1, 2, 0, 3).reshape(2048, 1024)


def round_to_bfloat16(variables: Any) -> None:
    for collection in ("params", "batch_stats"):
        variables[collection] = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), variables[collection])


def change_a_weight(variables: Any) -> None:
    variables["params"]["inception5a"]["branch1"]["conv"]["kernel"][0, 0, 0, 0] += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "stage", "cause", "explanation"),
    [
        (swap_statistics, "inception3b", "statistics", "mean and var are swapped"),
        (forget_statistics, "conv3", "statistics", "still at their initial 0 and 1: batch_stats/conv3/bn/mean"),
        (swap_scale_and_bias, "conv2", "statistics", "params/conv2/bn/scale"),
        (flatten_as_hwc, "aux2", "flatten order", "params/aux2/fc1/kernel are in HWC order"),
        (round_to_bfloat16, "conv1", "precision", "rounded to a smaller dtype"),
        (change_a_weight, "inception5a", "weights", "params/inception5a/branch1/conv/kernel"),
    ],
)
def test_diagnose_names_the_stage_and_the_cause_in_a_wrong_file(
    edit: Edit, stage: str, cause: str, explanation: str, here: Path, variables: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = jax.tree.map(np.copy, variables)
    edit(wrong)
    flax_googlenet.save("wrong.safetensors", GoogLeNet(), wrong)
    before = Path("wrong.safetensors").read_bytes()
    found = diagnosis(["random", "--output", "wrong.safetensors"], capsys)
    assert (found["stage"], found["cause"]) == (stage, cause)
    assert explanation in found["explanation"]
    assert Path("wrong.safetensors").read_bytes() == before


@pytest.mark.slow
def test_diagnose_names_transform_input(here: Path, variables: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flax_googlenet.save("wrong.safetensors", GoogLeNet(), variables)
    found = diagnosis(["random", "--transform-input", "--output", "wrong.safetensors"], capsys)
    assert (found["stage"], found["cause"]) == ("conv1", "transform_input")
    assert "with transform_input=True the stage agrees" in found["explanation"]


@pytest.mark.slow
def test_diagnose_names_a_low_precision(here: Path, variables: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flax_googlenet.save("wrong.safetensors", GoogLeNet(dtype=jnp.bfloat16), variables)
    found = diagnosis(["random", "--output", "wrong.safetensors"], capsys)
    assert (found["stage"], found["cause"]) == ("conv1", "precision")
    assert "dtype bfloat16" in found["explanation"]


@pytest.mark.slow
def test_diagnose_names_floor_mode_pooling(
    here: Path, capsys: pytest.CaptureFixture[str], changed_code: pytest.MonkeyPatch
) -> None:
    changed_code.setattr(flax_googlenet.model, "max_pool", floor_max_pool)
    found = diagnosis(["random"], capsys)
    assert (found["stage"], found["cause"], found["error"]) == ("maxpool1", "padding", None)


@pytest.mark.slow
def test_diagnose_names_same_padding(
    here: Path, capsys: pytest.CaptureFixture[str], changed_code: pytest.MonkeyPatch
) -> None:
    class SameConv(nn.Conv):
        padding: Any = "SAME"

        def __post_init__(self) -> None:
            self.padding = "SAME"
            super().__post_init__()

    changed_code.setattr(flax_googlenet.model.nn, "Conv", SameConv)
    found = diagnosis(["random"], capsys)
    assert (found["stage"], found["cause"]) == ("conv1", "padding")
    assert '"SAME"' in found["explanation"]


@pytest.mark.slow
def test_diagnose_describes_in_words_how_a_stage_differs(
    here: Path, variables: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = jax.tree.map(np.copy, variables)
    swap_statistics(wrong)  # the square root of a negative mean is not a number
    flax_googlenet.save("wrong.safetensors", GoogLeNet(), wrong)
    assert port_weights.main(["random", "--output", "wrong.safetensors", "--diagnose"]) == 5
    out = capsys.readouterr().out
    assert "First difference at inception3b: in wrong.safetensors, some values are not finite." in out
    assert "Likely cause: statistics. mean and var are swapped" in out


@pytest.mark.slow
def test_diagnose_finds_nothing_wrong_with_a_right_port(
    here: Path, variables: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flax_googlenet.save("right.safetensors", GoogLeNet(), variables)
    assert port_weights.main(["random", "--output", "right.safetensors", "--diagnose"]) == 0
    assert "right.safetensors agrees with random in every stage" in capsys.readouterr().out


@pytest.mark.slow
def test_diagnose_refuses_the_port_of_another_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GoogLeNet(num_classes=2)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), flax_googlenet.model.variable_shapes(model))
    flax_googlenet.save("other.safetensors", model, zeros)
    status, error = refused(["random", "--output", "other.safetensors", "--diagnose"], capsys)
    assert status == 4
    assert error.startswith("other.safetensors is not a port of random: ")
