"""GoogLeNet (Inception v1) as a Flax Linen module for NHWC images: torchvision's network and three of the paper's.

``architecture.NETWORKS`` says what sets them apart.

Reference: Szegedy et al., "Going Deeper with Convolutions", https://arxiv.org/abs/1409.4842
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype, Initializer
from jax import numpy as jnp
from jax.sharding import AxisType, reshard
from jaxtyping import Array, Float

from flax_googlenet.architecture import (
    BLOCKS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NETWORKS,
    Padding,
    kernel_shapes,
    stage_name,
)
from flax_googlenet.ops import platforms, winograd
from flax_googlenet.ops.normalization import local_response_norm
from flax_googlenet.ops.pooling import adaptive_avg_pool, avg_pool, max_pool, per_channel

Variables = Mapping[str, Any]
"""Nested dict ``{"params": ..., "batch_stats": ...}`` of arrays; ``batch_stats`` is absent without BatchNorm."""

# Truncated at two standard deviations, as scipy.stats.truncnorm(-2, 2, scale=0.01) is. torchvision's code today, which
# calls trunc_normal_(std=0.01, a=-2, b=2), truncates at the values -2 and 2, that is, hardly ever.
_kernel_init = nn.initializers.truncated_normal(stddev=0.01, lower=-2.0, upper=2.0)

_BLOCK = 2**20  # number of values in one draw of initial kernels

MISSING_HEAD = (
    "aux_logits is True and the variables have no {0}: "
    "train model.clone(aux_logits=False), or add the {0} of model.init"
)

_OUTPUT = "_output"  # suffix of recorded values, which share a namespace with the submodules: "conv1" is taken


class GoogLeNetOutput(NamedTuple):
    """The outputs of the network, with the fields of torchvision's ``GoogLeNetOutputs`` in the same order."""

    logits: jax.Array
    """[N, num_classes]"""
    aux_logits2: jax.Array | None
    """[N, num_classes] in training with ``aux_logits``, else None; from the features of inception4d."""
    aux_logits1: jax.Array | None
    """[N, num_classes] in training with ``aux_logits``, else None; from the features of inception4a."""


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's statistics.

    In training, the input is normalised with the biased variance of the batch, and the running variance is updated with
    the unbiased one, which is n / (n - 1) times as large. ``flax.linen.BatchNorm`` updates it with the biased one, and
    computes E[x^2] - E[x]^2, which cancels for a large mean and can turn negative (google/flax#1491). Here a value near
    the mean is subtracted first. Statistics are computed and stored in float32 at least.

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    momentum: float = 0.9  # weight of the old statistics; PyTorch's momentum is 1 minus this
    epsilon: float = 1e-3  # as in torchvision's GoogLeNet; PyTorch's default is 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool) -> Float[Array, "*batch c"]:
        """Normalise ``x``, in training by the statistics of the batch, with which it updates the running ones.

        Raises:
            ValueError: In training on one value per channel, which has no unbiased variance. PyTorch raises, too.
        """
        channels = (x.shape[-1],)
        stats_dtype = at_least_float32(self.param_dtype)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, stats_dtype)

        compute_dtype = at_least_float32(self.dtype)
        x = x.astype(compute_dtype)
        if train:
            batch_axes = tuple(range(x.ndim - 1))
            count = math.prod(x.shape[:-1])
            if count < 2:
                raise ValueError(
                    f"BatchNorm needs more than 1 value a channel in training, got an input of shape {x.shape}: "
                    "use a larger batch or larger images"
                )
            # Both statistics take one pass over x, and the gradient one pass less: a step in bfloat16 is 1.04 times as
            # fast on an NVIDIA H200. The shift is the mean at the first index of the last axis but one. It differs from
            # the mean by at most sqrt(width) standard deviations, where width is the length of that axis. So the
            # difference below loses at most the rounding of width + 1 terms: 2e-5 in float32 for a width of 112.
            first_column = jax.lax.slice_in_dim(x, 0, 1, axis=x.ndim - 2)  # [n, h, 1, c]
            shift = jax.lax.stop_gradient(first_column.mean(batch_axes))  # [c]
            deviation = x - per_channel(shift, x)
            mean_deviation = deviation.mean(batch_axes)  # [c]
            mean = shift + mean_deviation
            # For a constant channel, rounding can make the difference negative.
            var = jnp.maximum(jnp.square(deviation).mean(batch_axes) - jnp.square(mean_deviation), 0)  # [c]
            if not self.is_initializing():
                running_mean.value = self._update(running_mean.value, mean)
                running_var.value = self._update(running_var.value, var * (count / (count - 1)))
        else:
            mean = running_mean.value.astype(compute_dtype)
            var = running_var.value.astype(compute_dtype)
        multiplier = jax.lax.rsqrt(var + self.epsilon) * scale.astype(compute_dtype)
        mean, multiplier, bias = (per_channel(v, x) for v in (mean, multiplier, bias.astype(compute_dtype)))
        return ((x - mean) * multiplier + bias).astype(self.dtype)

    def _update(self, running: jax.Array | np.ndarray, batch: jax.Array) -> jax.Array:
        return jnp.asarray(self.momentum * running + (1 - self.momentum) * batch.astype(running.dtype))


