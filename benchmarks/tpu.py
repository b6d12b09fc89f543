"""Compile the network for TPUs on a machine without one, and print what the compiler says about it.

Google's compiler for TPUs, libtpu, needs no TPU. It estimates the cycles of each operation; a v5e makes 1.5e9 a second.
The first table has the sum of these estimates, the number of operations without one (loops, and XLA's gradient of a max
pool), the memory on each chip, how many convolutions and matrix products compute at which precision, and what the chips
exchange. The second has the cycles by stage, on the fewest chips. An operation that is fused from two stages counts for
one of them. Nothing is run: benchmarks/accelerator.py measures on a TPU.

A network takes from half a minute to several minutes to compile, and three times as long at the highest precision.

    pip install -e ".[tpu]"     in an environment of its own: JAX prints warnings where it finds libtpu and no TPU
    python benchmarks/tpu.py --programs "inference, bfloat16" "training, bfloat16"
    python benchmarks/tpu.py --programs "training, bfloat16" --chips v5e v6e --meshes 4 16
"""

import functools
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from programs import (
    Compiled,
    compile_program,
    make_program,
    measure,
    operations,
    parse_arguments,
    product_precisions,
    stage,
)
from side_by_side import machine, print_header, print_row

CHIPS = ("v4", "v5e", "v6e")
MESHES = (1, 4, 16)

NO_ESTIMATE = ("select-and-scatter", "while")
"""HLO's names of the operations that take time and for which the compiler gives no estimate."""


def main() -> None:
    """Compile the programs and print the tables in Markdown."""
    arguments = parse_arguments(
        __doc__,
        batch=32,
        chips={"nargs": "+", "choices": CHIPS, "default": ["v5e"], "help": "generations of chips (v5e)"},
        meshes={"nargs": "+", "type": int, "choices": MESHES, "default": [1], "help": "chips that share a batch (1)"},
    )
    if find_spec("libtpu") is None:
        sys.exit('tpu.py: the compiler for TPUs is not installed: pip install -e ".[tpu]"')
    rows = [(name, chip, n) for name in arguments.programs for chip in arguments.chips for n in arguments.meshes]
    compiled = {}
    for name, chip, number in rows:
        compile_it = functools.partial(
            compile_for, chip, number, name, arguments.batch, arguments.size, arguments.quick
        )
        compiled[name, chip, number] = measure(f"{name}, {number} {chip}", compile_it, arguments.hlo)
    print(f"{machine('jax', 'jaxlib', 'libtpu', 'flax', 'optax')}; {arguments.batch} images a chip\n")
    report(compiled)
    for chip in arguments.chips:
        fewest = min(arguments.meshes)
        report_stages(f"{fewest} {chip}", {name: compiled[name, chip, fewest].text for name in arguments.programs})


@functools.cache
def devices(chip: str, number: int) -> Sequence[Any]:
    """Return the chips of a TPU that does not exist. Only a compiler can use them."""
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX looks for a TPU
    # What libtpu otherwise asks the host of a TPU for. Any type with a host of four chips does, for each generation.
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost", TPU_SKIP_MDS_QUERY="1")
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled")  # other processes may compile, too
    small, large = ("2x2x1", "2x2x4") if chip == "v4" else ("2x2", "4x4")
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}  # its two cores are one device
    name = f"{chip}:{small if number <= 4 else large}"
    return topologies.get_topology_desc(name, "tpu", **options).devices[:number]


def compile_for(chip: str, number: int, name: str, batch: int, size: int = 224, short: bool = False) -> Compiled:
    """Compile one of ``PROGRAMS`` for ``number`` chips, with ``batch`` images on each."""
    return compile_program(make_program(name, number * batch, "tpu", size, short), devices(chip, number))


def report(compiled: dict[tuple[str, str, int], Compiled]) -> None:
    """Print the table of all programs."""
    columns = ("million cycles", "no estimate", "MB a chip", "products by precision", "all-reduces (MB)")
    print_header("program", "chips", *columns)
    for (name, chip, number), program in compiled.items():
        rows = list(operations(program.text))
        reduced = [row for row in rows if row.kind.startswith("all-reduce") and not row.kind.endswith("done")]
        print_row(
            name,
            f"{number} {chip}",
            f"{sum(row.cycles for row in rows) / 1e6:.2f}",
            str(sum(row.kind in NO_ESTIMATE for row in rows)),
            f"{program.memory / 1e6:.0f}",
            ", ".join(f"{count} {precision}" for precision, count in product_precisions(program.text).items()),
            f"{len(reduced)} ({sum(row.size for row in reduced) / 2e6:.1f})",  # size: operands and results
        )


def report_stages(title: str, texts: dict[str, str]) -> None:
    """Print the cycles of each stage, in the order of the programs."""
    cycles: dict[str, dict[str, int]] = {}
    print()
    print_header(f"million cycles, {title}", *texts)
    for name, text in texts.items():
        for row in operations(text):
            counts = cycles.setdefault(stage(row), dict.fromkeys(texts, 0))
            counts[name] += row.cycles
    for part, counts in cycles.items():
        print_row(part, *(f"{count / 1e6:.2f}" for count in counts.values()))


if __name__ == "__main__":
    main()
