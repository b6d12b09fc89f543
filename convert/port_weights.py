"""Turns a torchvision GoogLeNet checkpoint into Flax variables, and proves that they are the same network."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

from exit_status import PortFailureError, Status
from interrupt import ends_the_process

from flax_googlenet.commands.status import describe_crash
from flax_googlenet.commands.terminal import draws_progress, message_console, prepare_process

DESCRIPTION = """\
Turn a torchvision GoogLeNet checkpoint into Flax variables, and prove it:
torchvision's network and ours run on the same photographs and random images, in
float64 and float32, and every stage is compared. Nothing is written unless all
of them agree.
"""

EPILOG = """\
CHECKPOINT is one of
  imagenet          torchvision's IMAGENET1K_V1, downloaded into PyTorch's cache
                    (the default)
  random            a torchvision GoogLeNet with seeded random weights; needs no
                    network
  FILE.pth          a state dict, or a training checkpoint with one in it, as
                    those of torchvision's script and of Lightning; a prefix of
                    all names of the network, such as model., is dropped
  FILE.safetensors  the same in PyTorch's layout; with --to-torchvision, a file
                    that this command wrote
  http(s)://...     a file to download; a name like googlenet-1378be20.pth is
                    checked against its hash

examples
  python convert/port_weights.py random
  python convert/port_weights.py imagenet --report report.html
  python convert/port_weights.py tuned.pth --key model_ema
  python convert/port_weights.py last.ckpt --class-names names.txt
  python convert/port_weights.py imagenet --output mine.safetensors --diagnose
  python convert/port_weights.py tuned.safetensors --to-torchvision tuned.pth

exit status
  0    proven and written; with --diagnose, the port agrees
  2    the command line is wrong
  3    the checkpoint or the class names cannot be had: no such file, no network
       or a wrong hash; or a package such as PyTorch is not installed; or
       JAX_PLATFORMS names no device of this machine
  4    the checkpoint is refused: it is damaged, unsafe or not torchvision's
       GoogLeNet; or the class names are not one for each class
  5    not proven: a stage differs, and nothing is written
  6    the output cannot be written
  70   an unexpected error; its traceback is in the file that the message names
  130  interrupted; no output is half-written, and a broken download goes on the
       next time
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and the usage if it is wrong."""
    parser = argparse.ArgumentParser(
        "port_weights.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", default="imagenet", help="see below")
    parser.add_argument(
        "--output", metavar="FILE.safetensors", type=Path, help="where to write; named after CHECKPOINT if not given"
    )
    parser.add_argument(
        "--to-torchvision", metavar="FILE.pth", type=Path, help="go back: write a state dict that torchvision loads"
    )
    parser.add_argument(
        "--transform-input",
        action=argparse.BooleanOptionalAction,
        help="whether the network maps ImageNet-normalised images to [-1, 1] first (on for imagenet, else off)",
    )
    parser.add_argument("--key", help="which state dict of a training checkpoint to take, such as model_ema")
    parser.add_argument(
        "--without-aux", action="store_true", help="leave out the auxiliary heads, which only training uses"
    )
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        type=Path,
        help="the names of the classes, one a line or a JSON list, in the order of the logits; classify prints them",
    )
    parser.add_argument("--report", metavar="FILE.html", type=Path, help="write the proof as a page to look at, too")
    parser.add_argument(
        "--diagnose",
        action="store_true",
        help="write nothing; name the first stage that diverges and the likely cause, in the port at --output; if "
        "that is not given, in the port that this command wrote here before, or else in a fresh one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines on standard output")
    args = parser.parse_args(argv)
    if args.to_torchvision and (
        args.diagnose
        or args.output
        or args.key
        or args.without_aux
        or args.class_names
        or args.transform_input is not None
    ):
        parser.error("--to-torchvision goes with CHECKPOINT, --report and --json alone")
    if args.to_torchvision and (args.checkpoint in ("imagenet", "random") or "://" in args.checkpoint):
        parser.error("--to-torchvision needs a CHECKPOINT that this command wrote, a FILE.safetensors")
    if args.diagnose and (args.report or args.class_names):
        parser.error("--diagnose writes nothing: leave out --report and --class-names")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status; ``argv`` defaults to the process's own."""
    args = parse(argv)
    with ends_the_process(as_json=args.json):
        from rich.console import Console  # here, where Ctrl-C is already seen to
        from rich.markup import escape

        prepare_process()
        progress = message_console()
        try:
            with progress.status("starting PyTorch and JAX") if draws_progress(progress) else nullcontext():
                command = _import_command()
            run = command.diagnose_port if args.diagnose else command.port_back if args.to_torchvision else command.port
            status, facts = run(args, Console(quiet=args.json, highlight=False, emoji=False), progress)
        except PortFailureError as failure:
            status, facts = failure.status, {**failure.facts, "error": str(failure)}
        except Exception as error:  # last: what no code expected
            status, facts = Status.CRASHED, {"error": describe_crash(error)}
        if "error" in facts:
            progress.print(f"[bold red]error:[/] {escape(facts['error'])}")
        if args.json:
            sys.stdout.write(json.dumps({"status": status, **facts}) + "\n")
    return status


def _import_command() -> ModuleType:
    """Import what needs PyTorch and JAX, late, so that --help and a wrong option need not wait for them.

    Raises:
        PortFailureError: UNAVAILABLE if a package is not installed, or JAX has no device.
    """
    try:
        from flax_googlenet.inference.compiling import BackendError, require_backend

        try:
            require_backend()
        except BackendError as error:
            raise PortFailureError(Status.UNAVAILABLE, str(error)) from error
        import command
    except ModuleNotFoundError as error:
        advice = 'pip install -e ".[convert]" in the folder of this project'
        if error.name in ("torch", "torchvision"):
            advice = (
                "the proof runs torchvision's network; install PyTorch's CPU build, torch and torchvision, as "
                f"pytorch.org/get-started says (the CUDA build takes 4 GB more), then {advice}"
            )
        raise PortFailureError(Status.UNAVAILABLE, f"{error.name} is not installed: {advice}") from error
    return command


if __name__ == "__main__":
    sys.exit(main())
