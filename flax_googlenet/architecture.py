"""The facts about the networks that need no JAX: what sets them apart, their blocks, and what their images are."""

import difflib
from collections.abc import Mapping
from typing import Literal, NamedTuple

Padding = int | Literal["SAME"]
"""Pixels on each side of an image, or TensorFlow's SAME: as few as possible, with an odd one at the end."""

PoolPadding = Padding | Literal["VALID"]
"""The padding of a max pool. With an integer, the size of the output is rounded up as in PyTorch and Caffe. With
TensorFlow's VALID, there is no padding, and the size is rounded down."""

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


class ResponseNorm(NamedTuple):
    """Local response normalisation: ``x / (k + alpha * sum(x ** 2 over the channels around each one)) ** beta``."""

    radius: int
    """Number of channels on each side of a channel whose squares are added to its own."""
    k: float
    """Constant that is added to the weighted sum of squares."""
    alpha: float
    """Weight of each square. Caffe and PyTorch state it multiplied by the number of channels, TensorFlow as it is."""
    beta: float
    """Exponent of the divisor: 0.5 or 0.75."""


class Network(NamedTuple):
    """What sets one network apart from the others."""

    min_size: int
    """Smallest height and width of an image in pixels."""
    widths: Mapping[str, tuple[int, int, int, int, int, int]]
    """Name of each inception block -> its numbers of channels, in the order of ``WIDTHS``."""
    batch_norm: bool
    """Whether BatchNorm follows each convolution. Otherwise the convolutions have biases."""
    response_norm: ResponseNorm | None
    """Local response normalisation after ``maxpool1`` and ``conv3``, or None."""
    conv1_padding: Padding
    """Pixels on each side of the images, or TensorFlow's SAME."""
    pool_padding: PoolPadding
    """Padding of the four max pools between the stages."""
    branch3_kernel: int
    """Height and width of the large kernel in the third branch of an inception block."""
    maxpool4_window: int
    """Height and width of a window of ``maxpool4``, whose stride is 2."""
    aux_pool_sizes: range
    """Heights and widths that the auxiliary heads' average pool, 5x5 with stride 3, reduces to 4. For others, the heads
    average adaptively."""
    bgr: bool
    """Whether the channels of the first convolution are BGR, not RGB."""
    pixel_mean: tuple[float, float, float] | None
    """Mean that is subtracted from the channels of pixels in [0, 255], or None for ImageNet's normalisation."""
    caffe_init: bool
    """Whether kernels and biases are initialised as in Berkeley's ``train_val.prototxt``, not as in torchvision."""


NETWORKS = {
    # https://github.com/pytorch/vision/blob/main/torchvision/models/googlenet.py
    "torchvision": Network(
        min_size=15,  # one pixel is left after the last max pools
        widths=WIDTHS,
        batch_norm=True,
        response_norm=None,
        conv1_padding=3,
        pool_padding=0,
        branch3_kernel=3,  # not the paper's 5x5: the checkpoint has it (pytorch/vision#906)
        maxpool4_window=2,
        aux_pool_sizes=range(0),
        bgr=False,
        pixel_mean=None,
        caffe_init=False,
    ),
    # https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet
    "bvlc": Network(
        min_size=31,  # one pixel is left after the last max pools
        widths=WIDTHS,
        batch_norm=False,
        response_norm=ResponseNorm(radius=2, k=1.0, alpha=1e-4 / 5, beta=0.75),
        conv1_padding=3,
        pool_padding=0,
        branch3_kernel=5,
        maxpool4_window=3,
        # For images of 191 to 238 pixels. For others, Caffe's network has no auxiliary heads.
        aux_pool_sizes=range(12, 15),
        bgr=True,
        pixel_mean=(104.0, 117.0, 123.0),
        caffe_init=True,
    ),
    # https://storage.googleapis.com/download.tensorflow.org/models/inception5h.zip, as DeepDream and Lucid describe it
    "inception5h": Network(
        min_size=15,  # as for torchvision's network; with SAME padding, a pixel is left of any image
        widths={
            **WIDTHS,
            "inception4a": (192, 96, 204, 16, 48, 64),
            "inception5a": (256, 160, 320, 48, 128, 128),
        },
        batch_norm=False,
        response_norm=ResponseNorm(radius=5, k=2.0, alpha=1e-4, beta=0.5),
        conv1_padding="SAME",
        pool_padding="SAME",
        branch3_kernel=5,
        maxpool4_window=3,
        aux_pool_sizes=range(14, 17),  # for images of 209 to 256 pixels
        bgr=False,
        pixel_mean=(117.0, 117.0, 117.0),
        caffe_init=True,  # how Google initialised it is not known
    ),
}
"""The networks by the name of their variant."""

# The file inception_v1 of ONNX's model zoo (onnx/models#11): Berkeley's network, exported without Caffe's rounding.
NETWORKS["bvlc_floor"] = NETWORKS["bvlc"]._replace(min_size=61, pool_padding="VALID")

MIN_SIZE = min(network.min_size for network in NETWORKS.values())
"""Smallest height and width of an image that any of the networks takes, in pixels."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the RGB channels over ImageNet, for pixels in [0, 1]."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of the RGB channels over ImageNet, for pixels in [0, 1]."""

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


def kernel_shapes(network: Network, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each kernel, HWIO or [in, out], by the path of the convolution or linear layer."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (7, 7, 3, 64), "conv2": (1, 1, 64, 64), "conv3": (3, 3, 64, 192)}
    channels, large = 192, network.branch3_kernel
    for block, (width1, reduce2, width2, reduce3, width3, width4) in network.widths.items():
        shapes |= {
            f"{block}/branch1": (1, 1, channels, width1),
            f"{block}/branch2_0": (1, 1, channels, reduce2),
            f"{block}/branch2_1": (3, 3, reduce2, width2),
            f"{block}/branch3_0": (1, 1, channels, reduce3),
            f"{block}/branch3_1": (large, large, reduce3, width3),
            f"{block}/branch4_1": (1, 1, channels, width4),
        }
        channels = width1 + width2 + width3 + width4
        if head := {"inception4a": "aux1", "inception4d": "aux2"}.get(block):
            shapes |= {
                f"{head}/conv": (1, 1, channels, 128),
                f"{head}/fc1": (128 * 4 * 4, 1024),
                f"{head}/fc2": (1024, num_classes),
            }
    return {**shapes, "fc": (channels, num_classes)}


_NORMS = ("norm1", "norm2")  # stages of the networks with local response normalisation alone


def _stage_names() -> dict[str, str]:
    """Return each name of a stage or branch, ours, Caffe's, Lucid's or torchvision's -> the name that we give it."""
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
