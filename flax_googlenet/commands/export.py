"""``flax-googlenet export``."""

from typing import Annotated

from tyro.conf import arg

from flax_googlenet.commands.arguments import File, Flag, OptionalNumber, Weights
from flax_googlenet.commands.status import Status
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
) -> Status:
    """Write a network with its weights to one file that runs with JAX alone.

    The file is a serialized jax.export (StableHLO), for inference on any number of images. JAX promises to run it with
    any jaxlib built up to 6 months after the one that wrote it, or up to 3 weeks before. Keep the weights, so that you
    can export them again for a newer JAX. The command prints three lines of Python that run the file.

    Exit status:
      0    the file is written
      2    the command line is wrong
      3    nothing is written: the weights cannot be read or downloaded, the output cannot be written, or JAX_PLATFORMS
           names a device that this machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads standard output any more

    Args:
        weights: File of weights, or imagenet for torchvision's or bvlc for Berkeley's, which are downloaded once. Files
            are written by train, flax_googlenet.save and, in the repository, port_weights.py.
        output: File to write, for example googlenet.stablehlo. An existing file is replaced.
        platforms: Platforms that the file runs on: some of cpu, cuda, rocm and tpu. This machine need not have them.
        size: Height and width of the images, in pixels. By default the file takes images of any size from 15 up.
        uint8: Take uint8 images, which the file scales and normalises. By default it takes normalised floats.
        top: Return the probabilities and indices of the N likeliest classes instead of the logits.
        gradient: Keep the derivative with respect to the images, which doubles the size of the file. Needs --size.
    """
    from flax_googlenet.architecture import NETWORKS
    from flax_googlenet.inference.compiling import require_backend
    from flax_googlenet.inference.export import export as write_export
    from flax_googlenet.inference.export import images_dtype
    from flax_googlenet.weights.checkpoint import load_weights

    require_folder_of(output)
    require_backend()
    loaded = load_weights(weights_file(weights, Messages()))
    with writing(output):
        write_export(
            output, loaded.model, loaded.variables, platforms, size=size, uint8=uint8, top=top, gradient=gradient
        )
    min_size = NETWORKS[loaded.model.variant].min_size
    height, width = size or (f"H >= {min_size}", f"W >= {min_size}")
    kind = "uint8" if uint8 else f"{images_dtype(loaded.model)} ImageNet-normalised"
    results = "logits" if top is None else "probabilities, indices"
    write_output(
        f"wrote {printable(str(output))}: {output.stat().st_size / 1e6:.1f} MB, for {', '.join(platforms)}. "
        "It runs with jax and flatbuffers alone:\n\n"
        "from jax import export\n"
        f'predict = export.deserialize(bytearray(open({str(output)!r}, "rb").read())).call\n'
        f"{results} = predict(images)  # {kind} RGB [N, {height}, {width}, 3]\n"
    )
    return Status.DONE
