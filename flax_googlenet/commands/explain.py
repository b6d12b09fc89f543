"""``flax-googlenet explain``."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from flax_googlenet.commands.arguments import Number, OptionalWeights, Picture, Stage, known_stage
from flax_googlenet.commands.status import CommandError, Status, UsageError
from flax_googlenet.commands.terminal import Messages, require_picture, write_output, writing
from flax_googlenet.commands.weights import open_weights
from flax_googlenet.errors import install_advice, printable

_MAX_TOP = 100  # the picture is 390 pixels wide for each class, and matplotlib draws fewer than 2**16


def explain(
    image: Annotated[Path, arg(metavar="IMAGE", help_behavior_hint="")],
    /,
    *,
    weights: OptionalWeights = None,
    output: Picture = Path("explanation.png"),
    stage: Stage = "inception5b",
    top: Number = 3,
) -> Status:
    """Show where in an image the network finds its likeliest classes.

    The picture has the part of the image that the network sees, and beside it the heat of each class by Grad-CAM: where
    it is bright, the network finds what speaks for the class.

    Exit status:
      0    the picture is written
      2    the command line is wrong
      3    nothing is written: the image or the weights cannot be read, the weights cannot be downloaded, the output
           cannot be written, or JAX_PLATFORMS names a device that this machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads standard output any more

    Args:
        image: The image to explain.
        weights: File of weights, or imagenet for torchvision's or bvlc for Berkeley's, which are downloaded once. The
            default is that of classify.
        output: The .png file to write. An existing file is replaced.
        stage: The stage whose features are looked at: conv1 to conv3, or inception3a to inception5b. Early stages show
            small parts of the image, late ones whole objects.
        top: Number of classes to show, the likeliest first; at most 100.
    """
    require_picture(output)
    if not 1 <= top <= _MAX_TOP:
        raise UsageError(f"--top must be at least 1 and at most {_MAX_TOP}")
    stage = known_stage(stage)
    if find_spec("matplotlib") is None:
        raise CommandError(f"matplotlib is not installed: {install_advice('train')}")

    import numpy as np

    from flax_googlenet.images.preprocessing import denormalise, preprocess, rgb
    from flax_googlenet.inference.compiling import require_backend, use_compilation_cache
    from flax_googlenet.inference.predictor import make_predictor, probabilities, rank
    from flax_googlenet.visualization import grad_cam
    from flax_googlenet.visualization.pictures import draw_explanation

    use_compilation_cache()
    require_backend()
    messages = Messages()
    picture = rgb(image)
    path, loaded = open_weights(weights, messages)
    pixels = preprocess(picture, loaded.image_size)[None]  # [1, h, w, 3]
    model, variables = loaded.model, loaded.variables
    with messages.spinner("computing"):
        (row,) = probabilities(make_predictor(model, variables)(pixels), str(path))
        predictions = rank(row, min(top, model.num_classes), loaded.class_names)
        classes = np.array([prediction["index"] for prediction in predictions])
        try:
            # One class after the other, so that the memory does not grow with their number.
            heats = [np.asarray(grad_cam(model, variables, pixels, each, stage)[0]) for each in classes[:, None]]
        except ValueError as error:  # a stage without height and width, or one that this network does not have
            raise UsageError(str(error)) from error
    labels = [str(prediction["label"] or f"class {prediction['index']}") for prediction in predictions]
    with writing(output):
        photograph = denormalise(pixels[0])
        numbered = draw_explanation(
            output, photograph, np.stack(heats), classes.tolist(), labels, row[classes].tolist()
        )
    messages.warn_of_undrawable_names(output, numbered)
    named = ", ".join(f"{printable(label)} {row[index]:.1%}" for label, index in zip(labels, classes, strict=True))
    write_output(f"wrote {printable(str(output))}: {named}\n")
    return Status.DONE
