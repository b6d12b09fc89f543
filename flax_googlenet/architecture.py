"""The facts about the network that need no JAX: the names and widths of its blocks, and what its images are."""

MIN_SIZE = 15
"""Smallest height and width of an image in pixels: one pixel is left before the last max pools."""

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
