"""Compare training steps on a CPU, side by side: this library and PyTorch.

A step has three heads, the backward pass, and SGD with momentum and weight decay, in float32 at 224x224. Each engine
has a process of its own, and they take turns while the others are idle. The engines with "memory kept" call
keep_memory() first: the C library then reuses the memory that a step frees. The table has medians over all rounds,
ratios, the time of the first step, and the peak memory.

    pip install -e ".[benchmark]"
    python benchmarks/training.py
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import (
    Worker,
    flax_step,
    is_quick,
    machine,
    optax_sgd,
    parse_arguments,
    peak_memory,
    print_header,
    print_row,
    progress,
    scratch,
    take_turns,
    torch_model,
    torch_sgd,
    write_network,
)

from flax_googlenet.training.memory import keep_memory  # imports no JAX

AUX_WEIGHT = 0.3

Step = Callable[[np.ndarray, np.ndarray], float]
"""Takes a step on images NHWC and labels, and returns the loss."""


def pytorch(folder: Path, channels_last: bool = False, compiled: bool = False) -> Step:
    import torch

    model, layout = torch_model(folder, channels_last)
    model.train()
    optimizer = torch_sgd(model)
    loss = torch.nn.functional.cross_entropy

    def objective(images: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        main, *aux = (loss(logits, labels) for logits in model(images))
        return main + AUX_WEIGHT * sum(aux)

    if compiled and is_quick():
        model.conv1 = torch.compile(model.conv1, dynamic=False)
    elif compiled:
        objective = torch.compile(objective, dynamic=False)

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        optimizer.zero_grad()
        inputs = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        value = objective(inputs, torch.from_numpy(labels))
        value.backward()
        optimizer.step()
        return value.item()

    return step


def flax(folder: Path) -> Step:
    import flax_googlenet
    from flax_googlenet.architecture import BLOCKS
    from flax_googlenet.training import create_train_state

    model, variables = flax_googlenet.load(folder / "weights.safetensors")
    frozen = BLOCKS[: BLOCKS.index("inception5b")] if is_quick() else ()  # compiles in a third of the time
    return flax_step(create_train_state(model, variables, optax_sgd(), frozen=frozen, aux_weight=AUX_WEIGHT))


ENGINES: dict[str, Callable[[Path], Step]] = {
    "PyTorch": pytorch,
    "PyTorch channels_last": lambda folder: pytorch(folder, channels_last=True),
    "torch.compile": lambda folder: pytorch(folder, channels_last=True, compiled=True),
    "train_step": flax,
}
KEPT = ", memory kept"
ENGINES |= {name + KEPT: ENGINES[name] for name in ("PyTorch channels_last", "train_step")}


def main() -> None:
    """Run the benchmark and print its table in Markdown."""
    arguments = parse_arguments(__doc__, ENGINES, batches=[16, 64], rounds=5)
    results = {}
    with scratch() as folder:
        write_network(folder)
        for batch in arguments.batches:
            results |= measure(arguments.engines, folder, batch, arguments.rounds, arguments.size)
    report(arguments.engines, arguments.batches, results)


def load(name: str, folder: Path, size: int) -> Callable[..., dict[str, Any]]:
    """Return a function that takes a step and returns its seconds, its loss, and the peak memory so far in MB."""
    if name.endswith(KEPT):
        keep_memory()
    step = ENGINES[name](folder)

    def answer(batch: int) -> dict[str, Any]:
        rng = np.random.default_rng(batch)
        images, labels = rng.standard_normal((batch, size, size, 3)).astype(np.float32), rng.integers(0, 1000, batch)
        start = time.perf_counter()
        loss = step(images, labels)
        return {"seconds": time.perf_counter() - start, "loss": loss, "peak": peak_memory()}

    return answer


def measure(
    engines: list[str], folder: Path, batch: int, rounds: int, size: int
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Return all answers, by engine and batch size. The first answer is for the step that compiles."""
    with contextlib.ExitStack() as processes:
        workers, answers = {}, {}
        for name in engines:
            workers[name] = processes.enter_context(Worker(name, folder, functools.partial(load, name, folder, size)))
            answers[name, batch] = [workers[name].ask(batch=batch), workers[name].ask(batch=batch)]
            progress(f"batch {batch}: {name} is warm")
        for name, turns in take_turns(workers, rounds, f"batch {batch}", batch=batch).items():
            answers[name, batch] += turns
    return answers


def report(engines: list[str], batches: list[int], results: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    """Print the table."""
    print(machine("jax", "jaxlib", "flax", "optax", "torch", "torchvision") + "\n")
    columns = [
        f"{title}, batch {batch}" for batch in batches for title in ("seconds a step", "first step, s", "peak MB")
    ]
    print_header("", *columns)
    medians = {key: statistics.median(x["seconds"] for x in answers[2:]) for key, answers in results.items()}
    for name in engines:
        cells = []
        for batch in batches:
            eager = [medians[x, batch] for x in ("PyTorch", "PyTorch channels_last") if x in engines]
            ratio = f" ({min(eager) / medians[name, batch]:.2f}x)" if eager else ""
            answers = results[name, batch]
            cells += [
                f"{medians[name, batch]:.2f}{ratio}",
                f"{answers[0]['seconds']:.0f}",
                f"{answers[-1]['peak']:.0f}",
            ]
        print_row(name, *cells)
    print("\nIn brackets: how many times as fast as the faster of PyTorch's eager layouts without memory kept.")


if __name__ == "__main__":
    main()
