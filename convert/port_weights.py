"""Turns a torchvision GoogLeNet checkpoint into Flax variables, and proves that they are the same network."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

from exit_status import PortFailureError, Status
from interrupt import ends_the_process

from flax_googlenet.status import describe_crash, draws_progress, escape_what_cannot_be_encoded, message_console

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
  FILE.pth          a state dict, or a training checkpoint with one under
                    "model" or "state_dict"
  FILE.safetensors  the same in PyTorch's layout; with --to-torchvision, a file
                    that this command wrote
  http(s)://...     a file to download; a name like googlenet-1378be20.pth is
                    checked against its hash

examples
  python convert/port_weights.py random
  python convert/port_weights.py imagenet --report report.html
  python convert/port_weights.py tuned.pth --key model_ema
  python convert/port_weights.py imagenet --output mine.safetensors --diagnose
  python convert/port_weights.py tuned.safetensors --to-torchvision tuned.pth

exit status
  0    proven and written; with --diagnose, the port agrees
  2    the command line is wrong
  3    the checkpoint cannot be had: no such file, no network, a wrong hash; or
       JAX_PLATFORMS names no device of this machine
  4    the checkpoint is refused: damaged, unsafe or not torchvision's GoogLeNet
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
    parser.add_argument("--report", metavar="FILE.html", type=Path, help="write the proof as a page to look at, too")
    parser.add_argument(
        "--diagnose",
        action="store_true",
        help="write nothing; name the first stage that diverges and the likely cause, in the port at --output; if "
        "that is not given, in the port that this command wrote here before, or else in a fresh one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines on standard output")
    args = parser.parse_args(argv)
    if args.to_torchvision and (args.diagnose or args.output or args.key or args.transform_input is not None):
        parser.error("--to-torchvision goes with CHECKPOINT, --report and --json alone")
    if args.to_torchvision and (args.checkpoint in ("imagenet", "random") or "://" in args.checkpoint):
        parser.error("--to-torchvision needs a CHECKPOINT that this command wrote, a FILE.safetensors")
    if args.diagnose and args.report:
        parser.error("--diagnose writes nothing, and so no --report")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status; ``argv`` defaults to the process's own."""
    args = parse(argv)
    with ends_the_process(as_json=args.json):
        from rich.console import Console  # here, where Ctrl-C is already seen to
        from rich.markup import escape

        escape_what_cannot_be_encoded()
        progress = message_console()
        try:
            with progress.status("starting PyTorch and JAX") if draws_progress(progress) else nullcontext():
                _require_backend()
                import command  # here, so that --help and a wrong option need not wait for them

            run = command.diagnose_port if args.diagnose else command.port_back if args.to_torchvision else command.port
            status, facts = run(args, Console(quiet=args.json, highlight=False), progress)
        except PortFailureError as failure:
            status, facts = failure.status, {**failure.facts, "error": str(failure)}
        except Exception as error:  # last: what no code expected
            status, facts = Status.CRASHED, {"error": describe_crash(error)}
        if "error" in facts:
            progress.print(f"[bold red]error:[/] {escape(facts['error'])}")
        if args.json:
            sys.stdout.write(json.dumps({"status": status, **facts}) + "\n")
    return status


def _require_backend() -> None:
    from flax_googlenet.compiling import BackendError, require_backend

    try:
        require_backend()
    except BackendError as error:
        raise PortFailureError(Status.UNAVAILABLE, str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
