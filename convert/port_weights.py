"""Ports a GoogLeNet of PyTorch, Caffe, TensorFlow or ONNX to Flax, and proves that the port computes the same."""

import argparse
import json
import sys
from pathlib import Path

from process import STATUSES, InputError, Result, Status, ends_on_ctrl_c

from flax_googlenet.commands.status import CommandError, describe_crash, exit_status
from flax_googlenet.commands.terminal import Messages, make_console, prepare_process, write_output
from flax_googlenet.errors import printable
from flax_googlenet.weights.download import name_in_url

DESCRIPTION = """\
Port a GoogLeNet checkpoint of PyTorch, Caffe, TensorFlow or ONNX to Flax, and
prove that the port is right: the same network in PyTorch and the Flax
network run on the same photographs and random images, in float64 and in
float32, and every stage is compared. The port is written only if all stages
agree.
"""

EPILOG = """\
CHECKPOINT is one of
  imagenet          torchvision's IMAGENET1K_V1 weights, downloaded into
                    PyTorch's cache; the default
  bvlc              the paper's network as Berkeley trained it with Caffe,
                    downloaded into PyTorch's cache
  random            torchvision's GoogLeNet with random weights from a fixed
                    seed; needs no network
  FILE.pth          a state dict, or a training checkpoint that contains one,
                    such as those of torchvision's training script and of
                    Lightning; a prefix of all names, such as "model.", is
                    removed
  FILE.safetensors  the same in PyTorch's layout; with --to-torchvision or
                    --to-caffe, a file from this command, flax-googlenet train
                    or flax_googlenet.save
  FILE.caffemodel   weights of Berkeley's network for Caffe, with any number of
                    classes
  FILE.pb           weights of Google's network, inception5h, for TensorFlow
  FILE.onnx         Berkeley's network as ONNX's model zoo has it: googlenet, or
                    inception-v1, whose max pools round their sizes down
  http(s)://...     a file to download; if its name contains a hash, as in
                    googlenet-1378be20.pth, the file is checked against it

examples
  python convert/port_weights.py random
  python convert/port_weights.py imagenet --report report.html
  python convert/port_weights.py bvlc_googlenet.caffemodel
  python convert/port_weights.py tuned.pth --key model_ema
  python convert/port_weights.py last.ckpt --class-names names.txt
  python convert/port_weights.py imagenet --output mine.safetensors --diagnose
  python convert/port_weights.py tuned.safetensors --to-torchvision tuned.pth
  python convert/port_weights.py places.safetensors --to-caffe places.caffemodel

exit status
  0    proven and written; with --diagnose, the port agrees
  2    the command line is wrong
  3    an input is not available: a file that does not exist, a download that
       fails or has the wrong hash, a package such as PyTorch that is not
       installed, or a device in --device or JAX_PLATFORMS that this machine
       does not have
  4    an input is refused: the checkpoint is damaged, unsafe or not a GoogLeNet
       of torchvision's, Berkeley's or Google's, or the class names are not one
       for each class
  5    not proven: a stage differs, and no port is written
  6    an output cannot be written
  70   an unexpected error; its traceback is in the file that the message names
  130  interrupted; no output is half-written, and a download with a hash in its
       name continues where it stopped when the command runs again
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line; exit with status 2 and the usage if they are wrong."""
    parser = argparse.ArgumentParser(
        "port_weights.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", default="imagenet", help="see below")
    parser.add_argument(
        "--output", metavar="FILE.safetensors", type=Path, help="the file to write; by default named after CHECKPOINT"
    )
    parser.add_argument(
        "--to-torchvision", metavar="FILE.pth", type=Path, help="port back: write a state dict that torchvision loads"
    )
    caffe_help = "port back: write the weights of Berkeley's network for Caffe"
    parser.add_argument("--to-caffe", metavar="FILE.caffemodel", type=Path, help=caffe_help)
    transform_help = (
        "whether the network first maps ImageNet-normalised images to [-1, 1]; by default only imagenet does"
    )
    parser.add_argument("--transform-input", action=argparse.BooleanOptionalAction, help=transform_help)
    parser.add_argument("--key", help="the state dict to take from a training checkpoint, such as model_ema")
    parser.add_argument(
        "--without-aux", action="store_true", help="leave out the auxiliary heads, which only training uses"
    )
    names_help = "the class names in the order of the logits, one a line or as a JSON list; classify prints them"
    parser.add_argument("--class-names", metavar="FILE", type=Path, help=names_help)
    parser.add_argument("--report", metavar="FILE.html", type=Path, help="also write the proof as an HTML page")
    device_help = "also compute in float32 on this device, with the same limit as for float32 on the CPU"
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help=device_help)
    parser.add_argument(
        "--diagnose",
        action="store_true",
        help="write nothing; name the first stage that differs and the likely cause, in the port at --output or, "
        "without --output, in the port that this command wrote here before or else in a new one",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on standard output")
    args = parser.parse_args(argv)
    others = (
        args.diagnose,
        args.output,
        args.key,
        args.without_aux,
        args.class_names,
        args.transform_input is not None,
    )
    if args.to_torchvision and args.to_caffe:
        parser.error("--to-torchvision and --to-caffe are for different networks: leave out one of them")
    if back := "--to-torchvision" if args.to_torchvision else "--to-caffe" if args.to_caffe else None:
        if any(others):
            parser.error(f"{back} can be combined with --report, --device and --json only")
        if args.checkpoint in ("imagenet", "bvlc", "random") or "://" in args.checkpoint:
            parser.error(f"{back} needs a CHECKPOINT that this command wrote, a FILE.safetensors")
    name = name_in_url(args.checkpoint) if "://" in args.checkpoint else args.checkpoint
    formats = {".caffemodel": "caffe", ".pb": "tensorflow", ".onnx": "onnx"}
    args.format = "caffe" if args.checkpoint == "bvlc" else formats.get(Path(name).suffix.lower(), "pytorch")
    if args.format != "pytorch" and (args.diagnose or args.transform_input is not None):
        parser.error("--diagnose and --transform-input are for torchvision's network alone")
    if args.key and (args.format != "pytorch" or args.checkpoint in ("imagenet", "random")):
        parser.error("--key needs a CHECKPOINT with several state dicts, a FILE.pth")
    if args.diagnose and (args.report or args.class_names or args.device):
        parser.error("--diagnose writes nothing: leave out --report, --class-names and --device")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status; ``argv`` defaults to the arguments of the process."""
    args = parse(argv)
    with ends_on_ctrl_c(as_json=args.json):
        prepare_process()
        messages = Messages()
        try:
            with messages.spinner("starting PyTorch and JAX"):
                _import_engines()
            status, facts = _run(args, messages)
        except Exception as error:
            status = Status(exit_status(error, STATUSES))
            facts = {"error": describe_crash(error) if status is Status.CRASHED else str(error)}
        if "error" in facts:
            facts["error"] = printable(facts["error"])
            messages.fail(facts["error"])
        if args.json:
            try:
                write_output(json.dumps({"status": status, **facts}) + "\n")
            except BrokenPipeError:  # nobody reads it, but the work is done
                pass
            except CommandError as error:
                status = Status.NOT_WRITTEN
                messages.fail(str(error))
    return status


def _import_engines() -> None:
    """Import PyTorch and JAX, which would delay --help and the message about a wrong option.

    Raises:
        BackendError: If JAX has no device.
        InputError: If a package is not installed.
    """
    try:
        from flax_googlenet.inference.compiling import require_backend

        require_backend()
        import diagnose  # noqa: F401  # and everything that it imports
    except ModuleNotFoundError as error:
        advice = 'pip install -e ".[convert]" in the folder of this project'
        if error.name in ("torch", "torchvision"):
            advice = (
                "the proof runs torchvision's network; install PyTorch's CPU build, torch and torchvision, as "
                f"pytorch.org/get-started says (the CUDA build takes 4 GB more), then {advice}"
            )
        raise InputError(f"{error.name} is not installed: {advice}") from error


def _run(args: argparse.Namespace, messages: Messages) -> Result:
    from diagnose import diagnose_port
    from inputs import Request
    from porting import find_device, port, port_back, port_to_caffe

    screen = make_console(quiet=args.json)
    device = find_device(args.device) if args.device else None
    if args.to_torchvision:
        return port_back(Path(args.checkpoint), args.to_torchvision, args.report, device, screen, messages)
    if args.to_caffe:
        return port_to_caffe(Path(args.checkpoint), args.to_caffe, args.report, device, screen, messages)
    request = Request(args.checkpoint, args.key, args.without_aux, args.transform_input, args.format)
    if args.diagnose:
        return diagnose_port(request, args.output, screen, messages)
    return port(request, args.output, args.report, args.class_names, device, screen, messages)


if __name__ == "__main__":
    sys.exit(main())
