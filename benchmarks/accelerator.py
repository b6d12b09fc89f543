"""Compare inference and training on a GPU or TPU, side by side: this library and PyTorch on the same card.

Each engine has a process of its own. On a GPU the engines take turns while the others are idle; a TPU belongs to one
process, so there they run one after the other, and PyTorch is left out. The inputs lie on the card in the layout and
dtype that suit the engine best. A turn is a number of calls that run back to back, and ends when the last result is
there. The table has medians over all turns, ratios, the time until the first result, the peak memory on the card,
and the error of the logits against float64. A training step has three heads, the backward pass, and SGD with momentum
and weight decay; in bfloat16 the parameters stay float32.

    pip install -e ".[benchmark]"      with the jax for your accelerator: "jax[cuda13]" or "jax[tpu]"
    python benchmarks/accelerator.py
"""

import argparse
import contextlib
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import inference
import numpy as np
from side_by_side import (
    ORDER,
    Worker,
    is_quick,
    machine,
    optax_sgd,
    print_header,
    print_row,
    progress,
    scratch,
    torch_sgd,
)
from training import AUX_WEIGHT

TURN = 0.1
"""Seconds that a turn takes at least."""

BATCHES = {"inference": [1, 32, 256], "training": [64, 256]}


class Engine(NamedTuple):
    """The functions of one engine."""

    put: Callable[[np.ndarray, np.ndarray], Any]
    """Takes images NHWC and labels to the device."""
    run: Callable[[Any], Any]
    """Starts a call on the device, and may return before its result is there."""
    wait: Callable[[Any], np.ndarray]
    """Waits for the result of a call, and returns it: the logits, or the loss of a step."""
    peak: Callable[[], float]
    """Returns the peak memory on the device so far, in MB."""


def pytorch(folder: Path, task: str, precision: str, compiled: bool = False) -> Engine:
    """Return an engine of PyTorch, with channels_last, which is the fastest layout."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "TF32"
    torch.backends.cudnn.benchmark = True
    model = torch.load(folder / "network.pt", weights_only=False)
    model = model.to(device, memory_format=torch.channels_last).train(task == "training")
    half = precision == "bfloat16"
    dtype = torch.bfloat16 if half and task == "inference" else torch.float32
    model = model.to(dtype)
    optimizer = torch_sgd(model)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            main, *aux = (torch.nn.functional.cross_entropy(logits, labels) for logits in model(images))
            return main + AUX_WEIGHT * sum(aux)

    if compiled and device.type == "cpu":  # only a check that everything runs
        model.conv1 = torch.compile(model.conv1, dynamic=False)
    elif compiled and task == "training":
        step = torch.compile(step, dynamic=False)
    elif compiled:
        # Both modes use CUDA graphs. "max-autotune" also tries several kernels for each convolution, for minutes.
        model = torch.compile(model, dynamic=False, mode="reduce-overhead" if is_quick() else "max-autotune")

    def put(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        chw = torch.from_numpy(images).to(device, dtype).permute(0, 3, 1, 2)
        return chw.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels).to(device)

    def infer(inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return model(inputs[0])

    def train(inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        loss = step(*inputs)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def peak() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")

    return Engine(put, infer if task == "inference" else train, lambda result: result.float().cpu().numpy(), peak)


def flax(folder: Path, task: str, precision: str) -> Engine:
    """Return an engine of this library: ``make_predictor`` or ``train_step``."""
    import jax
    from jax import numpy as jnp

    import flax_googlenet
    from flax_googlenet.architecture import BLOCKS
    from flax_googlenet.training import create_train_state, train_step

    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    model, variables = flax_googlenet.load(folder / "weights.safetensors")
    model = model.clone(dtype=dtype, precision="highest" if precision == "float32" else None)
    if task == "inference":
        predict = flax_googlenet.make_predictor(model, variables, jax.devices()[:1])
    else:
        is_check = jax.default_backend() == "cpu"  # only that everything runs: this compiles in a third of the time
        frozen = BLOCKS[: BLOCKS.index("inception5b")] if is_check else ()
        state = create_train_state(model, variables, optax_sgd(), frozen=frozen, aux_weight=AUX_WEIGHT)

    def put(images: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
        return jax.device_put({"image": images.astype(dtype), "label": labels.astype(np.int32)}, jax.devices()[0])

    def train(batch: dict[str, jax.Array]) -> jax.Array:
        nonlocal state
        state, metrics = train_step(state, batch, jax.random.key(0))
        return metrics["loss"]

    def peak() -> float:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**20

    run = (lambda batch: predict(batch["image"])) if task == "inference" else train
    return Engine(put, run, lambda result: np.asarray(result, np.float32), peak)


LIBRARIES: dict[str, Callable[..., Engine]] = {
    "PyTorch": pytorch,
    "torch.compile": lambda *arguments: pytorch(*arguments, compiled=True),
    "flax-googlenet": flax,
}
PRECISIONS = ("bfloat16", "TF32", "float32")
"""TF32 is float32 that NVIDIA's tensor cores round to 10 bits; a TPU rounds to bfloat16. The last is exact float32."""

ENGINES = {
    f"{library}, {precision}, {task}": (library, task, precision)
    for task in BATCHES
    for precision in PRECISIONS
    for library in LIBRARIES
}


Answers = dict[tuple[str, int], list[dict[str, Any]]]
"""Answers by engine and batch size."""


