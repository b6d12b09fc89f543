"""The subcommands of ``flax-googlenet``, a function each, and how they end; what they do is in modules of their own.

JAX is not imported until a subcommand runs: ``--help`` and a wrong option need not wait for it.
"""

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

import flax_googlenet
from flax_googlenet.commands.arguments import parse
from flax_googlenet.commands.status import (
    CommandError,
    Status,
    describe_crash,
    message_console,
    prepare_process,
    write_output,
)
from flax_googlenet.errors import install_advice, printable

if TYPE_CHECKING:
    from flax_googlenet.training.recipe import Recipe

STARTING = "starting: loading JAX, then looking at the data"
"""The first line of ``train``."""

File = Annotated[Path, arg(metavar="FILE")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Number = Annotated[int, arg(metavar="N")]
OptionalNumber = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint=""), tyro.conf.FlagCreatePairsOff]


def classify(
    images: Annotated[tuple[str, ...], arg(metavar="IMAGE|FOLDER|GLOB ...", help_behavior_hint="")],
    /,
    *,
    weights: OptionalFile = None,
    json: Flag = False,
    output: OptionalFile = None,
    top: Number = 5,
    batch_size: Number = 32,
) -> int:
    """Name the likeliest classes of images.

    The images are resized to the size that the weights were trained for, which is 224x224 unless a run of train chose
    another one. A folder stands for all images in it and in the folders below it, except hidden ones. Photographs in
    HEIC are read where pillow-heif is installed. An --output file grows batch by batch. The same command continues a
    file that an earlier one left unfinished: it skips images that have a row, and tries those again that could not be
    read.

    Exit status:
      0    all images are done
      1    some images could not be read; they are named on standard error, and the others are done
      2    the command line is wrong
      3    nothing is done: no such file, no image, no weights or wrong ones, no place for the output, or no
           device such as JAX_PLATFORMS names
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads the standard output any more

    Args:
        images: Files, folders and globs such as 'photos/**/*.jpg'.
        weights: File of weights, written by port_weights.py, train or flax_googlenet.save. By default
            googlenet-imagenet.safetensors in the working folder, or else googlenet-random.safetensors.
        json: Print one line of JSON for each image: {"image", "predictions": [{"index", "label", "probability"}]}.
        output: Write to this .csv, .jsonl or .parquet file instead of the standard output; not with --json.
        top: Number of classes to name, the likeliest first.
        batch_size: Number of images to compute at once.
    """
    from flax_googlenet.commands import classify as command

    _use_compilation_cache()
    _require_backend()
    return command.classify(images, weights=weights, as_json=json, output=output, top=top, batch_size=batch_size)


def evaluate(
    inputs: Annotated[tuple[str, ...], arg(metavar="WEIGHTS ... DATA", help_behavior_hint="")],
    /,
    *,
    crops: Annotated[Literal[1, 10, 144], arg(metavar="1|10|144")] = 1,
    json: Flag = False,
    confusion: OptionalFile = None,
    batch_size: Number = 32,
) -> int:
    """Measure how often networks name the right class (top-1 and top-5).

    The balanced accuracy is the mean of the classes' recalls, so that a class of few images counts as much as one of
    many. Top-5 is always right for five classes or fewer, and then stands in the JSON alone.

    The classes of the data are found by name among those of the weights. Their order counts only where the weights
    have no class names, or where ImageNet's 1,000 classes have WordNet identifiers on one side (n01440764, ...) and
    names on the other. The images are resized to the size that the weights were trained for. Images that one of the
    networks was trained on are left out.

    Exit status:
      0    all images are evaluated
      1    some images could not be read; they are named on standard error, and the others are evaluated
      2    the command line is wrong
      3    nothing is done: no data, no weights or wrong ones, other classes, no place for the output,
           or no device such as JAX_PLATFORMS names
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads the standard output any more

    Args:
        inputs: Files of weights, written by train, port_weights.py or flax_googlenet.save, and then the data. The
            probabilities of several networks are averaged. The data are a folder with a folder for each class, a
            folder with such a folder named val, a folder of IDX files, or the word digits for scikit-learn's digits.
        crops: Number of crops of each image whose probabilities are averaged: 1 is the centre, 10 are the corners and
            the centre, each of them also mirrored, and 144 are the paper's, at four scales.
        json: Print one line of JSON: {"data", "weights", "crops", "image_size", "unreadable", "count", "top1", "top5",
            "balanced_accuracy", "classes": {name: {"count", "top1"}}}.
        confusion: Draw the confusion matrix to this .png file. Class names that no installed font can draw are
            replaced by numbers.
        batch_size: Number of crops to compute at once.
    """
    _require_training()
    from flax_googlenet.commands import evaluate as command

    _use_compilation_cache()
    _require_backend()
    return command.evaluate(inputs, num_crops=crops, as_json=json, confusion=confusion, batch_size=batch_size)


