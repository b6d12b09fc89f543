"""Shared by the benchmarks: engines in processes of their own, SGD for both libraries, and tables in Markdown."""

import argparse
import contextlib
import multiprocessing
import os
import platform
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "convert"))

THREADS = len(os.sched_getaffinity(0))
ORDER = random.Random(0)  # of the turns

QUICK_SIZE = 64
"""Height and width of the images with --quick, in pixels."""

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.001, 0.9, 1e-4


def torch_model(folder: Path, channels_last: bool) -> "tuple[torch.nn.Module, torch.memory_format]":
    """Return PyTorch's network in the folder, in evaluation mode, and the memory format of its input."""
    import torch

    torch.set_num_threads(THREADS)
    model = torch.load(folder / "network.pt", weights_only=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=layout), layout


def torch_sgd(model: "torch.nn.Module") -> "torch.optim.SGD":
    import torch

    return torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)


def optax_sgd(learning_rate: float = LEARNING_RATE) -> "optax.GradientTransformation":
    """Return the optimizer of ``torch_sgd``, which adds the decay to the gradient before the momentum."""
    import optax

    return optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(learning_rate, MOMENTUM))


def flax_step(state: "TrainState") -> Callable[[np.ndarray, np.ndarray], float]:
    """Return a function that takes the next step on images NHWC and labels, and returns the loss before it."""
    import jax

    from flax_googlenet.training import train_step

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        nonlocal state
        state, metrics = train_step(state, {"image": images, "label": labels}, jax.random.key(0))
        return float(metrics["loss"])

    return step


def is_quick() -> bool:
    """Return whether the benchmark was started with --quick, in its workers, too."""
    return "--quick" in sys.argv


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a temporary folder without blanks and commas in its path, at which torch.compile's g++ would split it."""
    place = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(dir="/tmp" if re.search(r"[\s,]", place) else place) as folder:
        yield Path(folder)


def folders(name: str, folder: Path) -> dict[str, str]:
    """Return the environment variables that give an engine its own folders for compiled code and temporary files."""
    own = folder / "engines" / re.sub(r"\W+", "-", name)  # no blank and no comma, as in "torch.compile, frozen"
    places = {"JAX_COMPILATION_CACHE_DIR": "jax", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
    return {variable: str(own / place) for variable, place in places.items()}


class Worker(ProcessPoolExecutor):
    """A process that runs one engine, and ends with the ``with`` block.

    Args:
        name: The engine's name.
        folder: The folder of the engines' caches.
        load: Loads the engine, in the process, and returns the function that answers requests. It must be picklable.
    """

    def __init__(self, name: str, folder: Path, load: Callable[[], Callable[..., dict[str, Any]]]) -> None:
        super().__init__(1, multiprocessing.get_context("spawn"), _start, (folders(name, folder), load))
        self.submit(str).result()  # comes back when the engine is loaded

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request to the engine, and return its answer."""
        return self.submit(_ask, request).result()


def _start(own: dict[str, str], load: Callable[[], Callable[..., dict[str, Any]]]) -> None:
    """Load the engine of this process, which has environment variables of its own."""
    global _answer
    os.dup2(2, 1)  # libraries may print, and standard output is for the tables
    Path(own["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    os.environ.update(own)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # engines that share a GPU take what they need
    _answer = load()


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    return _answer(**request)


def take_turns(
    workers: Mapping[str, Worker], rounds: int, message: str, **request: Any
) -> dict[str, list[dict[str, Any]]]:
    """Ask each engine once in every round, in random order, and return the answers by engine."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(rounds):
        for name in ORDER.sample(list(workers), len(workers)):
            answers[name].append(workers[name].ask(**request))
        progress(f"{message}: round {number + 1} of {rounds}")
    return answers


def parse_arguments(
    description: str | None, engines: Mapping[str, Any], batches: list[int], rounds: int, variants: Sequence[str] = ()
) -> argparse.Namespace:
    """Return the options of a benchmark. ``size`` is the size of the images."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sizes = " ".join(map(str, batches))
    parser.add_argument("--batches", type=int, nargs="+", default=batches, help=f"batch sizes to measure ({sizes})")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each engine per batch size ({rounds})")
    parser.add_argument("--engines", nargs="+", choices=engines, default=list(engines), help="default: all of them")
    if variants:
        parser.add_argument("--variant", choices=variants, default=variants[0], help=f"the network ({variants[0]})")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"only check that everything runs, on two images of {QUICK_SIZE}x{QUICK_SIZE} and with a part of the "
        "network compiled; the times mean nothing",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches, arguments.rounds = [2], 1
    arguments.size = QUICK_SIZE if arguments.quick else 224
    return arguments


def write_network(folder: Path, variant: str = "torchvision") -> "torch.nn.Module":
    """Write a network with random weights as network.pt and as weights.safetensors, and return PyTorch's in float32.

    Args:
        folder: The folder to write to.
        variant: The network, as for ``GoogLeNet``.
    """
    import bvlc
    import reference
    import torch

    import flax_googlenet
    from flax_googlenet.weights import caffe

    if variant == "bvlc":
        state_dict = bvlc.random_weights()
        network = bvlc.build(state_dict, torch.float32)
        model, variables = caffe.network("random weights", state_dict)
    else:
        state_dict = {key: tensor.numpy() for key, tensor in reference.random_checkpoint().items()}
        network = reference.build(state_dict, transform_input=False, dtype=torch.float32)
        model, variables = flax_googlenet.GoogLeNet(), flax_googlenet.from_torchvision(state_dict)
    torch.save(network, folder / "network.pt")
    flax_googlenet.save(folder / "weights.safetensors", model, variables)
    return network


def peak_memory() -> float:
    """Return the peak memory of this process in MB. getrusage would include the parent's memory at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def machine(*packages: str) -> str:
    """Return the processor, the number of threads, and the versions of the packages, in one line."""
    return f"{_processor()}, {THREADS} threads; " + ", ".join(f"{name} {version(name)}" for name in packages)


def _processor() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def print_row(*cells: str) -> None:
    """Print a row of a table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def print_header(*cells: str) -> None:
    """Print the header of a table."""
    print_row(*cells)
    print_row(*["---"] * len(cells))


def progress(message: str) -> None:
    """Print the progress on standard error; on a terminal, it replaces the line before."""
    print(f"\r\x1b[2K{message}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
