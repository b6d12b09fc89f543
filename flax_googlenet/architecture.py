"""The facts about the networks that need no JAX: what sets them apart, their blocks, and what their images are."""

from typing import NamedTuple


class Network(NamedTuple):
    """What sets one network apart from the others."""

    min_size: int
    """Smallest height and width of an image in pixels: one pixel is left after the last max pools."""
    batch_norm: bool
    """Whether BatchNorm follows each convolution. Otherwise the convolutions have biases."""
    response_norm: bool
    """Whether local response normalisation follows ``maxpool1`` and ``conv3``."""
    branch3_kernel: int
    """Height and width of the large kernel in the third branch of an inception block."""
    maxpool4_window: int
    """Height and width of a window of ``maxpool4``, whose stride is 2."""
    aux_pool: tuple[int, int] | None
    """Window and stride of the average pool of the auxiliary heads, or None for an adaptive pool."""
    bgr_mean: tuple[float, float, float] | None
    """The mean that is subtracted from BGR pixels in [0, 255], or None for ImageNet-normalised RGB."""
    caffe_init: bool
    """Whether initial kernels and biases are those of Berkeley's ``train_val.prototxt``, or else torchvision's."""


NETWORKS = {
    # https://github.com/pytorch/vision/blob/main/torchvision/models/googlenet.py
    "torchvision": Network(
        min_size=15,
        batch_norm=True,
        response_norm=False,
        branch3_kernel=3,  # not the paper's 5x5: the checkpoint has it (pytorch/vision#906)
        maxpool4_window=2,
        aux_pool=None,
        bgr_mean=None,
        caffe_init=False,
    ),
    # https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet
    "bvlc": Network(
        min_size=31,
        batch_norm=False,
        response_norm=True,
        branch3_kernel=5,
        maxpool4_window=3,
        aux_pool=(5, 3),
        bgr_mean=(104.0, 117.0, 123.0),
        caffe_init=True,
    ),
}
"""The networks by the name of their variant."""

MIN_SIZE = min(network.min_size for network in NETWORKS.values())
"""Smallest height and width of an image that any of the networks takes, in pixels."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the RGB channels over ImageNet, for pixels in [0, 1]."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of the RGB channels over ImageNet, for pixels in [0, 1]."""

WIDTHS = {
    # Output channels of branch1 1x1 | branch2 1x1, 3x3 | branch3 1x1, 3x3 | branch4 1x1 (table 1 of the paper).
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}

HEADS = ("fc", "aux1", "aux2")
"""Names of the classifiers in the variables."""

BLOCKS = ("conv1", "conv2", "conv3", *WIDTHS, *HEADS)
"""Names of all blocks that have variables, as in torchvision: the first level of the variables."""
