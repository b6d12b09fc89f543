"""Shared by tpu.py and gpu.py: programs compiled for devices that this machine does not have, and what came out."""

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from side_by_side import QUICK_SIZE, optax_sgd, progress

from flax_googlenet import GoogLeNet
from flax_googlenet.architecture import BLOCKS
from flax_googlenet.inference.folding import fold_batch_norm
from flax_googlenet.inference.predictor import _inference_graph, _tuned_graph
from flax_googlenet.model import variable_shapes
from flax_googlenet.training import create_train_state, train_step

PRECISIONS = {"float32 highest": ("float32", "highest"), "float32": ("float32", None), "bfloat16": ("bfloat16", None)}
"""The dtype and the precision of a model. Without "highest", float32 is TF32 on a GPU and bfloat16 on a TPU."""

PROGRAMS = {f"{task}, {name}": (task, name) for task in ("inference", "training") for name in PRECISIONS}

SHORT = BLOCKS[: BLOCKS.index("inception3a") + 1]
"""The blocks of a short program: the stem and one inception block, which compile in seconds."""


class Program(NamedTuple):
    """A function to compile, and the shapes and dtypes of its arguments."""

    function: Callable[[Any, Any], Any]
    state: Any
    """The first argument, of which each device has a copy: weights, or all that a step changes."""
    batch: Any
    """The second argument, which is split over the devices."""
    is_step: bool
    """Whether the result is a new state, in the memory of the old one, and not a batch of logits."""


class Compiled(NamedTuple):
    """What came out of a compiler."""

    text: str
    """The optimised program, in XLA's HLO."""
    memory: int
    """Bytes on each device while the program runs: arguments, results and temporary memory."""


class Operation(NamedTuple):
    """An operation of a compiled program: on a GPU, a kernel."""

    kind: str
    """HLO's name of the operation, and the library function that a custom call runs."""
    source: str
    """The JAX primitive that became this operation, below the names of its modules; empty if the compiler added it."""
    operands: tuple[str, ...]
    """The names of the operations whose results it reads."""
    size: int
    """Bytes of its operands and results."""
    cycles: int
    """The cycles that the TPU's compiler estimates; 0 for a GPU."""
    name: str


def make_program(name: str, batch: int, platform: str, size: int = 224, short: bool = False) -> Program:
    """Return one of ``PROGRAMS``.

    Inference is what ``make_predictor`` computes on the platform. A training step is ``train_step``, with three heads
    and SGD with momentum and weight decay.

    Args:
        name: The name of the program.
        batch: The number of images.
        platform: JAX's name of the platform, "tpu" or "gpu".
        size: Height and width of the images, in pixels.
        short: Whether to end after the stem and one inception block, which compile in seconds: their output, or their
            gradients and an update.
    """
    task, precision = PROGRAMS[name]
    dtype, precision = PRECISIONS[precision]
    model = GoogLeNet(dtype=jnp.dtype(dtype), precision=precision)
    shapes = variable_shapes(model)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    if task == "training":
        inputs = {"image": images, "label": jax.ShapeDtypeStruct((batch,), jnp.int32)}
        if short:
            return Program(lambda state, batch: _short_step(model, state, batch), shapes, inputs, is_step=True)
        state = jax.eval_shape(lambda variables: create_train_state(model, variables, optax_sgd()), shapes)
        return Program(lambda state, batch: train_step(state, batch, jax.random.key(0)), state, inputs, is_step=True)

    folded, variables = fold_batch_norm(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    tuned = None if short else _tuned_graph(model, platform)
    weights = variables if tuned is None else tuned.prepare(variables["params"])
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype), weights)
    if short:
        return Program(lambda weights, images: _short_pass(folded, weights, images)[0], weights, images, is_step=False)
    return Program(_inference_graph(model, platform), weights, images, is_step=False)


def _short_pass(model: GoogLeNet, variables: Any, images: jax.Array, train: bool = False) -> tuple[jax.Array, Any]:
    """Return the output of the last stage of a short program, and the new statistics. XLA drops the later stages."""
    _, collections = model.apply(
        variables, images, train=train, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats", "intermediates"]
    )
    (output,) = collections["intermediates"][SHORT[-1] + "_output"]
    return output, {name: stats for name, stats in collections.get("batch_stats", {}).items() if name in SHORT}


def _short_step(model: GoogLeNet, variables: Any, batch: Any) -> Any:
    """Return the variables after a step that makes the mean of the last stage's output smaller."""

    def objective(params: Any) -> tuple[jax.Array, Any]:
        output, stats = _short_pass(model, {**variables, "params": params}, batch["image"], train=True)
        return output.mean(dtype=jnp.float32), stats

    grads, stats = jax.grad(objective, has_aux=True)(variables["params"])
    params = {name: jax.tree.map(jnp.subtract, variables["params"][name], grads[name]) for name in SHORT}
    return {"params": {**variables["params"], **params}, "batch_stats": {**variables["batch_stats"], **stats}}


