"""The command line of a subcommand, made from its function: the arguments, the help, and messages about wrong ones."""

import dataclasses
import difflib
import functools
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from flax_googlenet.architecture import stage_name
from flax_googlenet.commands.status import UsageError
from flax_googlenet.training.recipe import Recipe

File = Annotated[Path, arg(metavar="FILE")]
Picture = Annotated[Path, arg(metavar="PICTURE.png")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Weights = Annotated[Path, arg(metavar="FILE|imagenet")]
OptionalWeights = Annotated[Path | None, arg(metavar="FILE|imagenet", help_behavior_hint="")]
Number = Annotated[int, arg(metavar="N")]
OptionalNumber = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Stage = Annotated[str, arg(metavar="STAGE")]
Flag = Annotated[bool, arg(help_behavior_hint=""), FlagCreatePairsOff]

_MAX_BATCH_SIZE = 2**16  # its images of 224x224 take 39 GB in float32; from 2**63 up, NumPy and JAX raise OverflowError


def require_batch_size(batch_size: int) -> None:
    """Raise a UsageError unless it is a number of images that a program can be compiled for."""
    if not 1 <= batch_size <= _MAX_BATCH_SIZE:
        raise UsageError(f"--batch-size must be at least 1 and at most {_MAX_BATCH_SIZE}")


def known_stage(name: str, variant: str | None = None) -> str:
    """Return the name of a stage as ``stage_name`` does, but raise UsageError if there is no such stage."""
    try:
        return stage_name(name, variant)
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse(
    name: str, command: Callable[..., int], arguments: Sequence[str], recipe: Recipe | None = None
) -> Callable[[], int]:
    """Return the call of a subcommand that a command line asks for.

    The process exits with status 0 after ``--help``, and with 2 if tyro refuses an argument.

    Args:
        name: The name of the subcommand.
        command: The function, with a docstring of paragraphs, ``Exit status:`` and ``Args:``.
        arguments: The words of the command line after the name.
        recipe: The default of the function's argument ``recipe``, or None for a function without one.

    Raises:
        UsageError: If the command does not take one of the arguments.
    """
    description, _, documented = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:\n")

    @functools.wraps(command)
    def parsed(*positional: Any, **options: Any) -> Callable[[], int]:
        return functools.partial(command, *positional, **options)

    # tyro keeps the line breaks in the documentation of arguments, so it gets a copy without them. Without the deletion
    # it would follow ``__wrapped__`` to the original.
    vars(parsed).update(__signature__=inspect.signature(command))
    del vars(parsed)["__wrapped__"]
    parsed.__doc__ = f"{name}\n\nArgs:\n" + re.sub(r"\n {8,}", " ", documented)
    call, unknown = tyro.cli(
        functools.partial(parsed, recipe=recipe) if recipe else parsed,
        prog=f"flax-googlenet {name}",
        description=_wrap(description),
        args=arguments,
        return_unknown_args=True,
    )
    if unknown:
        parameters = inspect.signature(command).parameters.values()
        options = [x.name for x in parameters if x.kind is x.KEYWORD_ONLY and x.name != "recipe"]
        options += [f"recipe.{field.name}" for field in dataclasses.fields(recipe)] if recipe else []
        hint = _suggest(unknown[0], [option.replace("_", "-") for option in options])
        message = f"{unknown[0]} is no argument of this command: {hint}flax-googlenet {name} --help lists all"
        raise UsageError(message)
    return call


def _wrap(description: str) -> str:
    """Return the description in lines that fit the terminal: tyro would break longer ones inside words.

    tyro joins lines that do not begin with a space, so all paragraphs after the first one are indented.
    """
    wrap = functools.partial(
        textwrap.fill, width=shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False
    )
    summary, *paragraphs = description.split("\n\n")
    lines = [summary]
    for paragraph in paragraphs:
        if paragraph.startswith("Exit status:"):
            title, *statuses = re.sub(r"\n {7,}", " ", paragraph).splitlines()
            lines += ["", title, *(wrap(status, subsequent_indent=" " * 7) for status in statuses)]
        else:
            lines += [wrap(" ".join(paragraph.split()), initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def _suggest(argument: str, options: Sequence[str]) -> str:
    """Return a question that names the option with the same initials or similar letters, or an empty string."""
    by_last_name = {option.rpartition(".")[2]: option for option in options}
    wanted = argument.partition("=")[0].rpartition(".")[2].lstrip("-").replace("_", "-")
    similar = [name for name in by_last_name if "".join(word[0] for word in name.split("-")) == wanted]
    similar = similar or difflib.get_close_matches(wanted, by_last_name, n=1)
    return f"did you mean --{by_last_name[similar[0]]}? " if similar and argument.startswith("-") else ""
