"""``flax-googlenet summary``: the totals that torchvision gives, and other sizes and weights."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from torchvision.models import GoogLeNet_Weights

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.commands import cli
from flax_googlenet.model import variable_shapes


def test_the_totals_are_those_that_torchvision_gives(capsys: pytest.CaptureFixture[str]) -> None:
    meta = GoogLeNet_Weights.IMAGENET1K_V1.meta
    assert cli.main(["summary"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.replace("│", " ").replace("|", " ").splitlines()]
    assert ["conv1", "112x112x64", "9,536", "118.0", "M"] in lines
    assert ["maxpool1", "56x56x64"] in lines
    assert ["total", f"{meta['num_params']:,}", f"{meta['_ops']:.3f}", "G"] in lines
    assert ["with", "auxiliary", "heads", "13,004,888", "in", "training"] in lines


def test_weights_are_summarised_at_the_size_of_their_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GoogLeNet(num_classes=3, aux_logits=False)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variable_shapes(model))
    flax_googlenet.save(tmp_path / "small.safetensors", model, zeros, {"recipe": {"image_size": 32}})
    assert cli.main(["summary", "--weights", str(tmp_path / "small.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image_size"] == 32
    assert found["parameters"] == found["parameters_with_auxiliary_heads"] == 6_624_904 - 997 * 1025
    assert found["stages"][0] == {"name": "conv1", "output": [16, 16, 64], "parameters": 9536, "multiply_adds": 2408448}
    assert found["stages"][-1]["output"] == [3]


def test_images_that_are_too_small_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["summary", "--size", "14"]) == 2
    assert capsys.readouterr().err == "error: --size must be at least 15, got 14\n"
