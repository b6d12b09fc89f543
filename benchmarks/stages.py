"""Measure what bounds a training step on a CPU: each stage alone, forwards and backwards, side by side with PyTorch.

A stage computes in training mode, in float32, on random input of the shape that it gets from images of 224x224, with
the gradients of its parameters and, except for the images, of its input. The average pool, the last layer, the loss and
the optimizer are left out, because they take little time. Each engine has a process of its own, PyTorch's in
channels_last, and both reuse memory as after keep_memory(). They take turns. The table has medians, and how many times
as fast as the first engine that is.

    pip install -e ".[benchmark]"
    python benchmarks/stages.py
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from side_by_side import (
    THREADS,
    Worker,
    is_quick,
    machine,
    parse_arguments,
    print_header,
    print_row,
    scratch,
    take_turns,
)

from flax_googlenet.training.memory import keep_memory  # imports no JAX

QUICK_STAGES = ("conv1", "maxpool1", "inception5b", "aux1")
"""The stages that --quick measures: one of each kind."""

Compute = Callable[[], None]
"""A function that computes one stage, forwards and backwards."""


def input_shapes(batch: int, size: int) -> dict[str, list[int]]:
    """Return the shape of each stage's input, NHWC, in the order of computation, with the auxiliary heads last."""
    import reference

    from flax_googlenet.inference.stages import summarize
    from flax_googlenet.model import GoogLeNet

    outputs = {"images": (size, size, 3)} | {stage.name: stage.output for stage in summarize(GoogLeNet(), size)}
    body = list(outputs)[: list(outputs).index("avgpool")]
    before = dict(zip(body[1:], body, strict=False)) | reference.AUX_INPUTS
    return {
        name: [batch, *outputs[previous]] for name, previous in before.items() if not is_quick() or name in QUICK_STAGES
    }


def pytorch(name: str, features: np.ndarray) -> Compute:
    import torch
    from torchvision.models import GoogLeNet as TorchGoogLeNet

    torch.set_num_threads(THREADS)
    stage = TorchGoogLeNet(init_weights=False).train().get_submodule(name).to(memory_format=torch.channels_last)
    x = torch.from_numpy(features).permute(0, 3, 1, 2).requires_grad_(name != "conv1")  # NHWC in memory: channels_last
    gradient = torch.ones_like(stage(x))

    def compute() -> None:
        stage.zero_grad()
        x.grad = None
        stage(x).backward(gradient)

    return compute


def flax(name: str, features: np.ndarray) -> Compute:
    import jax
    from jax import numpy as jnp

    from flax_googlenet.inference.compiling import jit
    from flax_googlenet.ops.pooling import max_pool

    variables: Any = {"params": {}}
    rngs = dict.fromkeys(("params", "dropout"), jax.random.key(0))
    if name.startswith("maxpool"):
        window = 2 if name == "maxpool4" else 3

        def apply(_: Any, x: jax.Array) -> Any:
            return max_pool(x, window, stride=2), {}
    else:
        stage = submodules()[name]
        variables = jax.tree.map(
            lambda x: jnp.full(x.shape, 0.01, x.dtype), jax.eval_shape(lambda: stage.init(rngs, features, True))
        )

        def apply(params: Any, x: jax.Array) -> Any:
            return stage.apply({**variables, "params": params}, x, True, rngs=rngs, mutable=["batch_stats"])

    @jit
    def output_and_gradients(params: Any, x: jax.Array, gradient: jax.Array) -> Any:
        inputs = (params,) if name == "conv1" else (params, x)
        output, backwards, statistics = jax.vjp(lambda params, x=x: apply(params, x), *inputs, has_aux=True)
        return output, backwards(gradient), statistics

    params, x = variables["params"], jnp.asarray(features)
    gradient = jnp.ones_like(jax.jit(apply)(params, x)[0])
    return lambda: jax.block_until_ready(output_and_gradients(params, x, gradient))


def submodules() -> dict[str, Any]:
    """Return the blocks of the network by name, each as a module of its own."""
    import jax
    from flax import linen as nn
    from jax import numpy as jnp

    from flax_googlenet.model import GoogLeNet

    found = {}

    def record(call: Callable[..., Any], arguments: Any, keywords: Any, context: Any) -> Any:
        if len(context.module.path) == 1:
            found[context.module.name] = context.module.clone(parent=None)
        return call(*arguments, **keywords)

    with nn.intercept_methods(record):
        jax.eval_shape(GoogLeNet().init, jax.random.key(0), jnp.zeros((1, 15, 15, 3)))
    return found


ENGINES: dict[str, Callable[[str, np.ndarray], Compute]] = {"PyTorch channels_last": pytorch, "this library": flax}


def main() -> None:
    """Run the benchmark and print its table in Markdown."""
    arguments = parse_arguments(__doc__, ENGINES, batches=[16], rounds=7)
    print(machine("jax", "jaxlib", "flax", "torch", "torchvision") + "\n")
    for batch in arguments.batches:
        measure(arguments.engines, batch, arguments.rounds, arguments.size)


def load(name: str) -> Callable[..., dict[str, Any]]:
    """Return a function that computes a stage with the engine and returns the seconds that it took."""
    keep_memory()

    @functools.lru_cache(maxsize=1)
    def warm(stage: str, shape: tuple[int, ...]) -> Compute:
        features = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        compute = ENGINES[name](stage, features)
        compute()
        return compute

    def answer(stage: str, shape: list[int]) -> dict[str, Any]:
        compute = warm(stage, tuple(shape))
        start = time.perf_counter()
        compute()
        return {"seconds": time.perf_counter() - start}

    return answer


def measure(engines: list[str], batch: int, rounds: int, size: int) -> None:
    """Print the table for one batch size."""
    print_header(f"milliseconds at batch {batch}", *engines)
    totals = dict.fromkeys(engines, 0.0)
    with scratch() as folder, contextlib.ExitStack() as processes:
        workers = {
            name: processes.enter_context(Worker(name, folder, functools.partial(load, name))) for name in engines
        }
        for stage, shape in input_shapes(batch, size).items():
            turns = take_turns(workers, rounds, f"batch {batch}, {stage}", stage=stage, shape=shape)
            medians = {name: statistics.median(x["seconds"] for x in answers) for name, answers in turns.items()}
            print_times(stage, medians)
            totals = {name: totals[name] + medians[name] for name in engines}
    print_times("sum of these", totals)


def print_times(stage: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print_row(stage, *(f"{1000 * x:.1f} ({first / x:.2f}x)" for x in seconds.values()))


if __name__ == "__main__":
    main()
