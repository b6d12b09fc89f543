"""Compile the network for an NVIDIA H100 on a machine without one, and print what the compiler makes of it.

XLA's compiler needs no GPU. The first table has the kernels that a call starts, the bytes that they read and write, the
memory on the card, and how many convolutions and matrix products compute at which precision. The second has the kernels
by what they compute. A kernel that only turns or casts weights depends on no image, and could run once instead of in
each call. A kernel that reads a part of an array counts with all of its bytes. Nothing is run, and so the compiler does
not try several kernels, as it does where a GPU is: benchmarks/accelerator.py measures on one.

A program takes from seconds to a minute to compile.

    pip install -e ".[cuda]"    in an environment of its own: JAX's CUDA packages take 5 GB
    python benchmarks/gpu.py --programs "inference, bfloat16" "training, bfloat16"
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from programs import (
    Compiled,
    Operation,
    compile_program,
    make_program,
    measure,
    operations,
    parse_arguments,
    product_precisions,
    stage,
)
from side_by_side import machine, print_header, print_row

from flax_googlenet.architecture import BLOCKS

# What the compiler asks a card for, as xla/backends/gpu/target_config/specs/h100_sxm.txtpb in openxla/xla has it.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
"""

OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Without a GPU there is nothing to tune on. Triton's matrix products cannot do without tuning."""

NO_KERNELS = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple")


def main() -> None:
    """Compile the programs and print the tables in Markdown."""
    arguments = parse_arguments(__doc__, 64)
    if find_spec("jax_plugins") is None:
        sys.exit('gpu.py: the compiler for NVIDIA\'s GPUs is not installed: pip install -e ".[cuda]"')
    compiled = {}
    for name in arguments.programs:
        compile_it = functools.partial(compile_for, name, arguments.batch, arguments.size, arguments.quick)
        compiled[name] = measure(f"{name}, H100", compile_it, arguments.hlo)
    print(f"{machine('jax', 'jaxlib', 'flax', 'optax')}; {arguments.batch} images on one H100\n")
    report(compiled)
    report_parts({name: program.text for name, program in compiled.items()})


@functools.cache
def devices() -> Sequence[Any]:
    """Return an H100 that does not exist. Only a compiler can use it."""
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX looks for a GPU
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100).devices


def compile_for(name: str, batch: int, size: int = 224, short: bool = False) -> Compiled:
    """Compile one of ``PROGRAMS`` for ``batch`` images on an H100."""
    return compile_program(make_program(name, batch, "gpu", size, short), devices(), OPTIONS)


def kernels(text: str) -> Iterator[tuple[str, Operation]]:
    """Yield what each kernel of a compiled program computes, and the kernel."""
    weights = set()
    for row in operations(text):
        if row.kind == "parameter" and not row.source.startswith(("images", "batch")):
            weights.add(row.name)
        if row.kind in NO_KERNELS:
            continue
        if row.operands and weights.issuperset(row.operands):
            part = "weights turned or cast"
        elif "__cudnn" in row.kind:
            part = "convolutions"
        elif "__cublas" in row.kind:
            part = "matrix products"
        elif "/bn/" in row.source:
            part = "BatchNorm"
        else:
            part = stage(row) if stage(row) not in BLOCKS else "other parts of the blocks"
        yield part, row


def report(compiled: dict[str, Compiled]) -> None:
    """Print the table of all programs."""
    print_header("program", "kernels", "GB read and written", "GB on the card", "products by precision")
    for name, program in compiled.items():
        rows = [row for _, row in kernels(program.text)]
        precisions = product_precisions(program.text)
        print_row(
            name,
            str(len(rows)),
            f"{sum(row.size for row in rows) / 1e9:.2f}",
            f"{program.memory / 1e9:.2f}",
            ", ".join(f"{count} {precision}" for precision, count in precisions.items()),
        )


def report_parts(texts: dict[str, str]) -> None:
    """Print the kernels and their bytes by what they compute."""
    cells: dict[str, dict[str, tuple[int, int]]] = {}
    for name, text in texts.items():
        for part, row in kernels(text):
            by_program = cells.setdefault(part, dict.fromkeys(texts, (0, 0)))
            count, size = by_program[name]
            by_program[name] = count + 1, size + row.size
    print()
    print_header("kernels (GB)", *texts)
    for part, by_program in cells.items():
        print_row(part, *(f"{count} ({size / 1e9:.2f})" for count, size in by_program.values()))


if __name__ == "__main__":
    main()