class ConvBN(nn.Module):
    """Convolution, BatchNorm and ReLU: torchvision's ``BasicConv2d``. Without BatchNorm, the convolution has a bias."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    padding: Padding = 0
    variant: str = "torchvision"
    batch_norm: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = _kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h2 w2 {self.features}"]:
        """Map ``x`` [N, H, W, C] to [N, H2, W2, features]."""
        padding = self.padding if self.padding == "SAME" else ((self.padding, self.padding),) * 2
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=(self.stride, self.stride),
            padding=padding,
            use_bias=not self.batch_norm,
            kernel_init=self.kernel_init,
            bias_init=nn.initializers.constant(0.2 if NETWORKS[self.variant].caffe_init else 0.0),
            conv_general_dilated=self.convolution(train),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,  # type: ignore[arg-type]  # Flax's annotation is narrower than JAX's
            name="conv",
        )(x)
        if self.batch_norm:
            x = BatchNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="bn")(x, train)
        return self.relu(_stage(self, "pre_relu", x))

    def convolution(self, train: bool) -> Callable[..., jax.Array] | None:
        """Return the function that computes the convolution, or None for JAX's own.

        At inference it is JAX's: ports are proven with plain convolutions, and make_predictor has a graph of its own.
        This is a method so that ``flax.linen.intercept_methods`` can change it.
        """
        return winograd.convolution if train else None

    def relu(self, x: jax.Array) -> jax.Array:
        """Return max(x, 0). This is a method so that ``flax.linen.intercept_methods`` can change its gradient."""
        return nn.relu(x)


class Inception(nn.Module):
    """Four branches that read one input, concatenated along the channels. ``widths`` is an entry of ``WIDTHS``."""

    widths: tuple[int, int, int, int, int, int]
    variant: str = "torchvision"
    batch_norm: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = _kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h w c2"]:
        """Map ``x`` [N, H, W, C] to [N, H, W, widths[0] + widths[2] + widths[4] + widths[5]]."""
        convolution: Callable[..., ConvBN] = functools.partial(ConvBN, **_options(self, self.kernel_init))
        width1, reduce2, width2, reduce3, width3, width4 = self.widths
        kernel3 = NETWORKS[self.variant].branch3_kernel

        def conv(name: str, x: jax.Array, features: int, **geometry: int) -> jax.Array:
            return _stage(self, name, convolution(features, **geometry, name=name)(x, train))

        branch1 = conv("branch1", x, width1)
        branch2 = conv("branch2_0", x, reduce2)
        branch2 = conv("branch2_1", branch2, width2, kernel_size=3, padding=1)
        branch3 = conv("branch3_0", x, reduce3)
        branch3 = conv("branch3_1", branch3, width3, kernel_size=kernel3, padding=kernel3 // 2)
        # Named branch4_1, because the pool is branch4.0 in torchvision.
        branch4 = conv("branch4_1", max_pool(x, window=3, stride=1, padding=1), width4)
        return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


class InceptionAux(nn.Module):
    """An auxiliary classifier, which reads the features of an inner stage of any height and width."""

    num_classes: int
    dropout: float = 0.7
    variant: str = "torchvision"
    batch_norm: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = _kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n {self.num_classes}"]:
        """Map ``x`` [N, H, W, C] to logits [N, num_classes], with dropout only in training."""
        if all(size in NETWORKS[self.variant].aux_pool_sizes for size in x.shape[1:3]):
            # Four windows cover 14 pixels. TensorFlow leaves out the pixels after them.
            x = avg_pool(x[:, :14, :14], window=5, stride=3)  # [N, 4, 4, C]
        else:
            x = adaptive_avg_pool(x, 4)  # [N, 4, 4, C]
        x = ConvBN(128, **_options(self, self.kernel_init), name="conv")(x, train)  # [N, 4, 4, 128]
        # Flattened with the channels first, because fc1's kernel is in PyTorch's order.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], 128 * 4 * 4)
        x = nn.relu(_dense(self, 1024, x.shape[-1], self.kernel_init, "fc1")(x))
        x = _dropout(x, self.dropout, train)
        return _dense(self, self.num_classes, x.shape[-1], self.kernel_init, "fc2")(x)


class GoogLeNet(nn.Module):
    """GoogLeNet, layer by layer the network of ``torchvision.models.googlenet`` or that of the paper.

    The paper's network, as Berkeley trained it with Caffe, is the variant ``"bvlc"``. It has local response
    normalisation, biases and 5x5 convolutions, and no BatchNorm. As Google trained it with TensorFlow, for DeepDream
    and Lucid, it is ``"inception5h"``: two widths, the padding and the normalisation differ. As ``inception_v1`` of
    ONNX's model zoo, it is ``"bvlc_floor"``: the max pools round their sizes down, not up. Images are the same for all
    variants: the networks ``"bvlc"`` and ``"bvlc_floor"`` map them to the pixels that Caffe's networks read, BGR in
    [0, 255] minus (104, 117, 123), and ``"inception5h"`` to RGB in [0, 255] minus 117.

    In training on a CPU, ``winograd.convolution`` computes large 3x3 convolutions by Winograd's algorithm.

    The names of the variables are those of torchvision's modules: ``inception3a.branch2.0.conv.weight`` is
    ``params/inception3a/branch2_0/conv/kernel`` and ``conv1.bn.running_var`` is ``batch_stats/conv1/bn/var``.

    Example::

        model = GoogLeNet(num_classes=10)
        variables = jax.jit(model.init)(jax.random.key(0), images)  # without jit, each layer is compiled on its own
        output = model.apply(variables, images)
        output, updates = model.apply(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    Attributes:
        variant: Name of the network, ``"torchvision"``, ``"bvlc"``, ``"inception5h"`` or ``"bvlc_floor"``.
        num_classes: Number of logits.
        aux_logits: Whether the two auxiliary classifiers exist. ``init`` always makes their variables; only training
            computes them.
        transform_input: Whether to map ImageNet-normalised images to [-1, 1] first, as torchvision's ImageNet
            checkpoint needs. Only for the variant ``"torchvision"``.
        dropout: Dropout rate before the last layer. Berkeley trained with 0.4, which ``from_caffe``,
            ``from_tensorflow`` and ``from_onnx`` set.
        dropout_aux: Dropout rate inside the auxiliary classifiers.
        batch_norm: False for the folded network, whose convolutions have a bias and no BatchNorm. It is always False
            for the other variants than ``"torchvision"``.
        dtype: Dtype of the computation. BatchNorm computes in float32 at least.
        param_dtype: Dtype of the parameters. BatchNorm statistics start in float32 at least.
        precision: Precision of convolutions and matrix products. GPUs and TPUs compute float32 in TF32 or bfloat16
            unless this is "highest".

    Raises:
        ValueError: If there is no such variant, or if ``transform_input`` is set for another than ``"torchvision"``.
    """

    variant: str = "torchvision"
    num_classes: int = 1000
    aux_logits: bool = True
    transform_input: bool = False
    dropout: float = 0.2
    dropout_aux: float = 0.7
    batch_norm: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self) -> None:
        if self.variant not in NETWORKS:
            *names, last = map(repr, NETWORKS)
            raise ValueError(
                f"variant: the networks are {', '.join(names)} and {last}, got {self.variant!r}; "
                "write the number of classes as GoogLeNet(num_classes=...)"
            )
        if self.transform_input and self.variant != "torchvision":
            raise ValueError(f"transform_input: the network {self.variant!r} has an input of its own: leave it out")
        self.batch_norm = self.batch_norm and NETWORKS[self.variant].batch_norm
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Float[Array | np.ndarray, "n h w 3"], *, train: bool = False, frozen: Sequence[str] = ()
    ) -> GoogLeNetOutput:
        """Compute the logits.

        Args:
            images: Floating point [N, H, W, 3], RGB, ImageNet-normalised; H and W at least 15, 31 for
                ``"bvlc"`` or 61 for ``"bvlc_floor"``.
            train: Whether to normalise by the statistics of the batch, to drop out, and to compute the auxiliary
                logits. Training needs ``mutable=["batch_stats"]`` and, for dropout rates above 0,
                ``rngs={"dropout": key}``.
            frozen: Names of blocks (``BLOCKS``) that compute in training as at inference, as blocks in ``eval()`` mode
                do in PyTorch: their BatchNorm normalises with the running statistics and does not update them.

        Raises:
            TypeError: If ``images`` is not an array of JAX or NumPy, or ``frozen`` is a string.
            ValueError: If ``images`` has another rank, layout, number of channels or dtype, or is too small; if
                ``frozen`` has a name that no block has; in training with ``aux_logits``, if the variables have no
                auxiliary heads; in training, if BatchNorm gets only one value per channel.
        """
        network = NETWORKS[self.variant]
        check_images(images, network.min_size)
        check_frozen(frozen, BLOCKS)
        kernel_init = _kernel_init
        if self.is_initializing():
            kernel_init = _drawn_in_blocks(self.make_rng("params"), self.variant)
        options = _options(self, kernel_init)
        conv_bn: Callable[..., ConvBN] = functools.partial(ConvBN, **options)

        stage = functools.partial(_stage, self)

        def trains(name: str) -> bool:
            return train and name not in frozen

        def conv(name: str, x: jax.Array, features: int, **geometry: Any) -> jax.Array:
            return stage(name, conv_bn(features, **geometry, name=name)(x, trains(name)))

        def response_norm(name: str, x: jax.Array) -> jax.Array:
            return stage(name, local_response_norm(x, network.response_norm)) if network.response_norm else x

        def pool(name: str, x: jax.Array, window: int = 3) -> jax.Array:
            return stage(name, max_pool(x, window, stride=2, padding=network.pool_padding))

        def inception(name: str, x: jax.Array) -> jax.Array:
            return stage(name, Inception(network.widths[name], **options, name=name)(x, trains(name)))

        def aux_head(name: str, x: jax.Array) -> jax.Array | None:
            if not self.aux_logits or not (train or self.is_initializing()):
                return None
            if not (self.is_initializing() or self.has_variable("params", name)):
                raise ValueError(MISSING_HEAD.format(name))
            return InceptionAux(self.num_classes, self.dropout_aux, **options, name=name)(x, trains(name))

        x = transform_input(self, jnp.asarray(images)).astype(self.dtype)

        x = conv("conv1", x, 64, kernel_size=7, stride=2, padding=network.conv1_padding)
        x = pool("maxpool1", x)
        x = response_norm("norm1", x)
        x = conv("conv2", x, 64)
        x = conv("conv3", x, 192, kernel_size=3, padding=1)
        x = response_norm("norm2", x)
        x = pool("maxpool2", x)

        x = inception("inception3a", x)
        x = inception("inception3b", x)
        x = pool("maxpool3", x)

        x = inception("inception4a", x)
        aux_logits1 = aux_head("aux1", x)
        x = inception("inception4b", x)
        x = inception("inception4c", x)
        x = inception("inception4d", x)
        aux_logits2 = aux_head("aux2", x)
        x = inception("inception4e", x)
        x = pool("maxpool4", x, network.maxpool4_window)

        x = inception("inception5a", x)
        x = inception("inception5b", x)
        x = stage("avgpool", x.mean((1, 2), keepdims=True))
        x = x[:, 0, 0, :]  # [N, 1024]
        x = _dropout(x, self.dropout, train)
        logits = stage("fc", _dense(self, self.num_classes, x.shape[-1], kernel_init, "fc")(x))

        if not train:
            return GoogLeNetOutput(logits, None, None)
        return GoogLeNetOutput(logits, aux_logits2, aux_logits1)


def endpoints(
    model: GoogLeNet,
    variables: Variables,
    images: Float[Array | np.ndarray, "n h w 3"],
    *,
    branches: bool = False,
    replace: Mapping[str, jax.Array | np.ndarray] | None = None,
) -> dict[str, jax.Array]:
    """Compute all stages at inference, to use them as features, to change them, or to compare them with torchvision's.

    Example::

        clean, other = (endpoints(model, variables, x) for x in (images, other_images))
        patched = endpoints(model, variables, images, replace={"mixed4c": other["inception4c"]})
        effect = patched["fc"] - clean["fc"]

    Args:
        model: The network.
        variables: Its variables.
        images: Floating point [N, H, W, 3], as for the model.
        branches: Whether to return the convolutions inside the stages, too: ``inception4c/branch2_1`` is the output of
            a convolution after its ReLU, and ``inception4c/branch2_1/pre_relu`` is the value before it.
        replace: Values of stages by name, with which the network goes on in place of its own. A name is one of the
            result with ``branches=True``, the path of torchvision's module (``inception4c.branch2.1``), Caffe's
            (``inception_4c/3x3``) or Lucid's (``mixed4c_3x3``). The last three can end in ``_pre_relu``.

    Returns:
        ``{"conv1": ..., "maxpool1": ..., ..., "inception5b": ..., "avgpool": ..., "fc": ...}``, by torchvision's module
        names and in the order of computation (``jax.jit`` sorts them by name). Stages are NHWC. ``avgpool`` is
        [N, 1, 1, 1024] and ``fc``, the logits, [N, num_classes]. The other variants than ``"torchvision"`` also
        have the results of local response normalisation, ``norm1`` after ``maxpool1`` and ``norm2`` after ``conv3``.

    Raises:
        ValueError: If ``replace`` names no stage or the same stage twice, or has a value of another shape than the
            stage.
    """
    replace = replace or {}
    given = {f"{stage_name(name, model.variant)}{_OUTPUT}": value for name, value in replace.items()}
    if len(given) < len(replace):
        raise ValueError(f"replace: two of {', '.join(replace)} are names of the same stage: leave one of them out")
    replacements = unflatten_dict(given, sep="/")
    _, collections = model.apply({**variables, "replacements": replacements}, images, mutable=["intermediates"])
    # `sow` collects a tuple with one entry per call, and each stage is computed once.
    recorded = flatten_dict(collections["intermediates"], sep="/")
    stages = {name.removesuffix(_OUTPUT): stage for name, (stage,) in recorded.items()}
    return stages if branches else {name: stage for name, stage in stages.items() if "/" not in name}


def _stage(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Return the value of a stage, which `endpoints` can read and replace; no other caller passes these collections."""
    if module.has_variable("replacements", name + _OUTPUT):
        replacement = jnp.asarray(module.get_variable("replacements", name + _OUTPUT))
        if replacement.shape != x.shape:
            path = "/".join((*module.path, name))
            raise ValueError(f"replace: {path} has the shape {x.shape}, got {replacement.shape}")
        x = replacement.astype(x.dtype)
    module.sow("intermediates", name + _OUTPUT, x)
    return x


def variable_shapes(model: GoogLeNet) -> dict[str, Any]:
    """Return the variables of ``model.init`` as nested dicts of ``jax.ShapeDtypeStruct``, without computing them.

    Tracing ``model.init`` gives the same, but takes 0.4 s, and every file of weights is checked against them.
    """
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for name, shape in kernel_shapes(NETWORKS[model.variant], model.num_classes).items():
        layer, is_convolution = name.split("/"), len(shape) == 4
        if layer[0] in ("aux1", "aux2") and not model.aux_logits:
            continue
        path = ("params", *layer, "conv") if is_convolution else ("params", *layer)
        shapes[*path, "kernel"] = shape
        if is_convolution and model.batch_norm:
            shapes |= {("params", *layer, "bn", key): shape[-1:] for key in ("scale", "bias")}
            shapes |= {("batch_stats", *layer, "bn", key): shape[-1:] for key in ("mean", "var")}
        else:
            shapes[*path, "bias"] = shape[-1:]
    dtypes = {"params": model.param_dtype, "batch_stats": at_least_float32(model.param_dtype)}
    dtypes = {collection: jax.dtypes.canonicalize_dtype(dtype) for collection, dtype in dtypes.items()}
    # In the order of JAX's trees, which is that of the names.
    return unflatten_dict({path: jax.ShapeDtypeStruct(shapes[path], dtypes[path[0]]) for path in sorted(shapes)})


def _options(module: nn.Module, kernel_init: Initializer) -> dict[str, Any]:
    """Return the options that every block passes on to the blocks inside it."""
    fields = {name: getattr(module, name) for name in ("variant", "batch_norm", "dtype", "param_dtype", "precision")}
    return {**fields, "kernel_init": kernel_init}


def _drawn_in_blocks(key: jax.Array, variant: str) -> Initializer:
    """Return an initialiser that cuts kernels, one after the other, from large blocks of random values.

    XLA compiles a draw again for each shape. With one draw for each of the 64 kernels, compiling ``model.init`` took 29
    seconds of CPU time; with blocks of one shape it takes 5 seconds. The key that Flax passes for each kernel is not
    used.

    Values are from ``_kernel_init`` or, for a network of Caffe's, from its filler "xavier": uniform, with a variance of
    1 / fan_in.
    """
    is_xavier = NETWORKS[variant].caffe_init
    draw = functools.partial(jax.random.uniform, minval=-1, maxval=1) if is_xavier else _kernel_init
    rest, blocks = None, 0

    def init(_key: jax.Array, shape: Sequence[int], dtype: Any, _sharding: Any = None) -> jax.Array:
        nonlocal rest, blocks
        size = math.prod(shape)
        while rest is None or rest.size < size:
            block = draw(jax.random.fold_in(key, blocks), (_BLOCK,), dtype)
            rest = block if rest is None else jnp.concatenate([rest, block])
            blocks += 1
        kernel, rest = rest[:size].reshape(shape), rest[size:]
        return kernel * math.sqrt(3 / math.prod(shape[:-1])) if is_xavier else kernel

    return init


def at_least_float32(dtype: Dtype) -> Dtype:
    """Return ``dtype``, or float32 if ``dtype`` has fewer than 32 bits."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def _dense(module: nn.Module, features: int, fan_in: int, kernel_init: Initializer, name: str) -> nn.Dense:
    bound = 1 / math.sqrt(fan_in)  # the bias is uniform, as torch.nn.Linear initialises it

    def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
        if NETWORKS[module.variant].caffe_init:
            return jnp.full(shape, 0.2 if name == "fc1" else 0.0, dtype)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(
        features,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        precision=module.precision,
        dot_general=_dot,
        name=name,
    )


def _dropout(x: jax.Array, rate: float, train: bool) -> jax.Array:
    layer = nn.Dropout(rate, deterministic=not train, name="dropout")
    if not is_explicit(x):
        return layer(x)
    # The mask that Flax draws is not sharded. It must be sharded as x is before the two can be combined.
    return x * reshard(layer(jnp.ones(x.shape, x.dtype)), jax.typeof(x).sharding)


def is_explicit(x: jax.Array) -> bool:
    """Return whether ``x`` is on a mesh with explicit axes, where each operation must say how its result is sharded."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _dot(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Return ``x @ kernel`` for [N, K] and [K, M], on a CPU summed in blocks of K."""
    plain = functools.partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, precision=precision)
    blocked = functools.partial(_blocked_dot, precision=precision)
    return platforms.choose(platforms.BLOCKED_DOT, blocked, plain, x, kernel)


