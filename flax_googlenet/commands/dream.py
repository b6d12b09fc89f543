"""``flax-googlenet dream``."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from flax_googlenet.commands.arguments import Number, OptionalWeights, Picture, Stage, known_stage
from flax_googlenet.commands.status import CommandError, Status, UsageError
from flax_googlenet.commands.terminal import Messages, require_picture, write_output, writing
from flax_googlenet.commands.weights import open_weights
from flax_googlenet.errors import printable


def dream(
    image: Annotated[Path, arg(metavar="IMAGE", help_behavior_hint="")],
    /,
    *,
    weights: OptionalWeights = None,
    output: Picture = Path("dream.png"),
    stage: Stage = "inception4c",
    octaves: Number = 4,
    steps: Number = 10,
    seed: Number = 0,
) -> Status:
    """Change a picture so that a stage sees more of what it sees in it.

    The picture keeps its size. It is changed first in a small size and then in larger ones, the octaves. Large
    pictures are computed in tiles, so that the memory does not grow with them.

    Exit status:
      0    the picture is written
      2    the command line is wrong
      3    nothing is written: the image or the weights cannot be read, the weights cannot be downloaded, the output
           cannot be written, or JAX_PLATFORMS names a device that this machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads standard output any more

    Args:
        image: The picture to start from.
        weights: File of weights, or imagenet for torchvision's or bvlc for Berkeley's, which are downloaded once. The
            default is that of classify.
        output: The .png file to write. An existing file is replaced.
        stage: The stage: conv1 to conv3, or inception3a to inception5b. Early stages draw edges and textures, late ones
            parts of animals and things.
        octaves: Number of sizes, each 1.4 times as large as the one before.
        steps: Number of steps in each size.
        seed: Seed of the random shifts. The same seed gives the same picture.
    """
    require_picture(output)
    if min(octaves, steps) < 1 or not 0 <= seed < 2**32:
        raise UsageError("--octaves and --steps must be at least 1, and --seed at least 0 and less than 2**32")
    known_stage(stage)

    import time

    import jax
    import numpy as np
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    from flax_googlenet.images.preprocessing import ImageError, rgb
    from flax_googlenet.inference.compiling import require_backend, use_compilation_cache
    from flax_googlenet.visualization.dream import deep_dream, octave_sizes
    from flax_googlenet.visualization.pictures import to_picture, write_picture
    from flax_googlenet.weights.checkpoint import require_finite

    use_compilation_cache()
    require_backend()
    messages = Messages()
    picture = rgb(image)
    path, loaded = open_weights(weights, messages)
    require_finite(path, loaded)
    stage = known_stage(stage, loaded.model.variant)  # norm1 and norm2 are stages of one network alone
    start = time.perf_counter()
    columns = BarColumn(20), TextColumn("{task.completed}/{task.total} steps"), TimeRemainingColumn()
    with messages.progress(*columns) as progress:
        sizes = octave_sizes(loaded.model, picture.height, picture.width, octaves)
        task = progress.add_task("", total=steps * len(sizes))
        try:
            result = deep_dream(
                loaded.model,
                loaded.variables,
                picture,
                stage,
                octaves=octaves,
                steps=steps,
                key=jax.random.key(seed),
                on_step=lambda done: progress.update(task, completed=done),
            )
        except ImageError as error:  # the picture is too small
            raise CommandError(f"{image}: {error}") from error
    with writing(output):
        write_picture(output, to_picture(np.asarray(result)))
    write_output(
        f"wrote {printable(str(output))}, {picture.width}x{picture.height}, in {time.perf_counter() - start:.0f} s\n"
    )
    return Status.DONE
