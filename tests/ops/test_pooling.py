"""Pooling against PyTorch, in random geometries that PyTorch accepts."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from flax_googlenet.ops import platforms
from flax_googlenet.ops.pooling import adaptive_avg_pool, avg_pool, max_pool

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
WAYS = ("by masks", "by XLA")


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(0, 2, 3, 1).detach().numpy()


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def images(h: int, w: int) -> np.ndarray:
    # With few distinct values, windows have ties. All are negative, so padding with 0 would win.
    return np.random.default_rng([h, w]).integers(-9, 0, (2, h, w, 3)).astype(np.float64)


@st.composite
def pools(draw: st.DrawFn, largest: int) -> tuple[int, int, int]:
    """Draw a window, a stride and a padding."""
    window = draw(st.integers(1, largest))
    return window, draw(st.integers(1, 9)), draw(st.integers(0, window // 2))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), pools(largest=7))
def test_max_pool_is_torchs(h: int, w: int, pool: tuple[int, int, int]) -> None:
    window, stride, padding = pool
    x = images(h, w)
    try:
        expected = torch.nn.functional.max_pool2d(nchw(x), window, stride, padding, ceil_mode=True)
    except RuntimeError as error:
        assert "too small" in str(error)
        with pytest.raises(ValueError, match="too few"):
            max_pool(jnp.asarray(x), window, stride, padding)
        return
    actual = jax.jit(max_pool, static_argnums=(1, 2, 3))(x, window, stride, padding)
    np.testing.assert_array_equal(actual, nhwc(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 7), st.integers(1, 7))
def test_same_padding_has_a_window_for_each_stride_and_an_odd_pixel_after_the_image(
    h: int, w: int, window: int, stride: int
) -> None:
    stride = min(stride, window)
    pads = [max((-(-size // stride) - 1) * stride + window - size, 0) for size in (w, h)]
    before_and_after = [pad for total in pads for pad in (total // 2, (total + 1) // 2)]
    padded = torch.nn.functional.pad(nchw(images(h, w)), before_and_after, value=-torch.inf)
    expected = nhwc(torch.nn.functional.max_pool2d(padded, window, stride))
    assert expected.shape[1:3] == (-(-h // stride), -(-w // stride))
    np.testing.assert_array_equal(max_pool(jnp.asarray(images(h, w)), window, stride, "SAME"), expected)


@pytest.mark.parametrize(("h", "w", "window", "stride"), [(12, 9, 3, 2), (4, 11, 2, 3), (3, 3, 3, 2)])
def test_valid_padding_leaves_out_the_pixels_after_the_last_window(h: int, w: int, window: int, stride: int) -> None:
    x = images(h, w)
    with pytest.raises(ValueError, match="too few"):
        max_pool(jnp.asarray(x[:, : window - 1]), window, stride, "VALID")
    tensor = nchw(x).requires_grad_()
    expected = torch.nn.functional.max_pool2d(tensor, window, stride)
    expected.sum().backward()
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), window, stride, "VALID"), nhwc(expected))
    gradient = jax.grad(lambda x: max_pool(x, window, stride, "VALID").sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, nhwc(tensor.grad))


def force(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this machine compute the gradient of a max pool in the way of a TPU, or of all other platforms."""
    monkeypatch.setattr(platforms, "XLA_POOL_GRADIENT", PLATFORMS if way == "by XLA" else ())


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=20, deadline=None)
@given(st.integers(3, 12), st.integers(3, 12), pools(largest=3))
def test_max_pool_gives_the_gradient_of_a_tie_to_the_same_pixel(
    way: str, h: int, w: int, pool: tuple[int, int, int]
) -> None:
    window, stride, padding = pool
    x = images(h, w)
    tensor = nchw(x).requires_grad_()
    expected = torch.nn.functional.max_pool2d(tensor, window, stride, padding, ceil_mode=True)
    weights = np.random.default_rng(0).standard_normal(nhwc(expected).shape)
    (expected * nchw(weights)).sum().backward()

    with pytest.MonkeyPatch.context() as monkeypatch:
        force(way, monkeypatch)
        gradient = jax.jit(jax.grad(lambda x: (max_pool(x, window, stride, padding) * weights).sum()))(x)
    assert tensor.grad is not None
    np.testing.assert_allclose(gradient, nhwc(tensor.grad), rtol=0, atol=1e-14)  # sums of at most 9 in another order


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_max_pool_has_derivatives_of_every_mode(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(way, monkeypatch)
    x, v = images(6, 7), np.random.default_rng(1).standard_normal((2, 6, 7, 3))

    @jax.jit
    def total(x: jax.Array) -> jax.Array:
        return (max_pool(x, 3, 2, 1) ** 3).sum()

    _, forward = jax.jvp(total, (x,), (v,))
    np.testing.assert_allclose(forward, (jax.grad(total)(x) * v).sum(), rtol=1e-14)  # 2e-16 measured
    _, second = jax.jvp(jax.grad(total), (x,), (v,))  # the Hessian times v
    transposed = jax.grad(lambda x: (jax.grad(total)(x) * v).sum())(x)
    np.testing.assert_allclose(second, transposed, rtol=0, atol=1e-14 * np.abs(second).max())  # 1e-16 measured


@pytest.mark.parametrize("way", WAYS)
def test_max_pool_carries_nan_and_infinity_as_torch_does(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(way, monkeypatch)
    x = images(7, 7)
    x[:, 3, 3:5] = np.nan
    x[:, 2:4, 2] = np.inf  # above, and beside NaN
    x[:, 6, 6], x[:, 5, 6] = np.inf, np.finfo(np.float64).max
    tensor = nchw(x).requires_grad_()
    expected = torch.nn.functional.max_pool2d(tensor, 3, 2, 1, ceil_mode=True)
    expected.sum().backward()
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), 3, 2, 1), nhwc(expected))
    pooled, pullback = jax.vjp(lambda x: max_pool(x, 3, 2, 1), jnp.asarray(x))
    np.testing.assert_array_equal(pooled, nhwc(expected))
    assert tensor.grad is not None
    np.testing.assert_array_equal(pullback(np.ones_like(pooled))[0], nhwc(tensor.grad))  # to the last NaN of a window


