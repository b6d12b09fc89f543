"""The summary of a network, against torchvision's own counts."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import GoogLeNet as TorchGoogLeNet
from torchvision.models import GoogLeNet_Weights

import flax_googlenet
from flax_googlenet import GoogLeNet
from flax_googlenet.commands import cli
from flax_googlenet.inference.summary import summarize
from flax_googlenet.model import variable_shapes


def test_the_stages_have_the_shapes_parameters_and_operations_of_torchvisions(torch32: TorchGoogLeNet) -> None:
    shapes = {}
    hooks = [
        module.register_forward_hook(lambda m, i, output, name=name: shapes.update({name: output.shape}))
        for name, module in torch32.named_children()
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch32(torch.zeros(1, 3, 65, 65))
    for hook in hooks:
        hook.remove()
    operations = counter.get_flop_counts()

    stages = {stage.name: stage for stage in summarize(GoogLeNet(), size=65)}
    assert list(stages) == [name for name in shapes if name != "dropout"] + ["aux1", "aux2"]
    for name, stage in stages.items():
        module = getattr(torch32, name)
        assert stage.parameters == sum(parameter.numel() for parameter in module.parameters()), name
        if name in shapes:
            assert stage.multiply_adds == sum(operations.get(f"GoogLeNet.{name}", {}).values()) // 2, name
            _, channels, *places = shapes[name]
            assert stage.output == (*places, channels), name


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
