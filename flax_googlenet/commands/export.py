"""``flax-googlenet export``."""

from importlib.util import find_spec
from typing import Annotated, Literal

from tyro.conf import arg

from flax_googlenet.commands.arguments import File, Flag, OptionalNumber, Weights
from flax_googlenet.commands.status import CommandError, Status, UsageError
from flax_googlenet.commands.terminal import Messages, require_folder_of, write_output, writing
from flax_googlenet.commands.weights import weights_file
from flax_googlenet.errors import printable


def export(
    *,
    weights: Weights,
    output: File,
    platforms: Annotated[tuple[str, ...], arg(metavar="PLATFORM ...")] = ("cpu", "cuda", "tpu"),
    size: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH", help_behavior_hint="")] = None,
    uint8: Flag = False,
    top: OptionalNumber = None,
    gradient: Flag = False,
    layout: Literal["NHWC", "NCHW"] = "NHWC",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, arg(metavar="DTYPE", help_behavior_hint="")
    ] = None,
) -> Status:
    """Write a network with its weights to one file, for JAX alone or in ONNX.

    The file is a serialized jax.export (StableHLO), for inference on any number of images. JAX promises to run it with
    any jaxlib built up to 6 months after the one that wrote it, or up to 3 weeks before. Keep the weights, so that you
    can export them again for a newer JAX. The command prints three lines of Python that run the file.

    If the name of the file ends in .onnx, it is an ONNX model instead. Its metadata has the input, the class names and
    the source of the weights. To write it, install the extra onnx: pip install "flax-googlenet[onnx]".

    Exit status:
      0    the file is written
      2    the command line is wrong
      3    nothing is written: the weights cannot be read or downloaded, the output cannot be written, the package onnx
           is missing, or JAX_PLATFORMS names a device that this machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads standard output any more

    Args:
        weights: File of weights, or imagenet for torchvision's or bvlc for Berkeley's, which are downloaded once. Files
            are written by train, flax_googlenet.save and, in the repository, port_weights.py.
        output: File to write, for example googlenet.stablehlo or googlenet.onnx. An existing file is replaced.
        platforms: Platforms that the file runs on: some of cpu, cuda, rocm and tpu. This machine need not have them. An
            ONNX model is not for particular platforms.
        size: Height and width of the images, in pixels. By default the file takes images of any size that the
            network takes.
        uint8: Take uint8 images, which the file scales and normalises. By default it takes normalised floats. An ONNX
            model without --size also resizes and crops them, as classify does.
        top: Return the probabilities and indices of the N likeliest classes instead of the logits.
        gradient: Keep the derivative with respect to the images, which doubles the size of the file. Needs --size.
        layout: Order of the axes of the images. NCHW is for ONNX models only.
        dtype: Dtype of the computation, and of the weights in an ONNX model: float32, float16 or bfloat16. The default
            is the model's own. Images stay float32 or uint8.
    """
    from jax import numpy as jnp

    from flax_googlenet.architecture import NETWORKS
    from flax_googlenet.inference.compiling import require_backend
    from flax_googlenet.inference.export import MISSING_ONNX, images_dtype
    from flax_googlenet.inference.export import export as write_export
    from flax_googlenet.weights.checkpoint import load_weights

    require_folder_of(output)
    is_onnx = output.suffix.lower() == ".onnx"
    if is_onnx and find_spec("onnx") is None:
        raise CommandError(MISSING_ONNX)
    require_backend()
    weights_path = weights_file(weights, Messages())
    loaded = load_weights(weights_path)
    if output.exists() and output.samefile(weights_path):
        raise UsageError(f"{output} is the file of weights, which would be lost: name another --output")
    model = loaded.model.clone(dtype=jnp.dtype(dtype)) if dtype else loaded.model
    with writing(output):
        write_export(
            output,
            model,
            loaded.variables,
            platforms,
            size=size,
            uint8=uint8,
            top=top,
            gradient=gradient,
            layout=layout,
            metadata={"source": f"weights with the sha256 {loaded.sha256}", **loaded.metadata},
        )
    min_size = NETWORKS[model.variant].min_size
    height, width = size or (("H", "W") if is_onnx and uint8 else (f"H >= {min_size}", f"W >= {min_size}"))
    axes = {"N": "N", "H": height, "W": width, "C": 3}
    kind = "uint8" if uint8 else f"{images_dtype(model)} ImageNet-normalised"
    images = f"# {kind} RGB [{', '.join(str(axes[axis]) for axis in layout)}]"
    results, path = "logits" if top is None else "probabilities, indices", repr(str(output))
    if not is_onnx:
        packages = "jax and flatbuffers"
        lines = (
            "from jax import export\n"
            f'predict = export.deserialize(bytearray(open({path}, "rb").read())).call\n'
            f"{results} = predict(images)  {images}\n"
        )
    elif model.dtype == jnp.bfloat16:  # in which ONNX Runtime has no convolutions for CPUs
        packages = "openvino"
        lines = (
            "import openvino\n"
            f"predict = openvino.compile_model({path})\n"
            f"[{results}] = predict(images).values()  {images}\n"
        )
    else:
        packages = "onnxruntime"
        lines = (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({path})\n"
            f'[{results}] = session.run(None, {{"images": images}})  {images}\n'
        )
    made_for = "" if is_onnx else f", for {', '.join(platforms)}"
    write_output(
        f"wrote {printable(str(output))}: {output.stat().st_size / 1e6:.1f} MB{made_for}. "
        f"It runs with {packages} alone:\n\n{lines}"
    )
    return Status.DONE
