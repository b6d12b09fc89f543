"""Google's GoogLeNet as TensorFlow executes it, against the port of the same file: every stage, at three sizes.

It needs TensorFlow, the extra ``tensorflow``. Google's own file is not at hand, so the weights are random ones under
its names of nodes.
"""

from pathlib import Path
from typing import Any

import bvlc
import numpy as np
import pytest
from inception5h import Inception5h
from proof import flax_stages, relative_error
from tensorflow_files import BLOCKS, constants

from flax_googlenet import from_tensorflow
from flax_googlenet.weights import tensorflow as reader

tf = pytest.importorskip("tensorflow", reason='TensorFlow is not installed: pip install -e ".[tensorflow]"')

STAGES = {
    "conv1": "conv2d0",
    "maxpool1": "maxpool0",
    "norm1": "localresponsenorm0",
    "conv2": "conv2d1",
    "conv3": "conv2d2",
    "norm2": "localresponsenorm1",
    "maxpool2": "maxpool1",
    **{f"inception{block}": f"mixed{block}" for block in BLOCKS},
    "maxpool3": "maxpool4",
    "maxpool4": "maxpool10",
}
"""Our name of a stage -> the name of its node."""


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return constants(bvlc.random_weights(1008, network=Inception5h))


@pytest.fixture(scope="module")
def path(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GraphDef that TensorFlow wrote: Google's nodes by their names, with random weights."""
    path = tmp_path_factory.mktemp("tensorflow") / "tensorflow_inception_graph.pb"
    with tf.Graph().as_default() as graph:
        build(weights)
        path.write_bytes(graph.as_graph_def().SerializeToString())
    return path


def build(weights: dict[str, np.ndarray]) -> None:
    """Add Google's nodes to the default graph."""
    nodes = {name: tf.constant(array, name=name) for name, array in weights.items()}

    def layer(name: str, x: Any, stride: int = 1) -> Any:
        x = tf.nn.conv2d(x, nodes[f"{name}_w"], stride, "SAME", name=f"{name}_pre_relu/conv")
        return tf.nn.relu(tf.nn.bias_add(x, nodes[f"{name}_b"], name=f"{name}_pre_relu"), name=name)

    def dense(name: str, x: Any, activation: str) -> Any:
        x = tf.matmul(x, nodes[f"{name}_w"], name=f"{name}_{activation}/matmul")
        return tf.nn.bias_add(x, nodes[f"{name}_b"], name=f"{name}_{activation}")

    def pool(name: str, x: Any, stride: int = 2) -> Any:
        return tf.nn.max_pool2d(x, 3, stride, "SAME", name=name)

    def norm(name: str, x: Any) -> Any:
        return tf.nn.local_response_normalization(x, depth_radius=5, bias=2.0, alpha=1e-4, beta=0.5, name=name)

    def head(i: int, x: Any) -> None:
        x = layer(f"head{i}_bottleneck", tf.nn.avg_pool2d(x, 5, 3, "VALID", name=f"head{i}_pool"))
        x = tf.nn.relu(dense(f"nn{i}", tf.reshape(x, [-1, 2048]), "pre_relu"), name=f"nn{i}")
        tf.nn.softmax(dense(f"softmax{i}", x, "pre_activation"), name=f"softmax{i}")

    x = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3], name="input")
    x = norm("localresponsenorm0", pool("maxpool0", layer("conv2d0", x, stride=2)))
    x = pool("maxpool1", norm("localresponsenorm1", layer("conv2d2", layer("conv2d1", x))))
    for block in BLOCKS:
        name = f"mixed{block}"
        if block in ("4a", "5a"):
            x = pool("maxpool4" if block == "4a" else "maxpool10", x)
        branches = [
            layer(f"{name}_1x1", x),
            layer(f"{name}_3x3", layer(f"{name}_3x3_bottleneck", x)),
            layer(f"{name}_5x5", layer(f"{name}_5x5_bottleneck", x)),
            layer(f"{name}_pool_reduce", pool(f"{name}_pool", x, stride=1)),
        ]
        x = tf.raw_ops.Concat(concat_dim=3, values=branches, name=name)
        if block in ("4a", "4d"):
            head(0 if block == "4a" else 1, x)
    x = tf.reshape(tf.nn.avg_pool2d(x, 7, 1, "VALID", name="avgpool0"), [-1, 1024], name="avgpool0/reshape")
    tf.nn.softmax(dense("softmax2", x, "pre_activation"), name="softmax2")


def run(path: Path, fetches: dict[str, str], feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Execute the file, as DeepDream does, for nodes by name."""
    graph_def = tf.compat.v1.GraphDef()
    graph_def.ParseFromString(path.read_bytes())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with tf.compat.v1.Session(graph=graph) as session:
            nodes = {stage: f"{node}:0" for stage, node in fetches.items()}
            return session.run(nodes, {f"{node}:0": array for node, array in feeds.items()})


def test_the_weights_of_a_file_that_tensorflow_wrote_are_read_exactly(
    path: Path, weights: dict[str, np.ndarray]
) -> None:
    read = constants(reader.read(path).state_dict)
    assert read.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("size", [(224, 224), (227, 227), (299, 299), (224, 227)], ids="{0[0]}x{0[1]}".format)
def test_every_stage_is_tensorflows(size: tuple[int, int], path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((1, *size, 3)).astype(np.float32)
    pixels = (images.astype(np.float64) * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
    fetches = STAGES
    if max(size) <= 256:  # for larger images, Google's graph cannot reshape what its heads have pooled
        fetches = STAGES | {f"aux{i + 1}": f"softmax{i}_pre_activation" for i in (0, 1)}
    theirs = run(path, fetches, {"input": (pixels - 117).astype(np.float32)})
    # Google's last pool has 7x7 pixels, which is all there are at 224x224. For other sizes it has several outputs.
    theirs["avgpool"] = theirs["inception5b"].mean((1, 2), keepdims=True)
    theirs |= run(path, {"fc": "softmax2_pre_activation"}, {"avgpool0/reshape": theirs["avgpool"][:, 0, 0]})
    if size == (224, 224):
        theirs |= run(path, {"avgpool": "avgpool0"}, {"mixed5b": theirs["inception5b"]})

    model, variables = from_tensorflow(path)
    ours = flax_stages(model, variables, images)
    assert theirs.keys() == ours.keys() - ({"aux1", "aux2"} if max(size) > 256 else set())
    for name, stage in theirs.items():
        error = relative_error(ours[name], stage)
        print(f"{size[0]}x{size[1]} {name:12} {error:.1e}")
        assert error < 1e-5, name  # both compute in float32: 2.4e-6 measured