def main() -> None:
    """Run the benchmark and print its table in Markdown."""
    arguments = parse_arguments()
    platform, kind = device()
    names = [name for name in arguments.engines if platform != "tpu" or "torch" not in name.lower()]
    batches, size = BATCHES | ({"training": [64]} if arguments.quick else {}), 224
    if platform == "cpu":
        print("note: JAX finds no accelerator: this only checks that everything runs", file=sys.stderr)
        batches, size, arguments.rounds = {"inference": [2], "training": [2]}, 64, 1
    if arguments.quick:
        precision = "bfloat16" if platform != "cpu" else "TF32"  # on a CPU, bfloat16 takes minutes
        names = [name for name in names if precision in name]
    packages = ("jax", "jaxlib", "flax", "optax", *(() if platform == "tpu" else ("torch", "torchvision")))
    print(f"{kind}; {machine(*packages)}\n")
    print_header("", "engine", "images/s", "first result, s", "peak MB", "error / largest logit")
    with scratch() as folder:
        inference.make_inputs(folder, [], size)
        for group in [[name] for name in names] if platform == "tpu" else [names]:
            measure(group, batches, size, arguments.rounds, folder)
    print("\nIn brackets: how many times as fast as torch.compile in the same precision.")


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=10, help="turns of each engine per batch size (10)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, metavar="ENGINE", default=list(ENGINES), help="default: all of them"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="end within 4 minutes: bfloat16 alone, training at batch 64 alone, torch.compile without autotuning, and "
        "all engines compile at the same time, so that the times of the first results are too long",
    )
    return parser.parse_args()


def device() -> tuple[str, str]:
    """Return the platform and the kind of JAX's first device. A process of its own asks: a TPU has room for one."""
    code = "import jax; device = jax.devices()[0]; print(device.platform, device.device_kind, sep='\\n')"
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    platform, kind = output.splitlines()[-2:]
    return platform, kind


def load(name: str, folder: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the engine ``calls`` times on ``batch`` images of ``size`` pixels.

    It returns the seconds of a call and the peak memory, and also the logits for ``inference.ERROR_BATCH`` images.
    """
    library, task, precision = ENGINES[name]
    engine = LIBRARIES[library](folder, task, precision)
    inputs: dict[int, Any] = {}

    def answer(batch: int, size: int, calls: int) -> dict[str, Any]:
        if batch not in inputs:
            labels = np.random.default_rng(batch).integers(0, 1000, batch)
            inputs[batch] = engine.put(inference.random_images(batch, size), labels)
        start = time.perf_counter()
        for _ in range(calls):
            result = engine.run(inputs[batch])
        result = engine.wait(result)
        measured = {"seconds": (time.perf_counter() - start) / calls, "peak": engine.peak()}
        return measured | ({"logits": result} if batch == inference.ERROR_BATCH else {})

    return answer


def measure(names: Sequence[str], batches: dict[str, list[int]], size: int, rounds: int, folder: Path) -> None:
    """Start the engines, let them take turns, and print each batch size when its turns are over.

    A run that is ended early has printed a part of the table.
    """
    from proof import relative_error

    first: Answers = {}  # the first answer includes the compilation, and two more warm up the engine
    errors: dict[str, float] = {}
    with contextlib.ExitStack() as processes, ThreadPoolExecutor(len(names) if is_quick() else 1) as threads:

        def start(name: str) -> Worker:
            worker = processes.enter_context(Worker(name, folder, functools.partial(load, name, folder)))
            task = ENGINES[name][1]
            for batch in batches[task]:  # CUDA graphs are captured in the calls after the first
                first[name, batch] = [worker.ask(batch=batch, size=size, calls=calls) for calls in (1, 2, 2)]
            if task == "inference":
                logits = worker.ask(batch=inference.ERROR_BATCH, size=size, calls=1)["logits"]
                errors[name] = relative_error(logits, np.load(folder / "truth.npy"))
            progress(f"{name}: compiled")
            return worker

        workers = dict(zip(names, threads.map(start, names), strict=True))
        for task, batch in [(task, batch) for task, sizes in batches.items() for batch in sizes]:
            turns: Answers = {(name, batch): [] for name in names if ENGINES[name][1] == task}
            for number in range(rounds):
                for name, _ in ORDER.sample(list(turns), len(turns)):
                    calls = max(2, round(TURN / first[name, batch][-1]["seconds"]))
                    turns[name, batch].append(workers[name].ask(batch=batch, size=size, calls=calls))
                progress(f"{task}, batch {batch}: round {number + 1} of {rounds}")
            report(f"{task}, batch {batch}", turns, first, errors)


def report(title: str, turns: Answers, first: Answers, errors: dict[str, float]) -> None:
    """Print a row for each engine."""
    medians = {key: statistics.median(answer["seconds"] for answer in answers) for key, answers in turns.items()}
    for (name, batch), answers in turns.items():
        _, task, precision = ENGINES[name]
        median, baseline = medians[name, batch], medians.get((f"torch.compile, {precision}, {task}", batch))
        rate = f"{batch / median:.0f}" + (f" ({baseline / median:.2f}x)" if baseline else "")
        first_result, peak = first[name, batch][0]["seconds"], answers[-1]["peak"]
        error = f"{errors[name]:.1e}" if name in errors else ""
        print_row(title, name.rpartition(",")[0], rate, f"{first_result:.1f}", f"{peak:.0f}", error)


if __name__ == "__main__":
    main()
