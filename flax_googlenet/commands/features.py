"""``flax-googlenet features``."""

from typing import Annotated

from tyro.conf import arg

from flax_googlenet.commands.arguments import (
    File,
    Flag,
    Number,
    OptionalWeights,
    Stage,
    known_stage,
    require_batch_size,
)
from flax_googlenet.commands.status import CommandError, Status, UsageError
from flax_googlenet.commands.streaming import ImageStream
from flax_googlenet.commands.terminal import Messages, require_folder_of
from flax_googlenet.commands.weights import open_weights


def features(
    images: Annotated[tuple[str, ...], arg(metavar="IMAGE|FOLDER|GLOB ...", help_behavior_hint="")],
    /,
    *,
    output: File,
    stage: Stage = "avgpool",
    positions: Flag = False,
    weights: OptionalWeights = None,
    batch_size: Number = 32,
) -> Status:
    """Write the features that a stage of the network computes for images.

    The images are found, read and resized as by classify, and the features are those of flax_googlenet.endpoints, in
    float32: one vector for each image, for a linear probe, or with --positions those of every position, for a sparse
    autoencoder.

    A .npz file has the arrays features, images (the file names), stage and weights (the first digits of the sha256 of
    their file). A .parquet file has a row for each image with the columns image and features, and has stage, weights
    and shape in the metadata of its schema.

    Only the names of the images stay in memory: the features go to the disk batch by batch, and wait in FILE.part until
    all are there. If the command is interrupted, run it again: it goes on after the last complete batch, and the file
    gets the same bits as without the interruption. A finished file gets the features of new images, and unreadable
    images are tried again.

    Exit status:
      0    the features of all images are written
      1    some images could not be read; standard error names them, and the features of the others are written
      2    the command line is wrong
      3    nothing is written: there is no such file or no image, the weights cannot be read or downloaded, the output
           cannot be written or has features of other weights, another stage or another shape, the memory is too small
           for --batch-size, or JAX_PLATFORMS names a device that this machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted

    Args:
        images: Files, folders, and globs such as 'photos/**/*.jpg'.
        output: The .npz or .parquet file to write. Parquet needs PyArrow, and can be read in parts.
        stage: The stage: conv1 to conv3, maxpool1 to maxpool4, inception3a to inception5b, avgpool or fc. A branch of a
            stage, such as inception4c/branch2_1, and the names of Caffe and Lucid are taken, too.
        positions: Write the features of every position, [H, W, C] for each image. By default their mean over the
            positions is written, [C].
        weights: File of weights, or imagenet for torchvision's or bvlc for Berkeley's, which are downloaded once. The
            default is that of classify.
        batch_size: Number of images to compute at once.
    """
    from flax_googlenet.commands.feature_files import SUFFIXES, Source, open_features

    if not images:
        raise UsageError("no images: name files, folders or globs")
    require_batch_size(batch_size)
    if output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{output}: --output must end in one of {', '.join(SUFFIXES)}")
    require_folder_of(output)
    known_stage(stage)

    import jax
    import numpy as np
    from jax import numpy as jnp

    from flax_googlenet.inference import compiling
    from flax_googlenet.inference.stages import feature_function
    from flax_googlenet.weights.checkpoint import require_finite

    compiling.use_compilation_cache()
    compiling.require_backend()
    messages = Messages()
    stream = ImageStream(images, messages)
    if stream.is_empty:
        return Status.NOT_DONE
    path, loaded = open_weights(weights, messages)
    require_finite(path, loaded)  # on a CPU, a ReLU that XLA fuses with the mean makes zeros of NaN
    # Checked again, because torchvision's network has no stages norm1 and norm2.
    name, size = known_stage(stage, loaded.model.variant), loaded.image_size

    compute = feature_function(loaded.model, name, positions=positions)
    variables = jax.device_put(loaded.variables)
    pixels = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32)
    source = Source(loaded.digest, name, compute.eval_shape(variables, pixels).shape[1:])

    def send(pixels: np.ndarray) -> jax.Array:
        # The last batch, too, has the size for which the network is compiled.
        padding = [(0, batch_size - len(pixels)), (0, 0), (0, 0), (0, 0)]
        return compute(variables, jnp.asarray(np.pad(pixels, padding)))

    with open_features(output, source, messages.warn) as file:
        try:
            stream.compute(
                send,
                lambda images, batch: file.append(images, np.asarray(batch)[: len(images)]),
                image_size=size,
                batch_size=batch_size,
                claim=file.claim,
            )
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise CommandError("the memory is too small: choose a smaller --batch-size") from error
    return stream.conclude(file.skipped)
