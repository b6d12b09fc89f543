"""``flax-googlenet visualize``."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from flax_googlenet.commands.arguments import Number, OptionalWeights, Picture, known_stage
from flax_googlenet.commands.status import CommandError, Status, UsageError
from flax_googlenet.commands.terminal import Messages, require_picture, write_output, writing
from flax_googlenet.commands.weights import open_weights
from flax_googlenet.errors import printable


def visualize(
    stage: Annotated[str, arg(metavar="STAGE", help_behavior_hint="")],
    /,
    *,
    channels: Annotated[tuple[int, ...], arg(metavar="N ...")],
    weights: OptionalWeights = None,
    output: Picture = Path("features.png"),
    steps: Number = 512,
    size: Number = 224,
    seed: Number = 0,
) -> Status:
    """Show what excites channels of a stage, in images that are made to excite them.

    The picture has one image for each channel, row by row.

    Exit status:
      0    the picture is written
      2    the command line is wrong
      3    nothing is written: the weights cannot be read or downloaded, the output cannot be written, or JAX_PLATFORMS
           names a device that this machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads standard output any more

    Args:
        stage: The stage: conv1 to conv3, inception3a to inception5b, or fc, whose channels are the classes. A branch of
            a stage, such as inception4c/branch2_1, and the names of Caffe and Lucid are taken, too.
        channels: Numbers of channels of the stage, from 0.
        weights: File of weights, or imagenet for torchvision's or bvlc for Berkeley's, which are downloaded once. The
            default is that of classify.
        output: The .png file to write. An existing file is replaced.
        steps: Number of steps of the optimisation.
        size: Height and width of an image, in pixels.
        seed: Seed of the random start and of the random shifts and turns. The same seed gives the same picture.
    """
    require_picture(output)
    if steps < 1 or not 0 <= seed < 2**32:
        raise UsageError("--steps must be at least 1, and --seed at least 0 and less than 2**32")
    if not channels:
        raise UsageError("--channels needs at least one number")
    stage = known_stage(stage)

    import time

    import jax
    import numpy as np
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    from flax_googlenet.inference.compiling import require_backend, use_compilation_cache
    from flax_googlenet.visualization import feature_images
    from flax_googlenet.visualization.pictures import draw_grid
    from flax_googlenet.weights.checkpoint import require_finite

    use_compilation_cache()
    require_backend()
    messages = Messages()
    path, loaded = open_weights(weights, messages)
    require_finite(path, loaded)
    start = time.perf_counter()
    columns = BarColumn(20), TextColumn("{task.completed}/{task.total} steps"), TimeRemainingColumn()
    with messages.progress(*columns) as progress:
        task = progress.add_task("", total=steps)
        try:
            images = feature_images(
                loaded.model,
                loaded.variables,
                stage,
                channels,
                jax.random.key(seed),
                steps=steps,
                size=size,
                on_step=lambda done: progress.update(task, completed=done),
            )
        except ValueError as error:  # the stage does not have such a channel, or the size is too small
            raise UsageError(str(error)) from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise CommandError("the memory is too small: choose a smaller --size or fewer --channels") from error
    with writing(output):
        draw_grid(output, np.asarray(images))
    write_output(
        f"wrote {printable(str(output))}: {stage}, channels {', '.join(map(str, channels))}, row by row, in "
        f"{time.perf_counter() - start:.0f} s\n"
    )
    return Status.DONE
