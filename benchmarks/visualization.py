"""Compare feature visualisation with the same optimisation in PyTorch, side by side.

A call optimises an image for each of 16 channels of inception4c of torchvision's network with random weights: Fourier
basis, colours without correlation, a random shift, scale and rotation before each step, and Adam, in float32 at
224x224. Each engine has a process of its own, and they take turns of 4 steps each. The table has medians of the seconds
a step, and the time of 512 steps. In PyTorch the weights have no gradients and the network ends with the stage.

    pip install -e ".[benchmark]"
    python benchmarks/visualization.py
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import (
    Worker,
    machine,
    parse_arguments,
    peak_memory,
    print_header,
    print_row,
    scratch,
    take_turns,
    torch_model,
    write_network,
)

STAGE = "inception4c"
STEPS = 4

Optimize = Callable[[int, int], Any]
"""Optimises a number of images of a size in pixels for STEPS steps, and returns when they are there."""


def pytorch(folder: Path, channels_last: bool = False) -> Optimize:
    import torch
    from torch.nn import functional

    from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD

    model, layout = torch_model(folder, channels_last)
    model.requires_grad_(False)
    colors = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    colors = colors / colors.norm(dim=0).max()
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    stages = dict(model.named_children())
    stage = torch.nn.Sequential(*list(stages.values())[: list(stages).index(STAGE) + 1])

    def optimize(count: int, size: int) -> None:
        spectrum = (0.01 * torch.randn(count, 2, 3, size, size // 2 + 1)).requires_grad_()
        optimizer = torch.optim.Adam([spectrum], 0.05)
        frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
        scale = size / frequency.clamp(min=1 / size)
        for _ in range(STEPS):
            pixels = torch.fft.irfft2(torch.complex(*(spectrum * scale).unbind(1)), (size, size)) / 4
            images = torch.sigmoid(torch.einsum("ndhw,cd->nchw", pixels, colors))
            angle = torch.deg2rad(torch.empty(count).uniform_(-10, 10))
            zoom, shift = torch.empty(count).uniform_(0.9, 1.1), torch.empty(count, 2).uniform_(-12, 12) * 2 / size
            rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
            places = torch.cat([rotation / zoom[:, None, None], shift[:, :, None]], 2)
            grid = functional.affine_grid(places, list(images.shape), align_corners=False)
            images = functional.grid_sample(images - 0.5, grid, align_corners=False) + 0.5  # grey comes in from outside
            values = stage(((images - mean) / std).contiguous(memory_format=layout))
            loss = -values[range(count), range(count)].mean((1, 2)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return optimize


def flax(folder: Path) -> Optimize:
    import jax

    import flax_googlenet
    from flax_googlenet.visualization import feature_images

    model, variables = flax_googlenet.load(folder / "weights.safetensors")
    return lambda count, size: feature_images(
        model, variables, STAGE, range(count), jax.random.key(0), steps=STEPS, size=size
    ).block_until_ready()


ENGINES: dict[str, Callable[[Path], Optimize]] = {
    "PyTorch": pytorch,
    "PyTorch channels_last": lambda folder: pytorch(folder, channels_last=True),
    "feature_images": flax,
}


def load(name: str, folder: Path, size: int) -> Callable[..., dict[str, Any]]:
    """Return a function that optimises ``batch`` images, and returns the seconds of a step and the peak memory."""
    optimize = ENGINES[name](folder)

    def answer(batch: int) -> dict[str, Any]:
        start = time.perf_counter()
        optimize(batch, size)
        return {"seconds": (time.perf_counter() - start) / STEPS, "peak": peak_memory()}

    return answer


def main() -> None:
    """Run the benchmark and print its table in Markdown."""
    arguments = parse_arguments(__doc__, ENGINES, batches=[16], rounds=5)
    with scratch() as folder, contextlib.ExitStack() as processes:
        write_network(folder)
        workers = {
            name: processes.enter_context(Worker(name, folder, functools.partial(load, name, folder, arguments.size)))
            for name in arguments.engines
        }
        for batch in arguments.batches:
            first = {name: worker.ask(batch=batch)["seconds"] * STEPS for name, worker in workers.items()}
            answers = take_turns(workers, arguments.rounds, f"{batch} images", batch=batch)
            report(batch, first, answers)


def report(batch: int, first: dict[str, float], answers: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table of a number of images."""
    medians = {name: statistics.median(answer["seconds"] for answer in turns) for name, turns in answers.items()}
    baseline = min((medians[name] for name in medians if "PyTorch" in name), default=next(iter(medians.values())))
    print(machine("jax", "jaxlib", "flax", "optax", "torch", "torchvision") + "\n")
    print_header(f"{batch} images", "seconds a step", "512 steps, minutes", f"first {STEPS} steps, s", "peak MB")
    for name, median in medians.items():
        speed = f"{median:.2f} ({baseline / median:.2f}x)"
        print_row(name, speed, f"{512 * median / 60:.1f}", f"{first[name]:.0f}", f"{answers[name][-1]['peak']:.0f}")
    print("\nIn brackets: how many times as fast as the faster of PyTorch's layouts.")


if __name__ == "__main__":
    main()
