"""The command with files of Caffe, TensorFlow and ONNX: every stage is proven, and wrong files are refused."""

import json
import zipfile
from pathlib import Path

import bvlc
import jax
import numpy as np
import port_weights
import pytest
from caffe_files import caffemodel
from flax.traverse_util import flatten_dict
from inception5h import Inception5h
from onnx_files import zoo
from tensorflow_files import graph

import flax_googlenet
import flax_googlenet.model
from flax_googlenet.weights import caffe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with an empty PyTorch cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.slow
def test_a_caffemodel_is_ported_proven_and_written_with_its_heads(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = bvlc.random_weights(num_classes=7)
    Path("places.caffemodel").write_bytes(caffemodel(weights, v1=True, legacy=True))
    assert port_weights.main(["places.caffemodel", "--json", "--report", "report.html"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no note about transform_input
    result = json.loads(out)
    assert len(result["parity"]) == 22
    assert {"norm1", "norm2", "aux1", "aux2"} < result["parity"].keys()
    assert all(errors["float64"] < 1e-12 for errors in result["parity"].values())  # 2e-14 measured

    model, variables = flax_googlenet.load("places.safetensors")
    assert (model.variant, model.num_classes, model.aux_logits, model.dropout) == ("bvlc", 7, True, 0.4)
    expected = flatten_dict(flax_googlenet.from_caffe("places.caffemodel")[1])
    for path, array in flatten_dict(variables).items():
        np.testing.assert_array_equal(array, expected[path])
    metadata = flax_googlenet.load_metadata("places.safetensors")
    assert "BGR" in metadata["input"]
    assert metadata["class_names"] is None
    assert "BGR" in Path("report.html").read_text()

    assert port_weights.main(["places.safetensors", "--to-caffe", "back.caffemodel"]) == 0
    assert "readNetFromCaffe('deploy.prototxt', 'back.caffemodel')" in capsys.readouterr().out
    back = caffe.read("back.caffemodel").state_dict
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.slow
def test_a_graph_of_tensorflow_is_ported_proven_and_written_with_its_heads(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = bvlc.random_weights(num_classes=7, network=Inception5h)
    Path("graph.pb").write_bytes(graph(weights))
    assert port_weights.main(["graph.pb", "--json", "--class-names", "/dev/null"]) == 4
    assert "expected one name a line" in json.loads(capsys.readouterr().out)["error"]
    assert port_weights.main(["graph.pb", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert len(result["parity"]) == 22
    assert all(errors["float64"] < 1e-12 for errors in result["parity"].values())
    model, variables = flax_googlenet.load("graph.safetensors")
    expected_model, expected = flax_googlenet.from_tensorflow("graph.pb")
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert "RGB in [0, 255] minus 117" in flax_googlenet.load_metadata("graph.safetensors")["input"]


@pytest.mark.slow
def test_a_model_of_the_zoo_whose_pools_round_down_is_ported_as_what_it_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("inception-v1.onnx").write_bytes(zoo(bvlc.random_weights(num_classes=7), floor=True).SerializeToString())
    assert port_weights.main(["inception-v1.onnx", "--json", "--report", "report.html"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: the max pools round their sizes down")
    result = json.loads(out)
    assert result["variant"] == "bvlc_floor"
    assert len(result["parity"]) == 20
    assert all(errors["float64"] < 1e-12 for errors in result["parity"].values())
    model, variables = flax_googlenet.load("inception-v1.safetensors")
    expected_model, expected = flax_googlenet.from_onnx("inception-v1.onnx")
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    metadata = flax_googlenet.load_metadata("inception-v1.safetensors")
    assert "BGR" in metadata["input"]
    for pools in (result["pools"], metadata["pools"], Path("report.html").read_text()):
        assert "round their sizes down" in pools


def test_a_zip_with_a_graph_is_refused_with_the_way_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile("inception5h.zip", "w") as archive:
        archive.writestr("tensorflow_inception_graph.pb", b"graph")
    assert port_weights.main(["inception5h.zip"]) == 4
    assert "holds tensorflow_inception_graph.pb: unpack it first" in capsys.readouterr().err


def test_each_network_goes_back_to_its_own_format_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variant in ("torchvision", "bvlc", "inception5h", "bvlc_floor"):
        model = flax_googlenet.GoogLeNet(variant=variant, num_classes=1, aux_logits=False)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), flax_googlenet.model.variable_shapes(model))
        flax_googlenet.save(f"{variant}.safetensors", model, zeros)
    assert port_weights.main(["torchvision.safetensors", "--to-caffe", "no.caffemodel"]) == 4
    assert "use --to-torchvision" in capsys.readouterr().err
    assert port_weights.main(["bvlc.safetensors", "--to-torchvision", "no.pth"]) == 4
    assert "use --to-caffe" in capsys.readouterr().err
    assert port_weights.main(["inception5h.safetensors", "--to-torchvision", "no.pth"]) == 4
    assert "goes back to no other format" in capsys.readouterr().err
    assert port_weights.main(["inception5h.safetensors", "--to-caffe", "no.caffemodel"]) == 4
    assert "as Google trained it" in capsys.readouterr().err
    assert port_weights.main(["bvlc_floor.safetensors", "--to-caffe", "no.caffemodel"]) == 4
    assert "round their sizes down, and Caffe's round up" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        port_weights.main(["torchvision.safetensors", "--to-caffe", "no.caffemodel", "--to-torchvision", "no.pth"])
    assert not [*here.glob("no.*")]


def test_a_wrong_file_is_refused_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = bvlc.random_weights(num_classes=2)
    contents = {
        "cut.caffemodel": caffemodel(weights)[:10_000],
        "page.caffemodel": b"<!doctype html>",
        "cut.onnx": zoo(weights).SerializeToString()[:10_000],
        "pointer.onnx": b"version https://git-lfs.github.com/spec/v1",
        "heads.caffemodel": caffemodel({**weights, "aux1.fc2.bias": np.zeros(3)}),
    }
    for name, content in contents.items():
        Path(name).write_bytes(content)
        assert port_weights.main([name]) == 4
        error = capsys.readouterr().err
        assert error.startswith(f"error: {name}: ")
        assert error.count("\n") == 1
    assert "--without-aux leaves them out" in error
    assert {path.name for path in here.iterdir()} == contents.keys()


@pytest.mark.parametrize(
    "checkpoint", ["bvlc", "network.caffemodel", "http://host/network.caffemodel?download=true", "graph.pb", "net.onnx"]
)
@pytest.mark.parametrize("option", ["--diagnose", "--transform-input", "--no-transform-input", "--key=model"])
def test_options_of_torchvisions_network_are_refused(
    checkpoint: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        port_weights.main([checkpoint, option])
    assert option.split("=")[0].replace("no-", "") in capsys.readouterr().err.splitlines()[-1]


def test_without_a_network_the_message_says_where_berkeleys_file_belongs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    place = here.parent / "torch" / "hub" / "checkpoints" / "bvlc_googlenet.caffemodel"
    assert port_weights.main(["bvlc"]) == 3
    assert f"without a network, put bvlc_googlenet.caffemodel at {place}" in capsys.readouterr().err
    place.write_bytes(b"another file")
    assert port_weights.main(["bvlc"]) == 3
    assert f"the file at {place} is damaged: its sha1 is " in capsys.readouterr().err
