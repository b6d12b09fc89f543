"""GoogLeNet in JAX and Flax, proven to be torchvision's."""

from flax_googlenet.checkpoint import CheckpointError, load, load_metadata, save
from flax_googlenet.exporting import export
from flax_googlenet.inference import Predictor, fold_batch_norm, make_predictor
from flax_googlenet.model import GoogLeNet, GoogLeNetOutput, endpoints
from flax_googlenet.porting import PortingError, from_torchvision, to_torchvision
from flax_googlenet.preprocess import ImageError, preprocess, preprocess_batch

__all__ = [
    "CheckpointError",
    "GoogLeNet",
    "GoogLeNetOutput",
    "ImageError",
    "PortingError",
    "Predictor",
    "endpoints",
    "export",
    "fold_batch_norm",
    "from_torchvision",
    "load",
    "load_metadata",
    "make_predictor",
    "preprocess",
    "preprocess_batch",
    "save",
    "to_torchvision",
]
