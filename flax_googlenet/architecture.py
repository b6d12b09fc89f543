"""The facts about the networks that need no JAX: what sets them apart, their blocks, and what their images are."""

import difflib
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

STAGES = (
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
    *("inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b", "avgpool", "fc"),
)
"""Names of the stages of inference in the order of computation, as in torchvision."""

BRANCHES = {
    "branch1": ("1x1", "1x1"),
    "branch2_0": ("3x3_reduce", "3x3_bottleneck"),
    "branch2_1": ("3x3", "3x3"),
    "branch3_0": ("5x5_reduce", "5x5_bottleneck"),
    "branch3_1": ("5x5", "5x5"),
    "branch4_1": ("pool_proj", "pool_reduce"),
}
"""Name of each convolution of an inception block -> its names in Caffe and in Lucid."""

_NORMS = ("norm1", "norm2")  # stages of the networks with local response normalisation alone


def _stage_names() -> dict[str, str]:
    """Return the names of all stages and branches by themselves, by Caffe's and Lucid's, and by torchvision's paths."""
    convolutions = ["conv1", "conv2", "conv3", *(f"{block}/{branch}" for block in WIDTHS for branch in BRANCHES)]
    names = {name: name for name in (*STAGES, *_NORMS, *convolutions)}
    names |= {"conv1/7x7_s2": "conv1", "conv2/3x3_reduce": "conv2", "conv2/3x3": "conv3"}  # Caffe
    names |= {f"pool{i}/3x3_s2": f"maxpool{i}" for i in (1, 2, 3, 4)}
    names |= {"pool1/norm1": "norm1", "conv2/norm2": "norm2", "pool5/7x7_s1": "avgpool", "loss3/classifier": "fc"}
    # Lucid. Its maxpool1 and maxpool4 are missing, because torchvision gives these names to other stages.
    names |= {"conv2d0": "conv1", "maxpool0": "maxpool1", "conv2d1": "conv2", "conv2d2": "conv3"}
    names |= {"localresponsenorm0": "norm1", "localresponsenorm1": "norm2"}
    names |= {"maxpool10": "maxpool4", "avgpool0": "avgpool", "softmax2_pre_activation": "fc"}
    for block in WIDTHS:
        number = block.removeprefix("inception")
        names |= {f"inception_{number}/output": block, f"mixed{number}": block}
        for branch, (caffe, lucid) in BRANCHES.items():
            others = f"inception_{number}/{caffe}", f"mixed{number}_{lucid}", f"{block}.{branch.replace('_', '.')}"
            names |= dict.fromkeys(others, f"{block}/{branch}")
    before_relu = {name: f"{stage}/pre_relu" for name, stage in names.items() if stage in convolutions}
    return names | {f"{name}{end}": stage for name, stage in before_relu.items() for end in ("/pre_relu", "_pre_relu")}


_STAGE_NAMES = _stage_names()


def stage_name(name: str, variant: str | None = None) -> str:
    """Return the name of a stage as ``endpoints`` has it, from that name or from one that other libraries use.

    Caffe's ``inception_4c/3x3``, Lucid's ``mixed4c_3x3`` and torchvision's ``inception4c.branch2.1`` are
    ``inception4c/branch2_1``. With ``_pre_relu`` or ``/pre_relu`` at its end, each is the value before the ReLU.

    Args:
        name: The name.
        variant: The network that must have the stage. None is any network.

    Raises:
        ValueError: If no stage has this name; the message has similar names.
    """
    names = _STAGE_NAMES
    if variant and not NETWORKS[variant].response_norm:
        names = {other: stage for other, stage in names.items() if stage not in _NORMS}
    if name not in names:
        similar = difflib.get_close_matches(name, names, cutoff=0.4) or STAGES
        raise ValueError(f"no stage is named {name}: did you mean {', '.join(similar)}?")
    return names[name]
