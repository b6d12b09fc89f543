"""GoogLeNet in JAX and Flax, proven to be torchvision's.

Each name is imported when it is first used, so that the command's ``--help`` need not wait for JAX, nor inference for
optax.
"""

TYPE_CHECKING = False  # the import of typing would take longer than everything else here
if TYPE_CHECKING:
    from flax_googlenet import training as training
    from flax_googlenet.errors import GoogLeNetError
    from flax_googlenet.images.preprocessing import ImageError, preprocess, preprocess_batch
    from flax_googlenet.inference.export import ExportError, export
    from flax_googlenet.inference.folding import fold_batch_norm
    from flax_googlenet.inference.predictor import Predictor, make_predictor
    from flax_googlenet.model import GoogLeNet, GoogLeNetOutput, endpoints
    from flax_googlenet.weights.checkpoint import CheckpointError, load, load_metadata, save
    from flax_googlenet.weights.download import DownloadError
    from flax_googlenet.weights.pretrained import pretrained
    from flax_googlenet.weights.pth import StateDictError, read_state_dict
    from flax_googlenet.weights.torchvision import PortingError, from_torchvision, to_torchvision

    __version__: str
else:  # hidden from type checkers, which would accept any name because of __getattr__
    _MODULES = {
        "CheckpointError": "weights.checkpoint",
        "DownloadError": "weights.download",
        "ExportError": "inference.export",
        "GoogLeNet": "model",
        "GoogLeNetError": "errors",
        "GoogLeNetOutput": "model",
        "ImageError": "images.preprocessing",
        "PortingError": "weights.torchvision",
        "Predictor": "inference.predictor",
        "StateDictError": "weights.pth",
        "endpoints": "model",
        "export": "inference.export",
        "fold_batch_norm": "inference.folding",
        "from_torchvision": "weights.torchvision",
        "load": "weights.checkpoint",
        "load_metadata": "weights.checkpoint",
        "make_predictor": "inference.predictor",
        "preprocess": "images.preprocessing",
        "preprocess_batch": "images.preprocessing",
        "pretrained": "weights.pretrained",
        "read_state_dict": "weights.pth",
        "save": "weights.checkpoint",
        "to_torchvision": "weights.torchvision",
    }

    def __getattr__(name: str) -> object:
        from importlib import import_module, metadata

        if name == "training":
            return import_module("flax_googlenet.training")
        if name == "__version__":
            return metadata.version("flax-googlenet")
        if name not in _MODULES:
            raise AttributeError(f"module 'flax_googlenet' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"flax_googlenet.{_MODULES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "training"})


__all__ = [
    "CheckpointError",
    "DownloadError",
    "ExportError",
    "GoogLeNet",
    "GoogLeNetError",
    "GoogLeNetOutput",
    "ImageError",
    "PortingError",
    "Predictor",
    "StateDictError",
    "endpoints",
    "export",
    "fold_batch_norm",
    "from_torchvision",
    "load",
    "load_metadata",
    "make_predictor",
    "preprocess",
    "preprocess_batch",
    "pretrained",
    "read_state_dict",
    "save",
    "to_torchvision",
]
