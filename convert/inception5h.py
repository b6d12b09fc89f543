"""Google's GoogLeNet in PyTorch, as the programs for its GraphDef describe it: the reference for ports of it.

Reference: https://github.com/tensorflow/tensorflow/tree/v1.0.0/tensorflow/examples/tutorials/deepdream
"""

import torch
from bvlc import AuxiliaryHead, BVLCGoogLeNet, Convolution, Inception
from torch import nn
from torch.nn import functional


def pad_same(x: torch.Tensor, window: int, value: float) -> torch.Tensor:
    """Pad as TensorFlow's SAME does for a stride of 2: by half a window, and by one less before an even size."""
    pads = [pad for size in (x.shape[3], x.shape[2]) for pad in ((window - 2 + size % 2) // 2, window // 2)]
    return functional.pad(x, pads, value=value)


class SameConvolution(Convolution):
    """A convolution with a stride of 2, a bias and ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(pad_same(x, self.conv.kernel_size[0], value=0))


class SameMaxPool(nn.Module):
    """A max pool of 3x3 pixels with a stride of 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.max_pool2d(pad_same(x, 3, value=-torch.inf), 3, 2)


class ResponseNorm(nn.Module):
    """TensorFlow's local response normalisation over 11 channels, whose alpha is not divided by their number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        squares = functional.pad(x**2, (0, 0, 0, 0, 5, 5))
        return x / (2 + 1e-4 * sum(squares[:, i : i + channels] for i in range(11))) ** 0.5


class Head(AuxiliaryHead):
    """An auxiliary head. Its pool is TensorFlow's where that gives 4x4 values, and else an adaptive one."""

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(x, 5, 3) if min(x.shape[2:]) >= 5 else x


class Inception5h(BVLCGoogLeNet):
    """The network, with torchvision's names of modules, for ImageNet-normalised RGB images [N, 3, H, W]."""

    def __init__(self, num_classes: int, aux_logits: bool) -> None:
        super().__init__(num_classes, aux_logits)
        self.conv1 = SameConvolution(3, 64, 7, 2)
        for i in (1, 2, 3, 4):
            setattr(self, f"maxpool{i}", SameMaxPool())
        for i in (1, 2):
            setattr(self, f"norm{i}", ResponseNorm())
        self.inception4a = Inception(480, 192, 96, 204, 16, 48, 64)
        self.inception4b = Inception(508, 160, 112, 224, 24, 64, 64)
        self.inception5a = Inception(832, 256, 160, 320, 48, 128, 128)
        self.aux1 = Head(508, num_classes) if aux_logits else None
        self.aux2 = Head(528, num_classes) if aux_logits else None

    def input(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the input of the first layer for RGB pixels in [0, 255]."""
        return pixels - 117