def test_max_pool_drops_a_window_that_starts_in_the_padding() -> None:
    # ceil((2 + 2 - 2) / 2) + 1 = 2 windows. With a size of 2 and a padding of 1, the second starts at pixel 1: kept.
    assert max_pool(jnp.asarray(images(2, 2)), window=2, stride=2, padding=1).shape == (2, 2, 2, 3)
    # ceil((1 + 2 - 2) / 2) + 1 = 2 windows. The second would start after the only pixel: dropped.
    assert max_pool(jnp.asarray(images(1, 1)), window=2, stride=2, padding=1).shape == (2, 1, 1, 3)


def test_max_pool_refuses_padding_above_half_a_window_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="half of"):
        torch.nn.functional.max_pool2d(nchw(images(5, 5)), 3, 1, 2)
    with pytest.raises(ValueError, match="half the window, got padding 2 and window 3"):
        max_pool(jnp.asarray(images(5, 5)), window=3, stride=1, padding=2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 7))
def test_adaptive_avg_pool_is_torchs(h: int, w: int, output_size: int) -> None:
    x = np.random.default_rng([h, w]).standard_normal((2, h, w, 3))
    expected = torch.nn.functional.adaptive_avg_pool2d(nchw(x), output_size)
    # Means of up to 900 values near 1 in another order: 7e-16 measured over 120 draws.
    actual = jax.jit(adaptive_avg_pool, static_argnums=1)(x, output_size)
    np.testing.assert_allclose(actual, nhwc(expected), rtol=0, atol=1e-14)


def test_adaptive_windows_from_14_to_4_start_at_0_3_7_and_10() -> None:
    x = np.zeros((1, 14, 14, 1))
    x[0, (0, 3, 7, 10), 0, 0] = (1, 20, 300, 4000)
    column = np.asarray(adaptive_avg_pool(jnp.asarray(x), 4))[0, :, 0, 0] * 16
    np.testing.assert_allclose(column, [1 + 20, 20, 300 + 4000, 4000], rtol=1e-15)


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 30), st.integers(5, 30))
def test_avg_pool_is_torchs_in_ceil_mode(h: int, w: int) -> None:
    x = np.random.default_rng([h, w]).standard_normal((2, h, w, 3))
    expected = torch.nn.functional.avg_pool2d(nchw(x), 5, 3, ceil_mode=True)
    actual = jax.jit(avg_pool, static_argnums=(1, 2))(x, 5, 3)
    np.testing.assert_allclose(actual, nhwc(expected), rtol=0, atol=1e-14)
