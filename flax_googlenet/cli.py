"""The subcommands of ``flax-googlenet``, a function each, and how they end; what they do is in modules of their own.

JAX is not imported until a subcommand runs: ``--help`` and a wrong option need not wait for it.
"""

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

import flax_googlenet
from flax_googlenet.status import (
    CommandError,
    Status,
    describe_crash,
    escape_what_cannot_be_encoded,
    printable,
)

File = Annotated[Path, arg(metavar="FILE")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Number = Annotated[int, arg(metavar="N")]
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

    The images are resized as for the training of the weights: to 224x224, unless a run has trained at another size.
    A folder stands for all images in it and in the folders below it, but not for hidden ones. An --output file grows
    batch by batch, and the same command goes on where an earlier one was stopped: images that have a row are skipped,
    and those that could not be read are tried again.

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
        weights: A file that port_weights.py or flax_googlenet.save wrote. By default the working folder's
            googlenet-imagenet.safetensors, or else googlenet-random.safetensors.
        json: Print one line of JSON for each image: {"image", "predictions": [{"index", "label", "probability"}]}.
        output: Write to this .csv, .jsonl or .parquet file instead of the standard output; not with --json.
        top: How many classes to name, the likeliest first; or all, where there are fewer.
        batch_size: How many images to compute at once.
    """
    from flax_googlenet import classify as command

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
    """Count how often weights name the right class first (top-1) or among the first five (top-5).

    The classes of the data are found by name among those of the weights. Their order counts only where the weights
    have no class names, or where ImageNet's 1,000 classes have WordNet identifiers on one side (n01440764, ...) and
    names on the other. The images are of the size that the weights were trained for. Of digits, and of a folder that
    the weights were trained on, only images are evaluated that none of the weights was trained on.

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
        inputs: Weights, as written by train, port_weights.py or flax_googlenet.save, and last the data. Of several
            weights it is the mean of their probabilities that counts. The data are a folder of class folders, or one
            of val/ with class folders in it, or one of IDX files, or digits for those of scikit-learn.
        crops: Parts of each image whose probabilities are averaged: 1 is its middle, 10 are four corners and the
            middle, mirrored too, and 144 are those of the paper, at four scales.
        json: Print one line of JSON: {"data", "weights", "crops", "image_size", "unreadable", "count", "top1", "top5",
            "classes": {name: {"count", "top1"}}}.
        confusion: Draw to this .png file which classes are taken for which.
        batch_size: How many crops to compute at once.
    """
    _require_training()
    from flax_googlenet.training import evaluate as command

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
    top: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
    gradient: Flag = False,
) -> int:
    """Write the network, its weights inside, as one file that runs with JAX alone.

    The file is a serialized jax.export (StableHLO), for inference on any number of images. JAX promises to run it with
    any jaxlib built up to 6 months after the one that wrote it, or up to 3 weeks before: keep the weights, to export
    anew. At the end three lines of Python are printed that run it.

    Exit status:
      0    the file is written
      2    the command line is wrong
      3    nothing is written: no weights or wrong ones, no place for the output, or no
           device such as JAX_PLATFORMS names
      70   an unexpected error; its traceback is in the file that the message names
      130  interrupted
      141  nobody reads the standard output any more

    Args:
        weights: A file that port_weights.py or flax_googlenet.save wrote.
        output: The file to write, for example googlenet.stablehlo. What is there already is replaced.
        platforms: Some of cpu, cuda, rocm and tpu; they need not be on this machine.
        size: Height and width of the images, in pixels. By default any from 15 up.
        uint8: Take uint8 images, and scale and normalise them inside. Otherwise they are floating point, normalised.
        top: Return the probabilities and indices of so many likeliest classes, instead of the logits.
        gradient: Keep the derivative by the images; twice the size. Needs --size.
    """
    from flax_googlenet.exporting import export_file

    _require_backend()
    told = export_file(weights, output, platforms, size=size, uint8=uint8, top=top, gradient=gradient)
    sys.stdout.write(told)
    sys.stdout.flush()
    return Status.DONE


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
    """Train on a folder of class folders, or fine-tune --weights on it; stopped at any time, the same command goes on.

    On a CPU a run that was stopped and resumed ends in the same bits as one that was not. Its folder then has
    curves.png and two files of weights, for evaluate, classify, export and port_weights.py --to-torchvision:
    model.safetensors has the last ones, best.safetensors those of the best accuracy on the held-out images.

    Exit status:
      0    the run came to its end
      2    the command line is wrong
      3    nothing is done: no data, no weights or wrong ones, the folder is in use, or has a run of another recipe,
           no device such as JAX_PLATFORMS names, or --distributed does not find the other processes
      4    the run stopped itself: losses that are not finite, unreadable images, a full disk, or a lost process
      70   an unexpected error; its traceback is in the file in FOLDER that the message names
      130  Ctrl-C: the step was finished and a checkpoint saved; a second Ctrl-C ends at once, as one before the
           first step does
      143  SIGTERM: the same

    Args:
        data: A folder of train/ and val/ (or Training/ and Testing/, or the like), each of them with a folder for each
            class; or one of class folders, of which a part is held out; or one of IDX files; or digits for those of
            scikit-learn.
        workdir: The folder of the run.
        preset: The recipe to start from. By default digits for these, finetune with --weights, and else imagenet.
        weights: Start from these, as written by port_weights.py or flax_googlenet.save, with a new head where the
            classes are others.
        distributed: Be one of several processes, as Slurm, Open MPI, Kubernetes or a TPU's host tell it, or the
            variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
        override: Go on in a folder although the recipe, the data or the weights are others than they were.
        recipe: What to do, and in brackets what the preset says: --preset or --weights before --help shows theirs.
    """
    from flax_googlenet.training import keep_memory, loop

    keep_memory()
    _use_compilation_cache()
    try:
        return loop.train(data, workdir, recipe, weights=weights, distributed=distributed, override=override)
    except (CommandError, OSError):
        raise
    except Exception as error:
        raise CommandError(Status.CRASHED, describe_crash(error, workdir if workdir.is_dir() else None)) from error


def _train_by_preset(arguments: Sequence[str]) -> Callable[..., int]:
    """``train`` with the recipe that the command line asks for, to be changed field by field and shown by --help."""
    _require_training()
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
    return functools.partial(train, recipe=PRESETS[preset])


def _in_one_line(command: Callable[..., int]) -> Callable[..., int]:
    """The command with the first line of its documentation, for the help on all of them."""

    @functools.wraps(command)
    def same(*arguments: Any, **options: Any) -> int:
        return command(*arguments, **options)

    same.__doc__ = (command.__doc__ or "").partition("\n")[0]
    return same


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; ``argv`` defaults to the process's own."""
    escape_what_cannot_be_encoded()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of JAX's cache, of Pillow's readers: what is wrong is said in our words
            arguments = list(sys.argv[1:] if argv is None else argv)
            if arguments == ["--version"]:
                sys.stdout.write(f"flax-googlenet {flax_googlenet.__version__}\n")
                sys.stdout.flush()
                return Status.DONE
            commands: dict[str, Callable[..., int]] = {
                "classify": classify,
                "evaluate": evaluate,
                "export": export,
                "train": train,
            }
            if arguments[:1] == ["train"]:
                commands["train"] = _train_by_preset(arguments)
            elif not commands.keys() & set(arguments[:1]):
                commands = {name: _in_one_line(command) for name, command in commands.items()}
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="flax-googlenet",
                description="GoogLeNet in JAX and Flax. Each subcommand has a --help; --version prints the version.",
                args=arguments,
            )
    except CommandError as error:
        return _fail(error.status, str(error))
    except OSError as error:
        if error.filename is not None:
            return _fail(Status.NOT_DONE, f"{error.filename}: {error.strerror}")
        # Python flushes standard output once more at its end, and would complain if that is what failed.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return Status.CLOSED_PIPE
        return _fail(Status.NOT_DONE, f"cannot write standard output: {error.strerror}")
    except Exception as error:  # last: what no code expected
        return _fail(Status.CRASHED, describe_crash(error))


def _fail(status: Status, message: str) -> Status:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(printable(message))}")
    return status


def _require_training() -> None:
    # Flax itself brings the others of the extra, optax and orbax.
    missing = [name for name in ("grain", "matplotlib", "sklearn", "tensorboardX") if find_spec(name) is None]
    if missing:
        message = f'{", ".join(missing)} is not installed: pip install "flax-googlenet[train]"'
        raise CommandError(Status.NOT_DONE, message)


def _require_backend() -> None:
    from flax_googlenet.compiling import BackendError, require_backend

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
