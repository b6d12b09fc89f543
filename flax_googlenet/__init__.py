"""GoogLeNet in JAX and Flax, proven to be torchvision's.

A name is imported when it is first used: the command's ``--help`` need not wait for JAX, nor inference for optax.
"""

TYPE_CHECKING = False  # typing's own takes longer to import than the rest
if TYPE_CHECKING:
    from flax_googlenet import training as training
    from flax_googlenet.checkpoint import CheckpointError, load, load_metadata, save
    from flax_googlenet.exporting import export
    from flax_googlenet.inference import Predictor, fold_batch_norm, make_predictor
    from flax_googlenet.model import GoogLeNet, GoogLeNetOutput, endpoints
    from flax_googlenet.porting import PortingError, from_torchvision, to_torchvision
    from flax_googlenet.preprocessing import ImageError, preprocess, preprocess_batch

    __version__: str
else:  # where a type checker sees it, it would accept any name
    _MODULES = {
        "CheckpointError": "checkpoint",
        "GoogLeNet": "model",
        "GoogLeNetOutput": "model",
        "ImageError": "preprocessing",
        "PortingError": "porting",
        "Predictor": "inference",
        "endpoints": "model",
        "export": "exporting",
        "fold_batch_norm": "inference",
        "from_torchvision": "porting",
        "load": "checkpoint",
        "load_metadata": "checkpoint",
        "make_predictor": "inference",
        "preprocess": "preprocessing",
        "preprocess_batch": "preprocessing",
        "save": "checkpoint",
        "to_torchvision": "porting",
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
