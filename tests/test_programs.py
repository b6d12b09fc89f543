"""What the compilers for TPUs and for NVIDIA's GPUs make of the network, on a machine that has neither."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import gpu
import jax
import pytest
import tpu
from jax import numpy as jnp
from programs import SHORT, Compiled, operations, product_precisions, stage

import flax_googlenet
from flax_googlenet.architecture import BLOCKS
from flax_googlenet.model import variable_shapes

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason='needs pip install -e ".[tpu]"')
needs_cuda = pytest.mark.skipif(find_spec("jax_plugins") is None, reason='needs pip install -e ".[cuda]"')

Compile = Callable[..., Compiled]

V5E_MEMORY = 16 * 2**30
"""Bytes of memory on one chip."""


@pytest.fixture(scope="module")
def in_a_process() -> Iterator[Compile]:
    """Call a function in a process of its own: libtpu and CUDA's libraries replace signal handlers, and stay loaded."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def kernel_sizes(blocks: tuple[str, ...]) -> list[int]:
    """Return the number of values in the kernel of each convolution and matrix product in some blocks."""
    params = variable_shapes(flax_googlenet.GoogLeNet())["params"]
    return [leaf.size for name in blocks for leaf in jax.tree.leaves(params[name]) if leaf.ndim > 1]


def is_direct(compiled: Compiled, blocks: tuple[str, ...], precision: str) -> bool:
    """Return whether a step has as many products as direct convolutions need, each with this precision.

    They are three for each kernel, of which the first has no gradient of its input. Winograd's algorithm has others.
    """
    return product_precisions(compiled.text) == {precision: 3 * len(kernel_sizes(blocks)) - 1}


def reduces_the_gradient_once(compiled: Compiled, blocks: tuple[str, ...]) -> bool:
    """Return whether one all-reduce has the float32 gradients of all kernels, and all others have 5 % of its bytes.

    The others have the statistics of BatchNorm, which are of the whole batch.
    """
    rows = [row for row in operations(compiled.text) if row.kind.startswith("all-reduce")]
    *others, largest = sorted(row.size / 2 for row in rows if not row.kind.endswith("-done"))  # operands and results
    gradient = 4 * sum(kernel_sizes(blocks))
    return gradient <= largest < 1.05 * gradient and sum(others) < 0.05 * gradient


def test_an_operation_has_its_size_its_source_and_the_precision_of_the_model() -> None:
    def function(weights: jax.Array, images: jax.Array) -> jax.Array:
        with jax.named_scope("GoogLeNet/conv1"):
            return jnp.matmul(images, weights, precision="highest")

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 5), (4, 3))]
    text = jax.jit(function).lower(*shapes).compile().as_text()
    by_kind = {row.kind: row for row in operations(text)}
    assert by_kind["parameter"].size == 4 * 4 * 3
    product = by_kind["dot"]
    assert (product.size, stage(product)) == (4 * (3 * 5 + 4 * 3 + 4 * 5), "conv1")
    assert product_precisions(text) == {"highest": 1}


@needs_libtpu
def test_the_precision_reaches_every_product_of_the_stem_and_a_block_on_a_tpu(in_a_process: Compile) -> None:
    compiled = in_a_process(tpu.compile_for, "v5e", 1, "inference, float32 highest", 2, 64, True)
    assert product_precisions(compiled.text) == {"highest": len(kernel_sizes(SHORT))}


@needs_libtpu
@pytest.mark.slow
def test_four_chips_reduce_the_gradient_of_the_stem_and_a_block_once_and_use_no_winograd(in_a_process: Compile) -> None:
    compiled = in_a_process(tpu.compile_for, "v5e", 4, "training, float32", 2, 64, True)
    assert is_direct(compiled, SHORT, "default")
    assert reduces_the_gradient_once(compiled, SHORT)


@needs_libtpu
@pytest.mark.aot
def test_the_precision_reaches_every_product_of_inference_on_a_tpu(in_a_process: Compile) -> None:
    compiled = in_a_process(tpu.compile_for, "v5e", 1, "inference, float32 highest", 32)
    blocks = tuple(name for name in BLOCKS if not name.startswith("aux"))
    assert product_precisions(compiled.text) == {"highest": len(kernel_sizes(blocks))}


@needs_libtpu
@pytest.mark.aot
def test_a_step_on_four_chips_has_the_models_precision_no_winograd_and_one_gradient(in_a_process: Compile) -> None:
    compiled = in_a_process(tpu.compile_for, "v5e", 4, "training, float32 highest", 32)
    assert is_direct(compiled, BLOCKS, "highest")
    assert reduces_the_gradient_once(compiled, BLOCKS)


@needs_libtpu
@pytest.mark.aot
def test_a_step_of_256_images_fits_on_a_chip(in_a_process: Compile) -> None:
    assert in_a_process(tpu.compile_for, "v5e", 1, "training, bfloat16", 256).memory < V5E_MEMORY


@needs_cuda
@pytest.mark.aot
def test_inference_on_a_gpu_turns_and_casts_no_weight_and_has_the_models_precision(in_a_process: Compile) -> None:
    compiled = in_a_process(gpu.compile_for, "inference, float32 highest", 64)
    assert list(product_precisions(compiled.text)) == ["highest"]
    assert "weights turned or cast" not in [part for part, _ in gpu.kernels(compiled.text)]


@needs_cuda
@pytest.mark.aot
def test_a_step_on_a_gpu_has_the_models_precision_and_no_winograd(in_a_process: Compile) -> None:
    assert is_direct(in_a_process(gpu.compile_for, "training, float32 highest", 64), BLOCKS, "highest")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("script", "tables"),
    [
        pytest.param(tpu, ["| program | chips |", "| million cycles, 1 v5e |"], marks=needs_libtpu),
        pytest.param(gpu, ["| program | kernels |", "| kernels (GB) |"], marks=needs_cuda),
    ],
)
def test_a_script_prints_its_tables_and_writes_the_programs(
    script: ModuleType, tables: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, script.__file__, "--quick", "--hlo", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(table in process.stdout for table in tables)
    names = {path.name.rpartition("-bfloat16")[0] for path in tmp_path.iterdir()}
    assert names == {"inference", "training"}
