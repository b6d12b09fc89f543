"""Convolutions by Winograd's algorithm, and their gradients, against PyTorch's."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from jax import lax
from jax import numpy as jnp

from flax_googlenet.ops import winograd

Convolution = Callable[[jax.Array, jax.Array], jax.Array]


def operands(n: int, h: int, w: int, inputs: int, outputs: int) -> list[np.ndarray]:
    """Return an input, a kernel and a gradient of the output, NHWC and HWIO, rounded to float32."""
    rng = np.random.default_rng([n, h, w, inputs, outputs])
    shapes = [(n, h, w, inputs), (3, 3, inputs, outputs), (n, h, w, outputs)]
    return [rng.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in shapes]


def of_torch(x: np.ndarray, kernel: np.ndarray, gradient: np.ndarray, dtype: torch.dtype) -> list[np.ndarray]:
    """Return the output, and the gradients of the input and the kernel."""
    x, gradient = (torch.from_numpy(a.transpose(0, 3, 1, 2)).to(dtype) for a in (x, gradient))
    kernel = torch.from_numpy(kernel.transpose(3, 2, 0, 1)).to(dtype)
    output = torch.nn.functional.conv2d(x.requires_grad_(), kernel.requires_grad_(), padding=1)
    output.backward(gradient)
    nhwc, hwio = (0, 2, 3, 1), (2, 3, 1, 0)
    return [
        output.detach().numpy().transpose(nhwc),
        x.grad.numpy().transpose(nhwc),
        kernel.grad.numpy().transpose(hwio),
    ]


def of_jax(convolution: Convolution, x: np.ndarray, kernel: np.ndarray, gradient: np.ndarray) -> list[np.ndarray]:
    @jax.jit
    def all_three(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        output, backwards = jax.vjp(convolution, x, kernel)
        return output, *backwards(gradient)

    return [np.asarray(a) for a in all_three(x, kernel, gradient)]


def by_winograd(m: int) -> Convolution:
    return lambda x, kernel: winograd.conv3x3(x, winograd.transform_kernel(kernel, m))


def in_training(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 1) -> jax.Array:
    pads = ((padding, padding), (padding, padding))
    return winograd.convolution(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def direct(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 1) -> jax.Array:
    pads = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def errors(actual: list[np.ndarray], expected: list[np.ndarray]) -> np.ndarray:
    return np.array([np.abs(a - e).max() / np.abs(e).max() for a, e in zip(actual, expected, strict=True)])


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(1, 1, 1, 8, 8), (2, 3, 9, 5, 7), (3, 8, 12, 4, 6), (1, 17, 14, 3, 2)])
def test_convolution_and_gradients_are_torchs_in_float64(m: int, size: tuple[int, ...]) -> None:
    arrays = operands(*size)
    worst = errors(of_jax(by_winograd(m), *arrays), of_torch(*arrays, torch.float64)).max()
    print(f"m {m}, {size}: {worst:.1e}")
    assert worst < 1e-13  # measured: 1e-14 for one pixel, 2e-15 else


def test_float32_rounds_little_more_than_the_direct_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = operands(4, 28, 28, 128, 192)  # a convolution of inception3b
    exact = of_torch(*arrays, torch.float64)
    rounded = [array.astype(np.float32) for array in arrays]
    ours = errors(of_jax(in_training, *rounded), exact)
    pytorch = errors(of_torch(*arrays, torch.float32), exact)
    xla = errors(of_jax(direct, *rounded), exact)
    print(f"output, gradient of input, of kernel: {ours}; PyTorch {pytorch}; XLA {xla}")
    assert (ours < 2 * np.maximum(pytorch, xla)).all()  # measured: 1.2, 1.4, 0.9 times

    monkeypatch.setitem(winograd._POINTS, 4, (0, 1, -1, 2, -2))
    monkeypatch.setattr(winograd, "transforms", winograd.transforms.__wrapped__)
    lavin = errors(of_jax(by_winograd(4), *rounded), exact)
    print(f"with Lavin and Gray's points: {lavin}")
    assert (lavin > 2 * ours).all()  # measured: 5, 2.6, 4.5 times


@pytest.mark.parametrize(
    ("shape", "dtype", "stride", "padding", "is_winograd"),
    [
        ((2, 14, 14, 64), jnp.float32, 1, 1, True),
        ((2, 14, 14, 64), jnp.float64, 1, 1, True),
        ((2, 14, 14, 64), jnp.bfloat16, 1, 1, False),
        ((2, 14, 14, 63), jnp.float32, 1, 1, False),
        ((2, 13, 14, 64), jnp.float32, 1, 1, False),
        ((2, 14, 14, 64), jnp.float32, 2, 1, False),
        ((2, 14, 14, 64), jnp.float32, 1, 0, False),
    ],
)
def test_training_uses_winograds_algorithm_where_that_is_faster_and_precise(
    shape: tuple[int, ...], dtype: jnp.dtype, stride: int, padding: int, is_winograd: bool
) -> None:
    x = jnp.ones(shape, dtype)
    kernel = jnp.ones((3, 3, shape[-1], 64), dtype)

    def products(convolution: Callable[..., jax.Array]) -> float:
        jitted = jax.jit(functools.partial(convolution, stride=stride, padding=padding))
        return jitted.lower(x, kernel).cost_analysis()["flops"]

    assert (products(in_training) < 0.6 * products(direct)) == is_winograd
    assert is_winograd or products(in_training) == products(direct)


@pytest.mark.parametrize(
    ("size", "padding"), [((15, 18), ((3, 3), (3, 3))), ((16, 15), "SAME")], ids=["pytorch", "tensorflow"]
)
def test_all_derivatives_of_a_direct_convolution_are_those_of_jax(
    size: tuple[int, int], padding: str | tuple[tuple[int, int], ...]
) -> None:
    rng = np.random.default_rng(0)
    shapes = (2, *size, 3), (7, 7, 3, 4)
    arrays, tangents = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))

    def derivatives(convolve: Convolution) -> list[jax.Array]:
        def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
            output = convolve(x, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return jnp.sin(output).sum()

        gradient = jax.grad(loss, (0, 1))
        forward_over_reverse = jax.jvp(gradient, arrays, tangents)  # the gradient and a product with the Hessian
        reverse_over_reverse = jax.grad(lambda *xs: sum((g**3).sum() for g in gradient(*xs)), (0, 1))(*arrays)
        return jax.tree.leaves([forward_over_reverse, reverse_over_reverse, jax.jacfwd(loss, (0, 1))(*arrays)])

    ours, jaxs = (
        jax.jit(functools.partial(derivatives, f))() for f in (winograd.convolution, lax.conv_general_dilated)
    )
    assert errors(ours, jaxs).max() < 1e-13  # measured: 0


def test_inside_a_loop_the_gradient_is_a_convolution_that_the_library_of_a_cpu_computes() -> None:
    def has_unordered_kernel(convolution: Convolution) -> bool:
        def loop(x: jax.Array, kernel: jax.Array) -> jax.Array:
            gradient = jax.grad(lambda x: jnp.square(convolution(x, kernel)).sum())
            return lax.fori_loop(0, 3, lambda _, x: x - gradient(x), x)

        program = jax.jit(loop).lower(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 6))).compile().as_text()
        assert "convolution(" in program
        return "b01f_01oi" in program

    assert has_unordered_kernel(direct)
    assert not has_unordered_kernel(in_training)


ON_TWO_DEVICES = """
import jax
import numpy as np
from flax_googlenet.ops.pooling import max_pool
from jax.sharding import NamedSharding, PartitionSpec
from test_winograd import errors, in_training, operands

x, kernel, gradient = (array.astype(np.float32) for array in operands(4, 14, 14, 64, 32))
arrays = x, kernel, gradient[:, ::2, ::2]
mesh = jax.make_mesh((2,), ("batch",))
over_batch, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())


@jax.jit
def gradients(x, kernel, gradient):
    return jax.vjp(lambda *xs: max_pool(in_training(*xs), 3, 2), x, kernel)[1](gradient)


shared = [jax.device_put(array, place) for array, place in zip(arrays, (over_batch, everywhere, over_batch))]
print(errors(gradients(*shared), gradients(*arrays)).max())
print("all-gather" in gradients.lower(*shared).compile().as_text())
"""


@pytest.mark.slow
def test_two_devices_share_a_batch() -> None:
    """On explicit axes, the default of jax.make_mesh, each device computes its own images and sends none."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_TWO_DEVICES]
    shown = subprocess.check_output(command, env=environment, cwd=Path(__file__).parent, text=True)
    error, gathers = shown.split()
    assert float(error) < 1e-5  # measured: 8e-7
    assert gathers == "False"
