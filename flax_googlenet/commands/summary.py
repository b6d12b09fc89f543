"""``flax-googlenet summary``."""

from json import dumps
from typing import TYPE_CHECKING

from flax_googlenet.commands.arguments import Flag, OptionalNumber, OptionalWeights
from flax_googlenet.commands.status import Status, UsageError
from flax_googlenet.commands.terminal import Messages, write_output
from flax_googlenet.commands.weights import weights_file

if TYPE_CHECKING:
    from flax_googlenet.inference.stages import Stage


def summary(*, weights: OptionalWeights = None, size: OptionalNumber = None, json: Flag = False) -> Status:
    """Show the stages of a network with their shapes, parameters and multiply-adds.

    Multiply-adds are counted in convolutions and dense layers. No weights are computed.

    Exit status:
      0    the summary is printed
      2    the command line is wrong
      3    nothing is printed: the weights cannot be read or downloaded, or JAX_PLATFORMS names a device that this
           machine does not have
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads standard output any more

    Args:
        weights: File of weights, or imagenet for torchvision's or bvlc for Berkeley's. By default torchvision's network
            is shown, for which no weights are needed.
        size: Height and width of the images, in pixels. By default the size that the weights were trained for, or 224.
        json: Print one line of JSON: {"image_size", "parameters", "parameters_with_auxiliary_heads", "multiply_adds",
            "stages": [{"name", "output", "parameters", "multiply_adds"}]}.
    """
    from rich.console import Console
    from rich.table import Table

    from flax_googlenet.architecture import NETWORKS
    from flax_googlenet.images.preprocessing import CROP
    from flax_googlenet.inference.compiling import require_backend
    from flax_googlenet.inference.stages import summarize
    from flax_googlenet.model import GoogLeNet
    from flax_googlenet.weights.checkpoint import load_weights

    require_backend()
    loaded = load_weights(weights_file(weights, Messages())) if weights else None
    model = loaded.model if loaded else GoogLeNet()
    min_size = NETWORKS[model.variant].min_size
    if size is not None and size < min_size:
        raise UsageError(f"--size must be at least {min_size}, got {size}")
    size = size or (loaded.image_size if loaded else CROP)
    stages = summarize(model, size)
    inference = [stage for stage in stages if not stage.name.startswith("aux")]
    parameters = sum(stage.parameters for stage in inference)
    parameters_with_heads = sum(stage.parameters for stage in stages)
    multiply_adds = sum(stage.multiply_adds for stage in inference)
    if json:
        content = {
            "image_size": size,
            "parameters": parameters,
            "parameters_with_auxiliary_heads": parameters_with_heads,
            "multiply_adds": multiply_adds,
            "stages": [stage._asdict() for stage in stages],
        }
        write_output(dumps(content) + "\n")
        return Status.DONE
    table = Table("stage", caption=f"multiply-adds for one image of {size}x{size}")
    for header in ("output", "parameters", "multiply-adds"):
        table.add_column(header, justify="right")
    for stage in inference:
        table.add_row(*_cells(stage), end_section=stage is inference[-1])
    table.add_row("total", "", f"{parameters:,}", f"{multiply_adds / 1e9:.3f} G", end_section=True)
    if stages != inference:
        for stage in stages[len(inference) :]:
            table.add_row(*_cells(stage), end_section=stage is stages[-1])
        table.add_row("with auxiliary heads", "", f"{parameters_with_heads:,}", "in training")
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    write_output(captured.get())
    return Status.DONE


def _cells(stage: "Stage") -> tuple[str, ...]:
    output = "x".join(map(str, stage.output))
    if not stage.parameters:
        return stage.name, output
    return stage.name, output, f"{stage.parameters:,}", f"{stage.multiply_adds / 1e6:,.1f} M"
