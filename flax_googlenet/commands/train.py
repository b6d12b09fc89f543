"""``flax-googlenet train``."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from flax_googlenet.commands.aborts import aborts_in_one_line
from flax_googlenet.commands.arguments import Flag, OptionalWeights
from flax_googlenet.commands.status import CommandError, CrashError, Status, UsageError, describe_crash
from flax_googlenet.commands.terminal import Messages, draws_progress
from flax_googlenet.commands.weights import weights_file
from flax_googlenet.errors import GoogLeNetError, install_advice
from flax_googlenet.training.recipe import PRESETS, Recipe

STARTING = "starting: loading JAX, then looking at the data"
"""The first line that the command prints, at once: JAX, the data and the network take their time."""


def train(
    data: Annotated[str, arg(metavar="DATA", help_behavior_hint="")],
    /,
    *,
    workdir: Annotated[Path, arg(metavar="FOLDER")],
    preset: Annotated[str | None, arg(metavar="|".join(PRESETS), help_behavior_hint="")] = None,
    weights: OptionalWeights = None,
    distributed: Flag = False,
    override: Flag = False,
    recipe: Any = None,
) -> Status:
    """Train a network on your images, or fine-tune weights on them.

    The run can be stopped at any time: the same command then continues it. On a CPU a run that was stopped and
    continued ends in the same bits as one that was not. The folder of the run holds model.safetensors with the last
    weights, best.safetensors with those of the best accuracy on the held-out images, and curves.png. Both files of
    weights are for evaluate, classify, export and, in the repository, port_weights.py --to-torchvision.

    Exit status:
      0    the run is complete
      2    the command line is wrong
      3    nothing is trained: the data or the weights cannot be read, the weights cannot be downloaded, the folder is
           in use or holds a run of another recipe, JAX_PLATFORMS names a device that this machine does not have, or
           --distributed does not find the other processes
      4    the run stopped itself: losses that are not finite, unreadable images, a full disk, a worker process that
           died or was suspended, no batch of images for 10 minutes, or another process of the run that is gone
      70   an unexpected error; its traceback is in the file in FOLDER that the message names
      130  Ctrl-C: the run finished its step and saved a checkpoint. A second Ctrl-C, or one before the first step,
           ends it at once
      143  SIGTERM: the same as for Ctrl-C

    Args:
        data: A folder with a folder for each class, some of whose images are held out; a folder of two such folders,
            train and val (or Training and Testing, or the like); a folder of IDX files; or the word digits for
            scikit-learn's digits.
        workdir: Folder of the run.
        preset: Recipe to start from. By default finetune with --weights, digits for the data digits, and imagenet
            otherwise.
        weights: File of weights to start from, or imagenet for torchvision's or bvlc for Berkeley's, which are
            downloaded once. Files are written by train, flax_googlenet.save and, in the repository, port_weights.py. If
            the classes are not those of the data, the heads are replaced by new ones.
        distributed: Join other processes in one run. They are found through Slurm, Open MPI, Kubernetes, the host of a
            TPU, or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
        override: Continue the run in the folder even if the recipe, the data or the weights have changed.
        recipe: The defaults are those of the preset: put --preset or --weights before --help to see them.
    """
    require_training_packages()
    if workdir.exists() and not workdir.is_dir():
        raise CommandError(f"cannot write {workdir}: it is not a folder; choose another --workdir")
    weights = weights_file(weights, Messages()) if weights else None
    import jax

    from flax_googlenet import training
    from flax_googlenet.inference.compiling import use_compilation_cache

    training.keep_memory()
    use_compilation_cache()
    with display() as shown, aborts_in_one_line() if distributed else nullcontext():
        try:
            result = training.train(
                data, workdir, recipe, weights=weights, distributed=distributed, override=override, **shown
            )
        except training.TrainingStopped as stopped:
            if stopped.signal is None:
                raise
            if jax.process_index() == 0:
                shown["report"](str(stopped))
            return Status(128 + stopped.signal)
        except (GoogLeNetError, OSError):
            raise
        except Exception as error:
            raise CrashError(describe_crash(error, workdir if workdir.is_dir() else None)) from error
        if jax.process_index() == 0:
            path = shlex.quote(str(result.weights))
            shown["report"](f"held out: {result.metrics['accuracy']:.2%} right, by {result.weights}; next:")
            shown["report"](f"  flax-googlenet evaluate {path} {shlex.quote(data)}")
            shown["report"](f"  python convert/port_weights.py {path} --to-torchvision FILE.pth  # in the repository")
        return Status.DONE


@contextmanager
def display() -> Iterator[dict[str, Any]]:
    """Show the messages of a training, and a bar where one can be drawn.

    Yields:
        The arguments ``report`` and ``progress`` of ``flax_googlenet.training.train``.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    messages = Messages()
    if not draws_progress(messages.console):
        yield {"report": messages.note, "progress": None}
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    # rich averages the speed over an hour. With its default of 30 seconds, one evaluation would make the time left jump
    # to hours.
    bar = Progress(*columns, console=messages.console, redirect_stdout=False, speed_estimate_period=3600)

    def progress(step: int, total: int, text: str) -> None:
        if not bar.tasks:
            bar.add_task("", total=total, completed=step)
            bar.start()
        bar.update(bar.tasks[0].id, completed=step, description=text)

    try:
        yield {"report": messages.note, "progress": progress}
    finally:
        bar.stop()


def require_training_packages() -> None:
    """Raise a CommandError if a package of the extra ``train`` is not installed."""
    # optax and orbax are always there: Flax needs them.
    missing = [name for name in ("grain", "matplotlib", "sklearn", "tensorboardX") if find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} is not installed: {install_advice('train')}")


def default_recipe(arguments: Sequence[str]) -> Recipe:
    """Return the recipe whose fields a command line of ``train`` changes one by one, and ``--help`` shows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--workdir")
    parser.add_argument("--weights")
    parser.add_argument("--preset")
    try:
        known, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # an option without its value: the message is tyro's
        known, others = argparse.Namespace(preset="imagenet"), []
    preset = known.preset or ("finetune" if known.weights else "digits" if "digits" in others else "imagenet")
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    return PRESETS[preset]
