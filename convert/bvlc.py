"""Berkeley's GoogLeNet in PyTorch, written plainly from its Caffe files: the independent reference for ports of it.

Reference: https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet, deploy.prototxt and train_val.prototxt
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Convolution(nn.Module):
    """A convolution with a bias, and ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


class Inception(nn.Module):
    """An inception block. Its arguments are the numbers of channels, in the order of table 1 of the paper."""

    def __init__(self, inputs: int, c1: int, c3_reduce: int, c3: int, c5_reduce: int, c5: int, pool: int) -> None:
        super().__init__()
        self.branch1 = Convolution(inputs, c1, 1)
        self.branch2 = nn.Sequential(Convolution(inputs, c3_reduce, 1), Convolution(c3_reduce, c3, 3, padding=1))
        self.branch3 = nn.Sequential(Convolution(inputs, c5_reduce, 1), Convolution(c5_reduce, c5, 5, padding=2))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), Convolution(inputs, pool, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class AuxiliaryHead(nn.Module):
    """An auxiliary head without dropout. Its pool is Caffe's where that gives 4x4 values, and else an adaptive one."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.conv = Convolution(inputs, 128, 1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(x, 5, 3, ceil_mode=True) if min(x.shape[2:]) >= 5 else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(x)
        if pooled.shape[2:] != (4, 4):
            pooled = functional.adaptive_avg_pool2d(x, 4)
        return self.fc2(torch.relu(self.fc1(self.conv(pooled).flatten(1))))


class BVLCGoogLeNet(nn.Module):
    """The network, with torchvision's names of modules, for ImageNet-normalised RGB images [N, 3, H, W]."""

    def __init__(self, num_classes: int, aux_logits: bool) -> None:
        super().__init__()
        self.conv1 = Convolution(3, 64, 7, 2, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.norm1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.conv2 = Convolution(64, 64, 1)
        self.conv3 = Convolution(64, 192, 3, padding=1)
        self.norm2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)
        self.aux1 = AuxiliaryHead(512, num_classes) if aux_logits else None
        self.aux2 = AuxiliaryHead(528, num_classes) if aux_logits else None

    def input(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the input of the first layer for RGB pixels in [0, 255]: BGR minus Caffe's mean."""
        return pixels.flip(1) - torch.tensor([104, 117, 123], dtype=pixels.dtype)[:, None, None]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, num_classes]."""
        std = torch.tensor([0.229, 0.224, 0.225], dtype=images.dtype)[:, None, None]
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=images.dtype)[:, None, None]
        x = self.input((images * std + mean) * 255)
        x = self.norm1(self.maxpool1(self.conv1(x)))
        x = self.maxpool2(self.norm2(self.conv3(self.conv2(x))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4d(self.inception4c(self.inception4b(self.inception4a(x))))
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        return self.fc(self.avgpool(x).flatten(1))


class BVLCGoogLeNetFloor(BVLCGoogLeNet):
    """The network with max pools whose sizes round down, as in the file ``inception_v1`` of ONNX's model zoo."""

    def __init__(self, num_classes: int, aux_logits: bool) -> None:
        super().__init__(num_classes, aux_logits)
        for pool in (self.maxpool1, self.maxpool2, self.maxpool3, self.maxpool4):
            pool.ceil_mode = False


def random_weights(
    num_classes: int = 1000, seed: int = 0, network: type[BVLCGoogLeNet] = BVLCGoogLeNet
) -> dict[str, np.ndarray]:
    """Return a state dict with seeded random weights in float32, with which no stage vanishes or explodes."""
    rng = np.random.default_rng(seed)
    shapes = {key: tensor.shape for key, tensor in network(num_classes, aux_logits=True).state_dict().items()}
    deviations = {key: (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2 for key, shape in shapes.items()}
    return {key: rng.normal(0, deviations[key], shape).astype(np.float32) for key, shape in shapes.items()}


def build(
    state_dict: Mapping[str, np.ndarray], dtype: torch.dtype, network: type[BVLCGoogLeNet] = BVLCGoogLeNet
) -> BVLCGoogLeNet:
    """Return the network in evaluation mode, in ``dtype``, with the weights of a checked state dict."""
    model = network(len(state_dict["fc.bias"]), aux_logits="aux1.fc1.bias" in state_dict).to(dtype)
    model.load_state_dict({key: torch.from_numpy(np.array(array)).to(dtype) for key, array in state_dict.items()})
    return model.eval()
