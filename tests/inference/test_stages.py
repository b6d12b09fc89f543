"""The stages of a network, against torchvision's own."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import GoogLeNet as TorchGoogLeNet

from flax_googlenet import GoogLeNet
from flax_googlenet.inference.stages import summarize


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
