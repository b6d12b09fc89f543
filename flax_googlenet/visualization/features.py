"""Feature visualisation: images that excite a channel, a neuron or any other function of the stages.

References:
    Olah et al., "Feature Visualization", Distill 2017, https://doi.org/10.23915/distill.00007
    https://github.com/tensorflow/lucid, from which the constants of this module are
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float

from flax_googlenet.architecture import IMAGENET_MEAN, IMAGENET_STD, NETWORKS, stage_name
from flax_googlenet.inference.compiling import jit
from flax_googlenet.model import ConvBN, GoogLeNet, Variables, endpoints

Objective = Callable[[dict[str, jax.Array], Any], jax.Array]
"""Takes the stages of one image, each [H, W, C] (``fc`` is [num_classes]), and its target, and returns a number."""

_State = tuple[Any, optax.OptState]
"""The spectrum, and the moments of Adam."""

_ADAM = optax.adam(0.05)
_REDIRECTED_STEPS = 16
_STEPS_BETWEEN_REPORTS = 16
_MAX_SHIFT = 12  # pixels
_MAX_SCALE = 0.1  # larger or smaller by this share
_MAX_ANGLE = np.deg2rad(10)

# A square root of the covariance of the colours of ImageNet's pixels, scaled so that the longest column has length 1.
_COLORS = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
_COLORS = (_COLORS / np.linalg.norm(_COLORS, axis=0).max()).astype(np.float32)


def feature_images(
    model: GoogLeNet,
    variables: Variables,
    stage: str,
    channels: Sequence[int],
    key: jax.Array,
    *,
    steps: int = 512,
    size: int = 224,
    on_step: Callable[[int], None] | None = None,
) -> Float[Array, "n size size 3"]:
    """Return, for each of some channels of a stage, an image that makes the mean of the channel large.

    Example::

        images = feature_images(model, variables, "inception4c", [0, 3, 17], jax.random.key(0))
        PIL.Image.fromarray(np.uint8(images[0] * 255 + 0.5))

    Args:
        model: The network.
        variables: Its variables.
        stage: The stage, by any name that ``endpoints`` takes. ``fc`` has a channel for each class.
        channels: Numbers of channels of the stage.
        key: Key of the random start and of the transformations. The same key gives the same images.
        steps: Number of steps of Adam.
        size: Height and width of the images in pixels.
        on_step: Called after every 16 steps with the number of steps that are done, for a display of progress. Without
            it, Ctrl-C takes effect only after the last step.

    Returns:
        RGB in [0, 1], in the order of ``channels``.

    Raises:
        ValueError: If ``stage`` names no stage, a channel does not exist, or ``size`` is less than the
            network takes.
    """
    stage = stage_name(stage, model.variant)
    numbers = np.asarray(channels)
    min_size = NETWORKS[model.variant].min_size
    images = jax.ShapeDtypeStruct((1, min_size, min_size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda v, x: endpoints(model, v, x, branches=True), variables, images)
    count = shapes[stage].shape[-1]
    if numbers.ndim != 1 or not all(number in range(count) for number in numbers.tolist()):
        raise ValueError(f"channels: {stage} has the channels 0 to {count - 1}, got {channels}")
    targets = numbers.astype(np.int32)
    return optimize_images(model, variables, _channel(stage), targets, key, steps=steps, size=size, on_step=on_step)


@functools.cache  # so that the same stage is the same objective, which is compiled once
def _channel(stage: str) -> Objective:
    return lambda stages, channel: stages[stage][..., channel].mean()


def optimize_images(
    model: GoogLeNet,
    variables: Variables,
    objective: Objective,
    targets: Any,
    key: jax.Array,
    *,
    steps: int = 512,
    size: int = 224,
    on_step: Callable[[int], None] | None = None,
) -> Float[Array, "n size size 3"]:
    """Return, for each target, an image that makes the objective large.

    The images are parametrised by their Fourier spectrum, scaled by 1 / frequency, in colours without correlation. In
    each step they are shifted, scaled and rotated at random before the network sees them. All steps of all images are
    one compiled loop. Another function object as the objective is compiled anew; the last eight are kept, with the
    arrays that they hold.

    Example::

        def neuron(stages, channel):
            height, width, _ = stages["inception4c"].shape
            return stages["inception4c"][height // 2, width // 2, channel]

        def direction(stages, vector):
            return (stages["inception4c"] @ vector).mean()

        def cat_of_few_edges(stages, _):
            return stages["fc"][285] - 10 * stages["conv1"].mean()

        images = optimize_images(model, variables, neuron, jnp.array([0, 3, 17]), jax.random.key(0))

    Args:
        model: The network.
        variables: Its variables.
        objective: Takes ``(stages, target)``, and returns a number. ``stages`` are those of one image under the names
            of ``endpoints`` with ``branches=True``: [H, W, C], and [num_classes] for ``fc``.
        targets: What the images differ in: an array, or nested arrays, whose first axis has an entry for each image.
        key: Key of the random start and of the transformations. The same key gives the same images.
        steps: Number of steps of Adam.
        size: Height and width of the images in pixels.
        on_step: Called after every 16 steps with the number of steps that are done, for a display of progress. Without
            it, Ctrl-C takes effect only after the last step.

    Returns:
        RGB in [0, 1], in the order of ``targets``.

    Raises:
        ValueError: If ``size`` is less than the network takes, if ``targets`` does not have an entry for each image,
            or if ``objective`` returns more than one number.
    """
    if size < NETWORKS[model.variant].min_size:
        raise ValueError(f"size must be at least {NETWORKS[model.variant].min_size}, got {size}")
    axes = {np.shape(target)[:1] for target in jax.tree.leaves(targets)}
    if len(axes) != 1 or axes == {()}:
        raise ValueError(
            "targets: expected an array with an entry for each image on its first axis, or nested ones of one length, "
            "such as jax.numpy.array([0, 3, 17])"
        )
    ((count,),) = axes
    start_key, steps_key = jax.random.split(key)
    spectrum = 0.01 * jax.random.normal(start_key, (count, 2, size, size // 2 + 1, 3), jnp.float32)
    state = spectrum, _ADAM.init(spectrum)
    take_steps = _loop(model, objective, size)
    done = 0
    while done < steps:
        stop = min(done + _STEPS_BETWEEN_REPORTS, steps) if on_step else steps
        state = take_steps(variables, targets, steps_key, state, done, stop)
        done = stop
        if on_step:
            jax.block_until_ready(state)
            on_step(done)
    return _decode(state[0], size)


@functools.lru_cache(maxsize=8)
def _loop(model: GoogLeNet, objective: Objective, size: int) -> Callable[..., _State]:
    """Return the compiled loop that takes the steps ``first`` to ``stop - 1`` of all images."""

    def loss(spectrum: jax.Array, variables: Variables, targets: Any, key: jax.Array, step: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(key, step), len(spectrum))
        images = jax.vmap(_transform)(_decode(spectrum, size), keys)
        redirect_relu = nn.intercept_methods(_redirect_relu(step < _REDIRECTED_STEPS))
        with nn.intercept_methods(convolve_as_in_training), redirect_relu:
            stages = endpoints(model, variables, normalise(images), branches=True)
        values = jax.vmap(objective)(stages, targets)  # [n]
        if values.ndim != 1:
            raise ValueError(f"objective: expected a number for each image, got an array of shape {values.shape[1:]}")
        return -values.sum()

    def take_steps(
        variables: Variables, targets: Any, key: jax.Array, state: _State, first: jax.Array, stop: jax.Array
    ) -> _State:
        def take_step(step: jax.Array, state: _State) -> _State:
            spectrum, moments = state
            gradient = jax.grad(loss)(spectrum, variables, targets, key, step)
            with jax.numpy_dtype_promotion("standard"):  # optax's Adam does not work with strict promotion
                updates, moments = _ADAM.update(gradient, moments)
            return optax.apply_updates(spectrum, updates), moments

        return jax.lax.fori_loop(first, stop, take_step, state)

    return jit(take_steps, donate_argnums=3)


def _decode(spectrum: jax.Array, size: int) -> jax.Array:
    """Return the RGB images in [0, 1], [N, size, size, 3], of spectra [N, 2, size, size // 2 + 1, 3]."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])  # [size, size // 2 + 1]
    scale = (size / np.maximum(frequency, 1 / size)).astype(np.float32)[None, :, :, None]
    scaled = jax.lax.complex(spectrum[:, 0] * scale, spectrum[:, 1] * scale)
    colors = jnp.fft.irfft2(scaled, (size, size), axes=(1, 2)) / 4  # [n, size, size, 3]
    return jax.nn.sigmoid(jnp.einsum("nhwd,cd->nhwc", colors, _COLORS, precision="highest"))


def _transform(image: jax.Array, key: jax.Array) -> jax.Array:
    """Shift, scale and rotate an image [H, W, 3] at random about its centre; places outside of it are grey."""
    shift_key, scale_key, angle_key = jax.random.split(key, 3)
    shift = jax.random.uniform(shift_key, (2, 1, 1), jnp.float32, minval=-_MAX_SHIFT, maxval=_MAX_SHIFT)
    scale = jax.random.uniform(scale_key, (), jnp.float32, minval=1 - _MAX_SCALE, maxval=1 + _MAX_SCALE)
    angle = jax.random.uniform(angle_key, (), jnp.float32, minval=-_MAX_ANGLE, maxval=_MAX_ANGLE)
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]) / scale
    center = (np.array(image.shape[:2], np.float32)[:, None, None] - 1) / 2
    places = jnp.indices(image.shape[:2], jnp.float32) - center  # [2, h, w]
    places = jnp.einsum("ij,jhw->ihw", rotation, places, precision="highest") + center + shift
    return jax.vmap(lambda x: map_coordinates(x, list(places), order=1, cval=0.5), in_axes=2, out_axes=2)(image)