@functools.partial(jax.jit, static_argnames="precision")
def _blocked_dot(x: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Return ``x @ kernel`` for [N, K] and [K, M], summed in 16 blocks of K, which is a multiple of 16.

    On a CPU, XLA adds the K products one after the other. With K = 1024 its rounding error was 2 to 3 times PyTorch's;
    summed in blocks, it is half of PyTorch's.
    """
    (n, k), m = x.shape, kernel.shape[1]
    x, kernel = x.reshape(n, 16, k // 16), kernel.reshape(16, k // 16, m)
    blocks = jnp.einsum(  # [16, N, M]
        "nbk,bkm->bnm", x, kernel, precision=precision, preferred_element_type=at_least_float32(x.dtype)
    )
    return blocks.sum(0).astype(x.dtype)


def transform_input(model: GoogLeNet, images: Float[Array, "n h w 3"]) -> Float[Array, "n h w 3"]:
    """Map images from ImageNet's normalisation to what the network was trained on.

    For torchvision's network, these are the images themselves or, with the model's ``transform_input``, pixels in
    [-1, 1]. For the others, they are pixels in [0, 255] minus a mean, in RGB or BGR.
    """
    scale_and_shift = input_scale_and_shift(model)
    if scale_and_shift is None:
        return images
    if NETWORKS[model.variant].bgr:
        images = images[..., ::-1]
    scale, shift = (per_channel(values.astype(images.dtype), images) for values in scale_and_shift)
    return images * scale + shift


def input_scale_and_shift(model: GoogLeNet) -> tuple[np.ndarray, np.ndarray] | None:
    """Return what ``transform_input`` multiplies and adds, float64 [3] in the network's order of channels, or None."""
    network, std, mean = NETWORKS[model.variant], np.array(IMAGENET_STD), np.array(IMAGENET_MEAN)
    if network.bgr:
        std, mean = std[::-1], mean[::-1]
    if network.pixel_mean:
        return 255 * std, 255 * mean - network.pixel_mean
    return (std / 0.5, (mean - 0.5) / 0.5) if model.transform_input else None


def check_frozen(frozen: Sequence[str], blocks: Iterable[str]) -> None:
    """Raise TypeError if ``frozen`` is a string, and ValueError if it has a name that is not among ``blocks``."""
    if isinstance(frozen, str):
        raise TypeError(f'frozen: expected several names, got a string: write ("{frozen}",)')
    if unknown := [name for name in frozen if name not in blocks]:
        raise ValueError(f"frozen: no block is named {', '.join(unknown)}; the blocks are {', '.join(blocks)}")


def plain_dicts(tree: Variables) -> dict[str, Any]:
    """Return nested mappings, such as ``flax.core.FrozenDict``, as nested dicts of the same arrays."""
    return {name: plain_dicts(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


def check_array(array: Any, name: str) -> None:
    """Raise TypeError unless ``array`` is an array of JAX or NumPy. The message says how to make it one."""
    if isinstance(array, jax.Array | np.ndarray):
        return
    kind = f"{type(array).__module__}.{type(array).__name__}".removeprefix("builtins.")
    way_out = f"pass numpy.asarray({name})"
    if name == "images" and not hasattr(array, "__dlpack__"):  # not an array of another library, such as PyTorch
        way_out = "pass flax_googlenet.preprocess_batch([...]), which takes files, pictures and uint8 arrays"
        if isinstance(array, list | tuple):
            way_out += ", or numpy.stack(images) if they are arrays and normalised"
    raise TypeError(f"expected an array of JAX or NumPy, got {kind}: {way_out}")


def check_images(images: Any, min_size: int) -> None:
    """Raise TypeError or ValueError, with the way out, unless the network can take ``images``. Looks at no pixel."""
    check_array(images, "images")
    shape, dtype = images.shape, images.dtype
    expected = f"expected floating point images [N, H, W, 3] with H and W at least {min_size}, got shape {shape}"
    if len(shape) != 4:
        raise ValueError(f"{expected}: add the batch axis with images[None]" if len(shape) == 3 else expected)
    if shape[3] != 3:
        raise ValueError(f"{expected}: NCHW? use images.transpose(0, 2, 3, 1)" if shape[1] == 3 else expected)
    if any(size < min_size for size in shape[1:3]):  # min() would compare two symbolic sizes, which fails
        raise ValueError(expected)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{expected} of {dtype}: scale to [0, 1] and normalise first, as flax_googlenet.preprocess_batch does"
        )
