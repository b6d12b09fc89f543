"""``flax-googlenet classify``."""

from json import dumps
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from flax_googlenet.commands.arguments import Flag, Number, OptionalFile, OptionalWeights, require_batch_size
from flax_googlenet.commands.results import SUFFIXES, Row, open_results
from flax_googlenet.commands.status import Status, UsageError
from flax_googlenet.commands.streaming import ImageStream
from flax_googlenet.commands.terminal import Messages, require_folder_of, write_output
from flax_googlenet.commands.weights import open_weights
from flax_googlenet.errors import printable

if TYPE_CHECKING:
    import jax
    from rich.console import Group


def classify(
    images: Annotated[tuple[str, ...], arg(metavar="IMAGE|FOLDER|GLOB ...", help_behavior_hint="")],
    /,
    *,
    weights: OptionalWeights = None,
    json: Flag = False,
    output: OptionalFile = None,
    top: Number = 5,
    batch_size: Number = 32,
) -> Status:
    """Name the likeliest classes of images.

    The images are resized to the size that the weights were trained for, which is 224x224 unless train was given
    another one. A folder stands for all images in it and in the folders below it, except hidden ones. Photographs in
    HEIC are read where pillow-heif is installed. An --output file grows batch by batch. If the command is interrupted,
    run it again: it skips the images that have a row in the file, and tries the unreadable ones again.

    Exit status:
      0    all images are classified
      1    some images could not be read; standard error names them, and the others are classified
      2    the command line is wrong
      3    nothing is classified: there is no such file or no image, the weights cannot be read or downloaded, the
           output cannot be written, or JAX_PLATFORMS names a device that this machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads standard output any more

    Args:
        images: Files, folders, and globs such as 'photos/**/*.jpg'.
        weights: File of weights, or imagenet for torchvision's or bvlc for Berkeley's, which are downloaded once. Files
            are written by train, flax_googlenet.save and, in the repository, port_weights.py. By default
            googlenet-imagenet.safetensors or googlenet-random.safetensors in the working folder, or else imagenet.
        json: Print one line of JSON for each image: {"image", "predictions": [{"index", "label", "probability"}]}.
        output: Write to this .csv, .jsonl or .parquet file instead of standard output. Cannot be combined with --json.
        top: Number of classes to name, the likeliest first.
        batch_size: Number of images to compute at once.
    """
    if not images:
        raise UsageError("no images: name files, folders or globs")
    if top < 1:
        raise UsageError("--top must be at least 1")
    require_batch_size(batch_size)
    if output and output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{output}: --output must end in one of {', '.join(SUFFIXES)}")
    if output and json:
        raise UsageError("--json is for standard output: leave it out, or --output")
    if output:
        require_folder_of(output)

    from contextlib import nullcontext

    from rich.console import Console

    from flax_googlenet.inference.compiling import require_backend, use_compilation_cache
    from flax_googlenet.inference.predictor import make_predictor, probabilities, rank

    use_compilation_cache()
    require_backend()
    messages = Messages()
    stream = ImageStream(images, messages)
    if stream.is_empty:
        return Status.NOT_DONE
    weights, loaded = open_weights(weights, messages)
    top = min(top, loaded.model.num_classes)
    predict = make_predictor(loaded.model, loaded.variables)
    screen = Console(highlight=False)
    with nullcontext() if output is None else open_results(output, loaded.digest, top, messages.warn) as results:

        def take(names: list[str], logits: "jax.Array") -> None:
            rows: list[Row] = [
                {"image": name, "predictions": rank(row, top, loaded.class_names)}
                for name, row in zip(names, probabilities(logits, str(weights)), strict=True)
            ]
            if results:
                results.append(rows)
            elif json:
                write_output("".join(f"{dumps(row)}\n" for row in rows))
            else:
                with screen.capture() as blocks:
                    for row in rows:
                        screen.print(_block(row))
                write_output(blocks.get())

        claim = results.claim if results else None
        # On the terminal that shows the answers, progress would be noise.
        hidden = screen.file.isatty() and output is None
        stream.compute(predict, take, image_size=loaded.image_size, batch_size=batch_size, claim=claim, hidden=hidden)
    return stream.conclude(results.skipped if results else 0)


def _block(row: Row) -> "Group":
    """Return what a person sees of an image: its name, and a line with a bar for each class."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for prediction in row["predictions"]:
        probability = prediction["probability"]
        label = prediction["label"] or f"class {prediction['index']}"
        bar = ProgressBar(total=1, completed=probability, width=30)
        table.add_row("", Text(printable(label)), f"{probability:7.2%}", bar)
    return Group(Text(printable(row["image"]), style="bold"), table, "")