def normalise(images: jax.Array) -> jax.Array:
    """Return images in [0, 1] as the network takes them."""
    return (images - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)


def convolve_as_in_training(
    method: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], context: Any
) -> Any:
    """Intercept Flax's methods so that convolutions are those of training, whose gradients are faster on a CPU."""
    if isinstance(context.module, ConvBN) and context.method_name == "convolution":
        return method(train=True)
    return method(*arguments, **options)


def _redirect_relu(redirect: jax.Array) -> Callable[..., Any]:
    """Return an interceptor of Flax that, if ``redirect`` is true, lets gradients pass that would vanish in a ReLU.

    A channel that is 0 everywhere in an image would have no gradient to start with. So if all of the gradient of an
    image would vanish in a ReLU, those parts of it pass that make values below 0 larger.
    """

    def intercept(method: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], context: Any) -> Any:
        if isinstance(context.module, ConvBN) and context.method_name == "relu":
            return _redirected_relu(arguments[0], redirect)
        return method(*arguments, **options)

    return intercept


@jax.custom_vjp
def _redirected_relu(x: jax.Array, redirect: jax.Array) -> jax.Array:
    return nn.relu(x)


def _forward(x: jax.Array, redirect: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return nn.relu(x), (x, redirect)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    x, redirect = saved
    plain = jnp.where(x > 0, gradient, 0)
    vanishes = ~(plain != 0).any((1, 2, 3), keepdims=True)
    # The loss is the negated objective: its gradient is negative where a larger value is better.
    upward = jnp.where((x > 0) | (gradient < 0), gradient, 0)
    return jnp.where(redirect & vanishes, upward, plain), None


_redirected_relu.defvjp(_forward, _backward)
