"""The float32 limit refuses no correct port by chance, however few its classes, and accepts no coarser rounding."""

import warnings

import numpy as np
import pytest
import reference
import torch
from proof import HEAD_CLASSES, Stage, relative_error, widen_heads
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet

TF32, BFLOAT16 = 10, 7  # bits of the mantissa


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round float32 to the nearest number with this many bits in the mantissa, ties to even."""
    step = 2 ** (23 - bits)
    integers = x.contiguous().view(torch.int32)
    return ((integers + step // 2 - 1 + (integers // step & 1)) & -step).view(torch.float32)


def multiply_coarsely(model: TorchGoogLeNet, bits: int) -> None:
    """Round the operands of all convolutions and matrix products, as tensor cores do; sums are in float32."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, bits)
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], bits),))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 48, 48, 3)).astype(np.float32)


def test_a_network_that_multiplies_coarsely_differs_in_every_stage(images: np.ndarray) -> None:
    checkpoint = reference.random_checkpoint(num_classes=3)
    narrow = {key: tensor.numpy() for key, tensor in checkpoint.items() if not key.startswith("aux")}
    port = flax_googlenet.GoogLeNet(num_classes=3, aux_logits=False)
    state_dict, _, _ = widen_heads(narrow, port, flax_googlenet.from_torchvision(narrow))
    truth = reference.stages(
        reference.build(state_dict, transform_input=False, dtype=torch.float64), images.astype(np.float64)
    )
    model = reference.build(state_dict, transform_input=False, dtype=torch.float32)
    pytorch32 = reference.stages(model, images)
    for bits in (TF32, BFLOAT16):
        multiply_coarsely(model, bits)
        coarse = reference.stages(model, images)
        assert len(coarse) == 18
        for name, x in truth.items():
            stage = Stage(name, x.shape, 0.0, relative_error(pytorch32[name], x), relative_error(coarse[name], x))
            assert not stage.ok, stage


@pytest.fixture(scope="module")
def features(images: np.ndarray, state_dict: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """Inputs of the last layer: in float64, in float32, and in float32 by convolutions with another order of sums."""
    headless = {key: array for key, array in state_dict.items() if not key.startswith("aux")}
    outputs = []
    for dtype, mkldnn in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        model = reference.build(headless, transform_input=False, dtype=dtype)
        with (
            warnings.catch_warnings(action="ignore"),
            torch.backends.mkldnn.flags(enabled=mkldnn),
        ):  # warns about Intel's GPUs
            x = reference.stages(model, images.astype(str(dtype).removeprefix("torch.")))["avgpool"]
        outputs.append(torch.from_numpy(x.reshape(len(images), -1)))
    return outputs


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5])
def test_a_head_of_few_classes_is_neither_refused_nor_accepted_by_chance(
    num_classes: int, features: list[torch.Tensor]
) -> None:
    model = flax_googlenet.GoogLeNet(num_classes=num_classes, aux_logits=False)
    rng = np.random.default_rng(num_classes)
    for _ in range(50):
        weight = rng.normal(0, 0.04, (num_classes, 1024)).astype(np.float32)
        bias = rng.normal(0, 0.2, num_classes).astype(np.float32)
        variables = {"params": {"fc": {"kernel": weight.T, "bias": bias}}}
        wide, _, variables = widen_heads({"fc.weight": weight, "fc.bias": bias}, model, variables)
        assert np.array_equal(wide["fc.weight"], variables["params"]["fc"]["kernel"].T)
        assert np.array_equal(wide["fc.bias"], variables["params"]["fc"]["bias"])
        weight32, bias32 = torch.from_numpy(wide["fc.weight"]), torch.from_numpy(wide["fc.bias"])
        truth = features[0] @ weight32.T.double() + bias32
        pytorch32, port = (x @ weight32.T + bias32 for x in features[1:])
        assert truth.shape == (len(features[0]), HEAD_CLASSES)

        def stage(logits: torch.Tensor, truth: torch.Tensor = truth, pytorch32: torch.Tensor = pytorch32) -> Stage:
            errors = (relative_error(x.numpy(), truth.numpy()) for x in (pytorch32, logits))
            return Stage("fc", tuple(truth.shape), 0.0, *errors)

        assert stage(port).ok, stage(port)
        for bits in (TF32, BFLOAT16):  # in this layer only
            coarse = stage(rounded(features[2], bits) @ rounded(weight32, bits).T + bias32)
            assert not coarse.ok, coarse
