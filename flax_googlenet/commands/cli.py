"""The command line ``flax-googlenet``: the table of its subcommands, and the place where every error ends.

JAX is not imported until a subcommand runs: ``--help`` and a wrong option need not wait for it.
"""

import inspect
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence

import flax_googlenet
from flax_googlenet.commands.arguments import parse
from flax_googlenet.commands.classify import classify
from flax_googlenet.commands.dream import dream
from flax_googlenet.commands.evaluate import evaluate
from flax_googlenet.commands.explain import explain
from flax_googlenet.commands.export import export
from flax_googlenet.commands.features import features
from flax_googlenet.commands.status import Status, UsageError, describe_crash, exit_status
from flax_googlenet.commands.summary import summary
from flax_googlenet.commands.terminal import Messages, prepare_process, write_output
from flax_googlenet.commands.train import STARTING, default_recipe, train
from flax_googlenet.commands.visualize import visualize
from flax_googlenet.errors import GoogLeNetError

SUBCOMMANDS: dict[str, Callable[..., int]] = {
    "classify": classify,
    "dream": dream,
    "evaluate": evaluate,
    "explain": explain,
    "export": export,
    "features": features,
    "summary": summary,
    "train": train,
    "visualize": visualize,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; ``argv`` defaults to the arguments of the process."""
    prepare_process()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of JAX's cache and Pillow's readers: the commands have messages
            return _run(list(sys.argv[1:] if argv is None else argv))
    except Exception as error:
        status = exit_status(error)
        if status is not Status.CLOSED_PIPE:
            Messages().fail(_describe(error))
        return status


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    if arguments == ["--version"]:
        write_output(f"flax-googlenet {flax_googlenet.__version__}\n")
        return Status.DONE
    if name in SUBCOMMANDS:
        recipe = None
        if name == "train":
            if not {"-h", "--help"} & set(arguments):
                Messages().note(STARTING)
            recipe = default_recipe(arguments[1:])
        return parse(name, SUBCOMMANDS[name], arguments[1:], recipe)()
    if name in ("-h", "--help"):
        write_output(_overview())
        return Status.DONE
    problem = f"{name} is no command" if name else "a command is missing"
    raise UsageError(f"{problem}: the commands are {', '.join(SUBCOMMANDS)}")


def _overview() -> str:
    """Return the help on all subcommands: the first line of each one's docstring."""
    columns = shutil.get_terminal_size().columns
    lines = [
        f"  {name:9}  {inspect.cleandoc(command.__doc__ or '').splitlines()[0]}"
        for name, command in SUBCOMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: flax-googlenet COMMAND ...\n",
            "GoogLeNet in JAX and Flax. --version prints the version.\n",
            *(textwrap.fill(line, columns, subsequent_indent=" " * 13) for line in lines),
            "\nflax-googlenet COMMAND --help explains a command and its arguments.\n",
        ]
    )


def _describe(error: Exception) -> str:
    """Return the message of an error, on one line."""
    if isinstance(error, GoogLeNetError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    return describe_crash(error)