def compile_program(program: Program, devices: Sequence[Any], options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile a program for devices of a topology, which share the batch.

    Args:
        program: The program.
        devices: The devices.
        options: Compiler options of ``jax.jit``.
    """
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    everywhere, split = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("batch")))
    jitted = jax.jit(
        program.function,
        in_shardings=(everywhere, split),
        out_shardings=everywhere if program.is_step else split,
        donate_argnums=(0,) if program.is_step else (),
        compiler_options=options,
    )
    platform = "tpu" if devices[0].platform == "tpu" else "cuda"
    compiled = jitted.trace(program.state, program.batch).lower(lowering_platforms=(platform,)).compile()
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(compiled.as_text(), kept + memory.temp_size_in_bytes)


_OPERATION = re.compile(
    r"\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<kind>[\w\-]+)\((?P<operands>.*?)\)(?:,|$)"
)
_ARRAY = re.compile(r"\b(?:[a-z]+(?P<bits>\d+)\w*|pred)\[(?P<shape>[\d,]*)\]")


def operations(text: str) -> Iterator[Operation]:
    """Yield the operations of a program's entry computation. The bodies of loops are not looked into."""
    sizes: dict[str, int] = {}
    for line in text[text.index("\nENTRY") :].splitlines()[2:]:
        match = _OPERATION.match(line)
        if match is None:
            continue
        name, kind = match["name"], match["kind"]
        operands = tuple(dict.fromkeys(re.findall(r"%([\w.\-]+)", match["operands"])))
        sizes[name] = sum(
            math.prod(map(int, filter(None, array["shape"].split(",")))) * int(array["bits"] or 8) // 8
            for array in _ARRAY.finditer(match["type"])
        )
        target, source, cycles = (
            found[1] if (found := re.search(pattern, line)) else ""
            for pattern in (r'custom_call_target="([^"]+)"', r'op_name="([^"]*)"', r'"estimated_cycles":"(\d+)"')
        )
        yield Operation(
            kind=f"{kind} {target}".strip(),
            source=source,
            operands=operands,
            size=sizes[name] + sum(sizes.get(operand, 0) for operand in operands),
            cycles=int(cycles or 0),
            name=name,
        )


def product_precisions(text: str) -> Counter[str]:
    """Return how many convolutions and matrix products a program has with each precision of their operands."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if re.search(r' (convolution|dot)\(|custom_call_target="__cu(dnn|blas)', line):
            precision = re.search(r"operand_precision(?:=\{|\":\[)([\w\",]+)", line)
            operands = re.findall(r"\w+", precision[1].lower())[:2] if precision else ["default"]
            found["/".join(dict.fromkeys(operands))] += 1
    return found


def stage(operation: Operation) -> str:
    """Return the part of the program that an operation belongs to, from the names of the modules in its source."""
    names = re.split(r"[/()]+", operation.source)
    for name in names:
        if name in BLOCKS:
            return name
    if not operation.source:
        return "copies"
    if "_train_step" in names and "GoogLeNet" not in names:
        return "loss and optimizer"
    return "pools and concatenations"


def parse_arguments(description: str | None, batch: int, **options: dict[str, Any]) -> argparse.Namespace:
    """Return the options of a script: those of both scripts, and ``options``, by name, which only one has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--batch", type=int, default=batch, help=f"images on each device ({batch})")
    parser.add_argument(
        "--programs",
        nargs="+",
        choices=PROGRAMS,
        metavar="PROGRAM",
        default=list(PROGRAMS),
        help=f"what to compile, in quotes: {', '.join(map(repr, PROGRAMS))} (all)",
    )
    parser.add_argument("--hlo", type=Path, metavar="FOLDER", help="also write the compiled programs here, as HLO")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"only check that everything runs: the stem and one inception block, on 2 images of {QUICK_SIZE}x"
        f"{QUICK_SIZE}, in bfloat16; the figures mean nothing",
    )
    arguments = parser.parse_args()
    if arguments.hlo is not None:
        arguments.hlo.mkdir(parents=True, exist_ok=True)
    arguments.size = 224
    if arguments.quick:
        arguments.size, arguments.batch = QUICK_SIZE, 2
        arguments.programs = [name for name in arguments.programs if "bfloat16" in name]
    return arguments


def measure(title: str, compile_it: Callable[[], Compiled], folder: Path | None) -> Compiled:
    """Return what ``compile_it`` returns, show the progress, and write the program to a folder, if there is one."""
    progress(f"{title}: compiling")
    start = time.perf_counter()
    compiled = compile_it()
    progress(f"{title}: compiled in {time.perf_counter() - start:.0f} s")
    if folder is not None:
        (folder / f"{re.sub(r'[, ]+', '-', title)}.hlo").write_text(compiled.text)
    return compiled
