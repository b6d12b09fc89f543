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
        "errors": ("GoogLeNetError",),
        "images.preprocessing": ("ImageError", "preprocess", "preprocess_batch"),
        "inference.export": ("ExportError", "export"),
        "inference.folding": ("fold_batch_norm",),
        "inference.predictor": ("Predictor", "make_predictor"),
        "model": ("GoogLeNet", "GoogLeNetOutput", "endpoints"),
        "weights.checkpoint": ("CheckpointError", "load", "load_metadata", "save"),
        "weights.download": ("DownloadError",),
        "weights.pretrained": ("pretrained",),
        "weights.pth": ("StateDictError", "read_state_dict"),
        "weights.torchvision": ("PortingError", "from_torchvision", "to_torchvision"),
        "training": (),
    }

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