def export(
    *,
    weights: File,
    output: File,
    platforms: Annotated[tuple[str, ...], arg(metavar="PLATFORM ...")] = ("cpu", "cuda", "tpu"),
    size: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH", help_behavior_hint="")] = None,
    uint8: Flag = False,
    top: OptionalNumber = None,
    gradient: Flag = False,
) -> int:
    """Write a network with its weights to one file that runs with JAX alone.

    The file is a serialized jax.export (StableHLO), for inference on any number of images. JAX promises to run it with
    any jaxlib built up to 6 months after the one that wrote it, or up to 3 weeks before. Keep the weights, so that you
    can export them again for a newer JAX. The command prints three lines of Python that run the file.

    Exit status:
      0    the file is written
      2    the command line is wrong
      3    nothing is written: no weights or wrong ones, no place for the output, or no
           device such as JAX_PLATFORMS names
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads the standard output any more

    Args:
        weights: File of weights, written by port_weights.py, train or flax_googlenet.save.
        output: File to write, for example googlenet.stablehlo. An existing file is replaced.
        platforms: Some of cpu, cuda, rocm and tpu. This machine need not have them.
        size: Height and width of the images, in pixels. By default the file takes any from 15 up.
        uint8: Take uint8 images, and scale and normalise them. By default the file takes normalised floats.
        top: Return the probabilities and indices of the N likeliest classes instead of the logits.
        gradient: Keep the derivative with respect to the images, which doubles the file. Needs --size.
    """
    from flax_googlenet.inference.export import export_file

    _require_backend()
    message = export_file(weights, output, platforms, size=size, uint8=uint8, top=top, gradient=gradient)
    write_output(message)
    return Status.DONE


def summary(*, weights: OptionalFile = None, size: OptionalNumber = None, json: Flag = False) -> int:
    """Show the stages of a network with their shapes, parameters and multiply-adds.

    Multiply-adds are those of convolutions and dense layers. No weights are computed.

    Exit status:
      0    the summary is written
      2    the command line is wrong
      3    nothing is written: wrong weights, or no device such as JAX_PLATFORMS names
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads the standard output any more

    Args:
        weights: File of weights, written by port_weights.py, train or flax_googlenet.save. By default torchvision's
            network for ImageNet is shown.
        size: Height and width of the images, in pixels. By default the size that the weights were trained for, or 224.
        json: Print one line of JSON: {"image_size", "parameters", "parameters_with_auxiliary_heads", "multiply_adds",
            "stages": [{"name", "output", "parameters", "multiply_adds"}]}.
    """
    from flax_googlenet.commands.summary import show_summary

    _require_backend()
    return show_summary(weights, size, json)


def train(
    data: Annotated[str, arg(metavar="DATA", help_behavior_hint="")],
    /,
    *,
    workdir: Annotated[Path, arg(metavar="FOLDER")],
    preset: Annotated[str | None, arg(metavar="paper|imagenet|finetune|digits", help_behavior_hint="")] = None,
    weights: OptionalFile = None,
    distributed: Flag = False,
    override: Flag = False,
    recipe: Any = None,
) -> int:
    """Train a network on your images, or fine-tune weights on them.

    The run can be stopped at any time: the same command then continues it. On a CPU a run that was stopped and
    continued ends in the same bits as one that was not. The folder of the run holds model.safetensors with the last
    weights, best.safetensors with those of the best accuracy on the held-out images, and curves.png. Both files of
    weights are for evaluate, classify, export and port_weights.py --to-torchvision.

    Exit status:
      0    the run came to its end
      2    the command line is wrong
      3    nothing is done: no data, no weights or wrong ones, the folder is in use, or has a run of another recipe,
           no device such as JAX_PLATFORMS names, or --distributed does not find the other processes
      4    the run stopped itself: losses that are not finite, unreadable images, a full disk, a worker process that
           died, no batch of images for 10 minutes, or another process of the run that is gone
      70   an unexpected error; its traceback is in the file in FOLDER that the message names
      130  Ctrl-C: the step was finished and a checkpoint saved; a second Ctrl-C ends at once, as one before the
           first step does
      143  SIGTERM: the same

    Args:
        data: A folder with a folder for each class, some of whose images are held out; a folder of two such folders,
            train and val (or Training and Testing, or the like); a folder of IDX files; or the word digits for
            scikit-learn's digits.
        workdir: Folder of the run.
        preset: Recipe to start from. By default digits for these, finetune with --weights, and otherwise imagenet.
        weights: File of weights to start from, written by port_weights.py, train or flax_googlenet.save. The heads
            start anew if the classes are others.
        distributed: Join other processes in one run. Slurm, Open MPI, Kubernetes, the host of a TPU, or the variables
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say which ones.
        override: Continue the run in the folder even if the recipe, the data or the weights have changed.
        recipe: The defaults are those of the preset: put --preset or --weights before --help to see them.
    """
    _require_training()
    from flax_googlenet.training import keep_memory, loop

    keep_memory()
    _use_compilation_cache()
    try:
        return loop.train(data, workdir, recipe, weights=weights, distributed=distributed, override=override)
    except (CommandError, OSError):
        raise
    except Exception as error:
        raise CommandError(Status.CRASHED, describe_crash(error, workdir if workdir.is_dir() else None)) from error


