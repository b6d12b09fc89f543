"""GoogLeNet in JAX and Flax, proven to compute the same as torchvision's.

Each name is imported when it is first used, so that the command's ``--help`` need not wait for JAX, nor inference for
optax.
"""

TYPE_CHECKING = False  # the import of typing would take longer than everything else here
if TYPE_CHECKING:  # "as" the same name tells type checkers that the name is public
    from flax_googlenet import training as training
    from flax_googlenet import visualization as visualization
    from flax_googlenet.errors import GoogLeNetError as GoogLeNetError
    from flax_googlenet.images.preprocessing import ImageError as ImageError
    from flax_googlenet.images.preprocessing import preprocess as preprocess
    from flax_googlenet.images.preprocessing import preprocess_batch as preprocess_batch
    from flax_googlenet.inference.batches import BatchPredictor as BatchPredictor
    from flax_googlenet.inference.batches import decode_batch as decode_batch
    from flax_googlenet.inference.export import ExportError as ExportError
    from flax_googlenet.inference.export import export as export
    from flax_googlenet.inference.folding import fold_batch_norm as fold_batch_norm
    from flax_googlenet.inference.predictor import Predictor as Predictor
    from flax_googlenet.inference.predictor import make_predictor as make_predictor
    from flax_googlenet.model import GoogLeNet as GoogLeNet
    from flax_googlenet.model import GoogLeNetOutput as GoogLeNetOutput
    from flax_googlenet.model import endpoints as endpoints
    from flax_googlenet.weights.caffe import from_caffe as from_caffe
    from flax_googlenet.weights.checkpoint import CheckpointError as CheckpointError
    from flax_googlenet.weights.checkpoint import load as load
    from flax_googlenet.weights.checkpoint import load_metadata as load_metadata
    from flax_googlenet.weights.checkpoint import save as save
    from flax_googlenet.weights.download import DownloadError as DownloadError
    from flax_googlenet.weights.onnx import from_onnx as from_onnx
    from flax_googlenet.weights.pretrained import pretrained as pretrained
    from flax_googlenet.weights.pth import StateDictError as StateDictError
    from flax_googlenet.weights.pth import read_state_dict as read_state_dict
    from flax_googlenet.weights.tensorflow import from_tensorflow as from_tensorflow
    from flax_googlenet.weights.torchvision import PortingError as PortingError
    from flax_googlenet.weights.torchvision import from_torchvision as from_torchvision
    from flax_googlenet.weights.torchvision import to_torchvision as to_torchvision

    __version__: str
else:  # hidden from type checkers, which would accept any name because of __getattr__
    _MODULES = {
        "errors": ("GoogLeNetError",),
        "images.preprocessing": ("ImageError", "preprocess", "preprocess_batch"),
        "inference.batches": ("BatchPredictor", "decode_batch"),
        "inference.export": ("ExportError", "export"),
        "inference.folding": ("fold_batch_norm",),
        "inference.predictor": ("Predictor", "make_predictor"),
        "model": ("GoogLeNet", "GoogLeNetOutput", "endpoints"),
        "weights.caffe": ("from_caffe",),
        "weights.checkpoint": ("CheckpointError", "load", "load_metadata", "save"),
        "weights.download": ("DownloadError",),
        "weights.pretrained": ("pretrained",),
        "weights.pth": ("StateDictError", "read_state_dict"),
        "weights.onnx": ("from_onnx",),
        "weights.tensorflow": ("from_tensorflow",),
        "weights.torchvision": ("PortingError", "from_torchvision", "to_torchvision"),
        "training": (),
        "visualization": (),
    }
    __all__ = sorted(name for names in _MODULES.values() for name in names)

    def _get_lazily(package: str, modules: dict[str, tuple[str, ...]], name: str) -> object:
        """Import a name of a package from the module that has it, or import the module itself."""
        import sys
        from importlib import import_module

        if name in modules:
            return import_module(f"{package}.{name}")
        for module, names in modules.items():
            if name in names:
                value = vars(sys.modules[package])[name] = getattr(import_module(f"{package}.{module}"), name)
                return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib import metadata

            return metadata.version("flax-googlenet")
        return _get_lazily(__name__, _MODULES, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "training", "visualization"})