def _recipe(arguments: Sequence[str]) -> "Recipe":
    """The recipe that the command line asks for, to be changed field by field and shown by --help."""
    from flax_googlenet.training.recipe import PRESETS

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--workdir")
    parser.add_argument("--weights")
    parser.add_argument("--preset")
    try:
        known, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # an option without its value: tyro says it
        known, others = argparse.Namespace(preset="imagenet"), []
    preset = known.preset or ("finetune" if known.weights else "digits" if "digits" in others else "imagenet")
    if preset not in PRESETS:
        raise CommandError(Status.USAGE, f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def _in_one_line(command: Callable[..., int]) -> Callable[..., int]:
    """The command with the first line of its documentation, for the help on all of them."""

    @functools.wraps(command)
    def same(*arguments: Any, **options: Any) -> int:
        return command(*arguments, **options)

    same.__doc__ = (command.__doc__ or "").partition("\n")[0]
    return same


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; ``argv`` defaults to the process's own."""
    prepare_process()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of JAX's cache, of Pillow's readers: what is wrong is said in our words
            arguments = list(sys.argv[1:] if argv is None else argv)
            if arguments == ["--version"]:
                write_output(f"flax-googlenet {flax_googlenet.__version__}\n")
                return Status.DONE
            commands: dict[str, Callable[..., int]] = {
                "classify": classify,
                "evaluate": evaluate,
                "export": export,
                "summary": summary,
                "train": train,
            }
            first = arguments[0] if arguments else ""
            if first == "train" and not {"-h", "--help"} & set(arguments):
                message_console().print(STARTING)  # at once: JAX, the data and the network take their time
            if first in commands:
                recipe = _recipe(arguments[1:]) if first == "train" else None
                return parse(first, commands[first], arguments[1:], recipe)()
            if first and not first.startswith("-"):
                raise CommandError(Status.USAGE, f"{first} is no command: the commands are {', '.join(commands)}")
            return tyro.extras.subcommand_cli_from_dict(
                {name: _in_one_line(command) for name, command in commands.items()},
                prog="flax-googlenet",
                description="GoogLeNet in JAX and Flax. --version prints the version.",
                args=arguments,
            )
    except CommandError as error:
        return _fail(error.status, str(error))
    except BrokenPipeError:
        return Status.CLOSED_PIPE
    except OSError as error:
        reason = error.strerror or str(error)
        return _fail(Status.NOT_DONE, f"{error.filename}: {reason}" if error.filename else reason)
    except Exception as error:  # last: what no code expected
        return _fail(Status.CRASHED, describe_crash(error))


def _fail(status: Status, message: str) -> Status:
    from rich.markup import escape

    message_console().print(f"[bold red]error:[/] {escape(printable(message))}")
    return status


def _require_training() -> None:
    # Flax itself brings the others of the extra, optax and orbax.
    missing = [name for name in ("grain", "matplotlib", "sklearn", "tensorboardX") if find_spec(name) is None]
    if missing:
        raise CommandError(Status.NOT_DONE, f"{', '.join(missing)} is not installed: {install_advice('train')}")


def _require_backend() -> None:
    from flax_googlenet.inference.compiling import BackendError, require_backend

    try:
        require_backend()
    except BackendError as error:
        raise CommandError(Status.NOT_DONE, error) from error


def _use_compilation_cache() -> None:
    """Keeps what XLA compiles in the user's cache folder, unless JAX has been told of another place."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if os.path.isabs(caches):  # without a home it is not
            jax.config.update("jax_compilation_cache_dir", os.path.join(caches, "flax-googlenet", "jax"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
